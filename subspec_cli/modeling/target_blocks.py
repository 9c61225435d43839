"""The target's blocks in the order of use: resident ones from memory, the others as the streamer brings them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from torch import Tensor

from subspec_cli.checkpoint.layer_tensors import LAYER_BLOCKS, layer_prefix
from subspec_cli.modeling.decoder import Block
from subspec_cli.streaming.streamer import Streamer


@dataclass(frozen=True, slots=True)
class TargetBlocks:
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
        return {k: v for block in self.resident[layer] for k, v in _Inside(layer, block).items()}

    def _walk(
        self, arriving: Generator[Mapping[str, Tensor], None, None] | None
    ) -> Generator[Block, None, None]:
        for layer in range(self.layers):
            held = self.resident.get(layer)
            for number, kind in enumerate(LAYER_BLOCKS):
                if held is not None:
                    yield Block(layer, kind, _Inside(layer, held[number]))
                else:
                    assert arriving is not None
                    yield Block(layer, kind, _Inside(layer, next(arriving)))
        # Asking once more lets the streamer reclaim its last slot.
        if arriving is not None:
            assert next(arriving, None) is None


class _Inside(Mapping[str, Tensor]):
    """Tensors of a layer by their names inside it; looking one up waits for it, where it is on its way."""

    def __init__(self, layer: int, tensors: Mapping[str, Tensor]) -> None:
        self._prefix = layer_prefix(layer)
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
