"""How far rows of logits are from the reference's. Shapes: `N` rows, `V` vocab."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowErrors:
    """Absolute differences of one row's logits from the float32 reference, over the vocabulary."""

    largest: float
    median: float


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """The row that gave one token of an answer."""

    token_id: int
    own_id: int
    """The likeliest token by our logits, computed again."""
    reference_id: int
    """The likeliest token by the library's logits in float32."""
    library_id: int
    """The likeliest token by the library's logits in 16 bits."""
    gap: float
    """How much lower the float32 logit of our token is than the largest; 0 if ours is the largest."""
    own: RowErrors
    """Our logits, in the model's type."""
    own_float32: RowErrors
    """Our logits, computed in float32."""
    library: RowErrors
    """The library's own logits in 16 bits."""


@dataclass(frozen=True, slots=True)
class RowLogits:
    """Logits `[N, V]` of the same rows from all sides."""

    own: Tensor
    own_float32: Tensor
    library: Tensor
    reference: Tensor


@torch.inference_mode()
def compare_rows(token_ids: Sequence[int], logits: RowLogits) -> list[ComparedRow]:
    """Compare the `N` rows that gave `token_ids`, on the CPU."""
    reference = logits.reference
    given = reference[torch.arange(len(token_ids)), torch.tensor(token_ids)]
    gaps = (reference.max(-1).values - given).tolist()
    own_ids, reference_ids, library_ids = (
        rows.argmax(-1).tolist() for rows in (logits.own, reference, logits.library)
    )
    own, own_float32, library = (
        _errors(rows, reference) for rows in (logits.own, logits.own_float32, logits.library)
    )
    return [
        ComparedRow(
            token_id=token_id,
            own_id=own_ids[row],
            reference_id=reference_ids[row],
            library_id=library_ids[row],
            gap=gaps[row],
            own=own[row],
            own_float32=own_float32[row],
            library=library[row],
        )
        for row, token_id in enumerate(token_ids)
    ]


def _errors(rows: Tensor, reference: Tensor) -> list[RowErrors]:
    """One row at a time: float32 copies of many rows of a large vocabulary would be large."""
    found = []
    for row, right in zip(rows, reference, strict=True):
        error = (row.float() - right).abs_()
        found.append(RowErrors(float(error.max()), float(error.median())))
    return found
