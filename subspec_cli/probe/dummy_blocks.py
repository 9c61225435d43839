"""Dummy blocks of layers for the decoders of a session, held or rebuilt at each use, and a draft without a head."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec_cli.checkpoint.layer_tensors import LAYER_BLOCKS, matrices_of
from subspec_cli.checkpoint.packed_codes import CodedMatrix
from subspec_cli.checkpoint.residual import rebuild
from subspec_cli.modeling.decoder import Block, DraftLogits
from subspec_cli.modeling.residuals import dummy_residual


@dataclass(frozen=True, slots=True)
class DummyBlocks:
    """Blocks of dummy layers in memory."""

    layers: tuple[dict[str, Tensor], ...]

    @property
    def most_held(self) -> int:
        """All blocks stay in memory."""
        return len(LAYER_BLOCKS)

    def blocks(self, parts: Sequence[int] = (1,)) -> Generator[Block, None, None]:  # noqa: ARG002
        """Yield the blocks of one pass."""
        for number, matrices in enumerate(self.layers):
            for kind, names in LAYER_BLOCKS.items():
                yield Block(number, kind, {name: matrices[name] for name in names if name in matrices})


class NoHead:
    """Stands in for a head, so that layers are timed without one."""

    def guess(self, hidden: Tensor) -> DraftLogits:
        """Return the hidden states."""
        return DraftLogits(hidden)


class DummyResiduals:
    """Blocks of dummy layers whose matrices are rebuilt from residuals at each use, as those of a pass are."""

    def __init__(self, shapes: Sequence[Mapping[str, tuple[int, ...]]], device: torch.device) -> None:
        """Make residuals for layers of these shapes; a matrix that no 4-bit kernel takes stays in 16 bits."""
        self._layers = [
            {
                name: _residual_or_weights((layer[name][0], layer[name][1]), device)
                for name in matrices_of(layer)
            }
            for layer in shapes
        ]
        largest = max(
            sum(math.prod(layer[name]) for name in names if name in layer)
            for layer in shapes
            for names in LAYER_BLOCKS.values()
        )
        self._memory = torch.empty(largest, dtype=torch.bfloat16, device=device)
        self.rebuilt_bytes = sum(
            2 * math.prod(shape.coded.shape)
            for layer in self._layers
            for shape in layer.values()
            if isinstance(shape, _Residual)
        )
        """Bytes of the 16-bit weights that one pass rebuilds."""

    @property
    def most_held(self) -> int:
        """One block: all blocks are rebuilt in the same memory."""
        return 1

    def blocks(self, parts: Sequence[int] = (1,)) -> Generator[Block, None, None]:  # noqa: ARG002
        """Yield the blocks of one pass."""
        for number, matrices in enumerate(self._layers):
            for kind, names in LAYER_BLOCKS.items():
                made, at = {}, 0
                for name in names:
                    held = matrices.get(name)
                    if isinstance(held, _Residual):
                        size = math.prod(held.coded.shape)
                        made[name] = self._memory[at : at + size].view(held.coded.shape)
                        rebuild(held.stored, held.coded, made[name])
                        at += size
                    elif held is not None:
                        made[name] = held
                yield Block(number, kind, made)


@dataclass(frozen=True, slots=True)
class _Residual:
    stored: Mapping[str, Tensor]
    coded: CodedMatrix


def _residual_or_weights(shape: tuple[int, int], device: torch.device) -> _Residual | Tensor:
    found = dummy_residual(shape, device)
    return _Residual(*found) if found else torch.ones(shape, dtype=torch.bfloat16, device=device)
