"""How close substitutes are to the weights they replace, by kind of matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from subspec_cli.checkpoint.layer_tensors import LAYER_MATRICES


def matrix_kind(name: str) -> str:
    """Short name of a matrix: `q` for `self_attn.q_proj` and `self_attn.q_proj.weight`."""
    return name.removesuffix(".weight").rpartition(".")[2].removeprefix("in_proj_").removesuffix("_proj")


MATRIX_KINDS: Final = tuple(matrix_kind(name) for name in LAYER_MATRICES)
"""Short names of the matrices that a layer may have, in order of use."""


@dataclass(frozen=True, slots=True)
class OutputQuality:
    """What rounding costs the outputs of a matrix on the model's own text, and hence how it was rounded."""

    rows: int
    """Rows of text."""
    signal: float
    """Sum of squares of the outputs."""
    plain_noise: float
    """Sum of squares of their errors if each weight is rounded by itself."""
    tuned_noise: float
    """The same if the weights are rounded for the inputs of the text."""

    @property
    def sqnr_db(self) -> float | None:
        """Signal-to-noise ratio of the outputs in dB; None if signal or noise is zero."""
        return _decibels(self.signal, min(self.tuned_noise, self.plain_noise))

    @property
    def plain_sqnr_db(self) -> float | None:
        """The same if each weight were rounded by itself."""
        return _decibels(self.signal, self.plain_noise)

    @property
    def is_tuned(self) -> bool:
        """Whether the weights were rounded for the inputs."""
        return self.tuned_noise < self.plain_noise


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
    outputs: OutputQuality | None = None
    """Of one matrix that was tuned."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.stored_bytes / self.weights

    @property
    def sqnr_db(self) -> float | None:
        """Signal-to-quantization-noise ratio in dB; None if signal or noise is zero."""
        return _decibels(self.signal, self.noise)


def _decibels(signal: float, noise: float) -> float | None:
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


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
        _summed_outputs([part.outputs for part in known if part.outputs is not None]),
    )


def _summed_outputs(parts: Sequence[OutputQuality]) -> OutputQuality | None:
    if not parts:
        return None
    return OutputQuality(
        max(part.rows for part in parts),
        math.fsum(part.signal for part in parts),
        math.fsum(part.plain_noise for part in parts),
        math.fsum(min(part.plain_noise, part.tuned_noise) for part in parts),
    )


def by_kind(layers: Iterable[Mapping[str, MatrixQuality]]) -> dict[str, MatrixQuality]:
    """Each kind summed over all layers, in order of use."""
    known = list(layers)
    totals = {kind: summed(layer[kind] for layer in known if kind in layer) for kind in MATRIX_KINDS}
    return {kind: total for kind, total in totals.items() if total is not None}
