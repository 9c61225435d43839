"""How well substitutes stand for the weights they replace, by kind of matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

MATRIX_KINDS: Final = ("q", "k", "v", "o", "gate", "up", "down")
"""Short names of a layer's matrices, in the order of their use."""


def matrix_kind(name: str) -> str:
    """`q` for `self_attn.q_proj` and `self_attn.q_proj.weight`."""
    return name.removesuffix(".weight").rpartition(".")[2].removesuffix("_proj")


@dataclass(frozen=True, slots=True)
class MatrixQuality:
    """What storing one matrix, or several, took and lost."""

    weights: int
    stored_bytes: int
    """Codes, scales and shifts."""
    signal: float
    """Sum of squares of the original weights."""
    noise: float
    """Sum of squares of what the stored ones differ by."""

    @property
    def bits_per_weight(self) -> float:
        """Scales included."""
        return 8 * self.stored_bytes / self.weights

    @property
    def sqnr_db(self) -> float | None:
        """Signal-to-quantization-noise ratio; None where nothing was lost or there was nothing to lose."""
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 and self.noise > 0 else None


def rounded_power(power: float) -> float:
    """Nine digits: sums of another order, as another number of threads makes, write the same manifest."""
    return float(f"{power:.9g}")


def summed(parts: Iterable[MatrixQuality]) -> MatrixQuality | None:
    """Everything together; None for nothing."""
    known = list(parts)
    if not known:
        return None
    return MatrixQuality(
        sum(part.weights for part in known),
        sum(part.stored_bytes for part in known),
        math.fsum(part.signal for part in known),
        math.fsum(part.noise for part in known),
    )


def by_kind(layers: Iterable[Mapping[str, MatrixQuality]]) -> dict[str, MatrixQuality]:
    """Each kind summed over all layers, in the order of use."""
    known = list(layers)
    totals = {kind: summed(layer[kind] for layer in known if kind in layer) for kind in MATRIX_KINDS}
    return {kind: total for kind, total in totals.items() if total is not None}
