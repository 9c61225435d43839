"""How substitutes are quantized, and the bytes that they take in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.layer_tensors import matrices_of
from subspec_cli.substitutes.quality import matrix_kind

GROUP_SIZES: Final = (128, 64, 32)
"""Numbers of input features that may share a scale. The largest one that divides the input is used."""
_ROW_MULTIPLE: Final = 16
"""torch's int4 kernel requires a multiple of this many output features."""

TUNED: Final = "tuned"
"""The optimizer of the second stage: rounded for the model's own inputs."""

OPTIMIZERS: Final = ("minmax", "hqq", TUNED)


def group_size_for(shape: tuple[int, ...]) -> int | None:
    """Group size for a matrix `[out, in]`; None if the low-bit kernels do not support the shape."""
    if shape[0] % _ROW_MULTIPLE:
        return None
    return next((size for size in GROUP_SIZES if shape[1] % size == 0), None)


def substitute_layer_bytes(geometry: ModelGeometry, settings: SubstituteSettings) -> tuple[int, ...]:
    """Bytes of each layer's substitute in memory. Two-bit codes are in the four-bit kernel's layout."""
    sizes = {
        geometry.mixers[layer]: _substitute_bytes(geometry, geometry.layer_shapes(layer), settings)
        for layer in geometry.representatives
    }
    return tuple(sizes[mixer] for mixer in geometry.mixers)


def substitute_head_bytes(geometry: ModelGeometry) -> int:
    """Bytes of the draft's 4-bit head in memory: codes, a scale and a zero per group; 0 if no kernel takes it."""
    weights, group_size = geometry.vocab * geometry.hidden, group_size_for((geometry.vocab, geometry.hidden))
    return 0 if group_size is None else weights // 2 + weights // group_size * 4


def _substitute_bytes(
    geometry: ModelGeometry, shapes: Mapping[str, tuple[int, ...]], settings: SubstituteSettings
) -> int:
    total = 0
    for name in matrices_of(shapes):
        elements, group_size = math.prod(shapes[name]), group_size_for(shapes[name])
        if group_size is None:
            total += elements * geometry.element_bytes
        elif settings.bits_of(name) == 8:
            total += elements + shapes[name][0] * 2
        else:
            total += elements // 2 + elements // group_size * 4
    return total


@dataclass(frozen=True, slots=True)
class SubstituteSettings:
    """How substitutes are quantized."""

    bits: int
    optimizer: str
    overrides: tuple[tuple[str, int], ...] = ()
    """Matrices of another width, sorted by name: (name inside the layer without `.weight`, bits)."""

    @property
    def label(self) -> str:
        """Short name, also part of the directory's name: qint4-minmax, qint4-minmax-down8."""
        special = "".join(f"-{matrix_kind(name)}{bits}" for name, bits in self.overrides)
        return f"qint{self.bits}-{self.optimizer}{special}"

    @property
    def widths(self) -> frozenset[int]:
        """All numbers of bits in use."""
        return frozenset((self.bits, *(bits for _, bits in self.overrides)))

    @property
    def group_size(self) -> int:
        """Input features per scale, as manifests record it; 0 if all matrices have 8 bits and a scale per row."""
        return 0 if self.widths == {8} else GROUP_SIZES[0]

    def bits_of(self, name: str) -> int:
        """Bits of one matrix, by its name inside the layer."""
        return dict(self.overrides).get(name.removesuffix(".weight"), self.bits)
