"""Layers on a GPU: all blocks of a layer are contiguous, so that one copy transfers the layer.

A tensor keeps its file offset modulo 4096 in host memory and on the GPU, resident or streamed. Kernels that
select their code by pointer alignment thus see the same alignment wherever a layer lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec_cli.checkpoint.dtypes import torch_dtype
from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.files.direct_io import PAGE_BYTES, DirectReader, allocate_buffer
from subspec_cli.streaming.layout import BlockLayout, Placement, layout_block


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """The memory layout of a whole layer, and the tensors of each of its blocks."""

    whole: BlockLayout
    blocks: tuple[tuple[Placement, ...], ...]
    """In the order of use."""


def layout_layer(blocks: Sequence[Sequence[TensorEntry]]) -> LayerLayout:
    """Lay out the blocks of one layer together."""
    whole = layout_block(entry for block in blocks for entry in block)
    placed = {item.entry.name: item for item in whole.placements}
    return LayerLayout(whole, tuple(tuple(placed[entry.name] for entry in block) for block in blocks))


def tensors_in(memory: Tensor, placements: Iterable[Placement]) -> dict[str, Tensor]:
    """Tensors by name, as views of `memory`: the `[bytes]` of uint8 that hold their layer."""
    return {item.entry.name: _tensor_in(memory, item) for item in placements}


def _tensor_in(memory: Tensor, item: Placement) -> Tensor:
    data, dtype = (
        memory[item.buffer_offset : item.buffer_offset + item.entry.size_bytes],
        torch_dtype(item.entry.dtype),
    )
    # Scales may follow an odd number of codes in a file. They are small.
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(item.entry.shape)


def page_aligned_memory(pieces: int, piece_bytes: int, device: torch.device) -> list[Tensor]:
    """Pieces of GPU memory, `[piece_bytes]` of uint8 each, at addresses that are multiples of the page size.

    `piece_bytes` is a multiple of the page size. All pieces are one allocation, a page larger than their sum.
    """
    whole = torch.empty(pieces * piece_bytes + PAGE_BYTES, dtype=torch.uint8, device=device)
    first = -whole.data_ptr() % PAGE_BYTES
    return [whole[first + n * piece_bytes : first + (n + 1) * piece_bytes] for n in range(pieces)]


def read_resident_layer(layout: LayerLayout, device: torch.device) -> list[dict[str, Tensor]]:
    """Read a layer that stays on the GPU, in one allocation; returns the tensors of each block."""
    reader = DirectReader()
    try:
        buffer = memoryview(allocate_buffer(layout.whole.buffer_bytes))
        reader.read_extents(layout.whole.extents, buffer)
    finally:
        reader.close()
    (memory,) = page_aligned_memory(1, layout.whole.buffer_bytes, device)
    memory.copy_(torch.frombuffer(buffer, dtype=torch.uint8, count=layout.whole.buffer_bytes))
    return [tensors_in(memory, block) for block in layout.blocks]
