"""The target's blocks in the order of use: resident blocks from memory, the others from the streamer."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from torch import Tensor

from subspec_cli.checkpoint.layer_tensors import LAYER_BLOCKS
from subspec_cli.modeling.decoder import Block
from subspec_cli.streaming.streamer import Streamer


@dataclass(frozen=True, slots=True)
class TargetBlocks:
    """Gives all blocks of layers `0 .. layers - 1` in each pass."""

    layers: int
    resident: Mapping[int, Sequence[Mapping[str, Tensor]]]
    """Blocks of resident layers, tensors by the name inside the layer."""
    streamer: Streamer | None
    """None if all layers are resident."""

    @property
    def most_held(self) -> int:
        """Most blocks that may be held at once while further blocks are read."""
        return len(LAYER_BLOCKS) if self.streamer is None else self.streamer.most_held

    def blocks(self, parts: Sequence[int] = (1,)) -> Generator[Block, None, None]:
        """One pass over all layers; `parts` of a layer's blocks are valid together, as in `Streamer.blocks`."""
        if self.streamer is None:
            yield from self._walk(None)
            return
        with closing(self.streamer.blocks(parts)) as arriving:
            yield from self._walk(arriving)

    def resident_matrices(self, layer: int) -> dict[str, Tensor]:
        """All matrices of a resident layer by the name inside the layer."""
        return {name: tensor for block in self.resident[layer] for name, tensor in block.items()}

    def _walk(
        self, arriving: Generator[Mapping[str, Tensor], None, None] | None
    ) -> Generator[Block, None, None]:
        for layer in range(self.layers):
            held = self.resident.get(layer)
            for number, kind in enumerate(LAYER_BLOCKS):
                if held is not None:
                    yield Block(layer, kind, held[number])
                else:
                    assert arriving is not None
                    yield Block(layer, kind, next(arriving))
        # Asking once more makes the streamer release its last slots.
        if arriving is not None:
            assert next(arriving, None) is None
