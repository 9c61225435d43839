"""Blocks that are streamed as residuals: rebuilt from the draft's 4-bit codes when they are used.

A rebuilt matrix has the address, modulo the page size, that it has as a resident matrix, since kernels may choose
their code by alignment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec_cli.checkpoint.packed_codes import CodedMatrix
from subspec_cli.checkpoint.residual import rebuild
from subspec_cli.checkpoint.residual_names import RESIDUAL_PARTS, parts_of
from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.files.direct_io import PAGE_BYTES, page_ceil
from subspec_cli.streaming.streamer import Streamer
from subspec_cli.streaming.widened_blocks import WidenedBlocks


@dataclass(frozen=True, slots=True)
class RebuiltMatrix:
    """A matrix that is rebuilt, and its place in the memory of its block."""

    coded: CodedMatrix
    offset: int

    def rebuild(self, name: str, stored: Mapping[str, Tensor], memory: Tensor) -> Tensor:
        """The matrix in bfloat16, written to its place in `memory`."""
        shape = self.coded.shape
        data = memory[self.offset : self.offset + 2 * math.prod(shape)]
        out = data.view(torch.bfloat16).view(shape)
        rebuild({part: stored[f"{name}.{part}"] for part in RESIDUAL_PARTS}, self.coded, out)
        return out


@dataclass(frozen=True, slots=True)
class BlockRecipe:
    """How a block's matrices are made of what is streamed; those that it does not name are streamed as they are."""

    rebuilt: Mapping[str, RebuiltMatrix]
    memory_bytes: int


def block_recipe(
    source: Sequence[TensorEntry], streamed: Sequence[TensorEntry], coded: Mapping[str, CodedMatrix]
) -> BlockRecipe:
    """The recipe of a block: `source` are its matrices in 16 bits, and `streamed` is what is read in their place."""
    names, made, end = {entry.name for entry in streamed}, {}, 0
    for entry in source:
        if parts_of(entry.name)[0] in names:
            offset = end + entry.offset_bytes % PAGE_BYTES
            made[entry.name] = RebuiltMatrix(coded[entry.name], offset)
            end = page_ceil(offset + entry.size_bytes)
    return BlockRecipe(made, end)


class RebuiltBlocks(WidenedBlocks):
    """A streamer of bfloat16 blocks out of one that brings residuals: one recipe for each block of a pass."""

    def __init__(
        self, source: Streamer, recipes: Sequence[BlockRecipe], *, regions: int, device: torch.device
    ) -> None:
        largest = max(recipe.memory_bytes for recipe in recipes)
        super().__init__(source, largest, regions=regions, dtype=torch.bfloat16, device=device)
        self._recipes = recipes

    def _made(self, number: int, stored: Mapping[str, Tensor], memory: Tensor) -> dict[str, Tensor]:
        rebuilt = self._recipes[number].rebuilt
        made = {name: matrix.rebuild(name, stored, memory) for name, matrix in rebuilt.items()}
        parts = {part for name in rebuilt for part in parts_of(name)}
        return {**{name: tensor for name, tensor in stored.items() if name not in parts}, **made}
