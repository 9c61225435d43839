"""How close substitutes are to the weights they replace, by kind of matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from subspec_cli.checkpoint.layer_tensors import LAYER_MATRICES


def matrix_kind(name: str) -> str:
    """Short name of a matrix: `q` for `self_attn.q_proj` and `self_attn.q_proj.weight`."""
    return name.removesuffix(".weight").rpartition(".")[2].removeprefix("in_proj_").removesuffix("_proj")


MATRIX_KINDS: Final = tuple(matrix_kind(name) for name in LAYER_MATRICES)
"""Short names of the matrices that a layer may have, in order of use."""


@dataclass(frozen=True, slots=True)
class MatrixQuality:
    """Size and quantization error of one matrix or several."""

    weights: int
    stored_bytes: int
    """Bytes of codes, scales and shifts."""
    signal: float
    """Sum of squares of the original weights."""
    noise: float
    """Sum of squares of the differences between original and stored weights."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.stored_bytes / self.weights

    @property
    def sqnr_db(self) -> float | None:
        """Signal-to-quantization-noise ratio in dB; None if signal or noise is zero."""
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 and self.noise > 0 else None


def rounded_power(power: float) -> float:
    """Round to nine digits, so that sums in another order (other thread counts) give the same manifest."""
    return float(f"{power:.9g}")


def summed(parts: Iterable[MatrixQuality]) -> MatrixQuality | None:
    """The sum of all parts; None if there are no parts."""
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
    """Each kind summed over all layers, in order of use."""
    known = list(layers)
    totals = {kind: summed(layer[kind] for layer in known if kind in layer) for kind in MATRIX_KINDS}
    return {kind: total for kind, total in totals.items() if total is not None}
