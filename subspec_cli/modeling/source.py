"""The target's blocks in the order of use: resident ones from memory, the others as the streamer brings them."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from subspec_cli.modeling.decoder import Block
from subspec_cli.placement.geometry import LAYER_BLOCKS
from subspec_cli.placement.streamer import Streamer
from subspec_cli.store.safetensors_header import TensorEntry

LAYER_PREFIX: Final = "model.layers.{layer}."


def block_entries(tensors: Mapping[str, TensorEntry], layer: int) -> list[list[TensorEntry]]:
    """The tensor entries of each block of a layer, in the order of use."""
    prefix = LAYER_PREFIX.format(layer=layer)
    return [[tensors[prefix + name] for name in names] for names in LAYER_BLOCKS.values()]


@dataclass(frozen=True, slots=True)
class LayerSource:
    """One pass is every block of layers `0 .. layers - 1`."""

    layers: int
    resident: Mapping[int, Sequence[Mapping[str, Tensor]]]
    """Blocks of resident layers, tensors by full name."""
    streamer: Streamer | None
    """None when everything is resident."""

    def blocks(self) -> Generator[Block, None, None]:
        """One pass over all layers."""
        if self.streamer is None:
            yield from self._walk(None)
            return
        with closing(self.streamer.blocks()) as arriving:
            yield from self._walk(arriving)

    def resident_matrices(self, layer: int) -> dict[str, Tensor]:
        """All matrices of a resident layer by the name inside the layer."""
        return {k: v for block in self.resident[layer] for k, v in _inside(layer, block).items()}

    def _walk(
        self, arriving: Generator[dict[str, Tensor], None, None] | None
    ) -> Generator[Block, None, None]:
        for layer in range(self.layers):
            held = self.resident.get(layer)
            for number, kind in enumerate(LAYER_BLOCKS):
                if held is not None:
                    yield Block(layer, kind, _inside(layer, held[number]))
                else:
                    assert arriving is not None
                    yield Block(layer, kind, _inside(layer, next(arriving)))
        # Asking once more lets the streamer reclaim its last slot.
        if arriving is not None:
            assert next(arriving, None) is None


def _inside(layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = LAYER_PREFIX.format(layer=layer)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
