"""Blocks of 8-bit sources: streamed as they are stored, and widened to 16 bits when they are used.

A widened block is in one of a few regions of memory, which later blocks take over. Its tensors begin at multiples of
the page size, resident or streamed, since kernels may choose their code by alignment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial

import torch
from torch import Tensor

from subspec_cli.checkpoint.layer_tensors import LAYER_MATRICES, matrices_of, scale_name
from subspec_cli.checkpoint.widening import widen
from subspec_cli.files.direct_io import page_ceil
from subspec_cli.streaming.gpu_layers import page_aligned_memory
from subspec_cli.streaming.streamer import StreamCounters, Streamer


def widened_bytes(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> int:
    """Bytes of the memory that the matrices of a block take once they are widened; `shapes` may hold scales too."""
    sizes = (math.prod(shape) for name, shape in shapes.items() if name in LAYER_MATRICES)
    return sum(page_ceil(size * dtype.itemsize) for size in sizes)


def widen_block(stored: Mapping[str, Tensor], memory: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Widen or cast the matrices of a block to `dtype`, in `memory`: `[bytes]` of uint8 on the same device."""
    made, at = {}, 0
    for name in matrices_of(stored):
        tensor = stored[name]
        size_bytes = tensor.numel() * dtype.itemsize
        made[name] = memory[at : at + size_bytes].view(dtype).view(tensor.shape)
        at += page_ceil(size_bytes)
        if tensor.dtype == torch.float8_e4m3fn:
            widen(tensor, stored[scale_name(name)], made[name])
        else:
            made[name].copy_(tensor)
    return made


def widen_resident(stored: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Widen or cast the matrices of a block that stays, in memory of its own; one in `dtype` stays as it is."""
    if not needs_widening(stored, dtype):
        return dict(stored)
    size_bytes = widened_bytes({name: tensor.shape for name, tensor in stored.items()}, dtype)
    device = next(iter(stored.values())).device
    (memory,) = page_aligned_memory(1, size_bytes, device)
    return widen_block(stored, memory, dtype)


def needs_widening(stored: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
    """Whether any matrix of a block is of another type."""
    return any(tensor.dtype != dtype for tensor in stored.values())


class _WidenedBlock(Mapping[str, Tensor]):
    """The matrices of a block in 16 bits; the first access waits for the block and widens it."""

    def __init__(
        self, stored: Mapping[str, Tensor], make: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    ) -> None:
        self._stored = stored
        self._make = make
        self._made: dict[str, Tensor] | None = None

    def _tensors(self) -> dict[str, Tensor]:
        if self._made is None:
            self._made = self._make(self._stored)
        return self._made

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors())

    def __len__(self) -> int:
        return len(self._tensors())


class WidenedBlocks:
    """A streamer of blocks in `dtype` out of one whose blocks are partly in 8 bits.

    As many blocks may be held as there are regions. On a GPU the kernels that widen and those that use a region are
    on one stream, so they follow each other.
    """

    def __init__(
        self, source: Streamer, region_bytes: int, *, regions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._source = source
        self._dtype = dtype
        self._regions = page_aligned_memory(regions, page_ceil(region_bytes), device)

    @property
    def most_held(self) -> int:
        """Most blocks that may be held at once."""
        return min(self._source.most_held, len(self._regions))

    def blocks(self, parts: Sequence[int] = (1,)) -> Generator[Mapping[str, Tensor], None, None]:
        """One pass over all blocks, as `Streamer.blocks`."""
        assert max(parts) <= self.most_held
        with closing(self._source.blocks(parts)) as arriving:
            for number, stored in enumerate(arriving):
                memory = self._regions[number % len(self._regions)]
                yield _WidenedBlock(stored, partial(self._made, number, memory=memory))

    @property
    def reads_files(self) -> bool:
        """Whether blocks are read from files in every pass."""
        return self._source.reads_files

    @property
    def is_direct(self) -> bool:
        """Whether files are read past the page cache."""
        return self._source.is_direct

    def counters(self) -> StreamCounters:
        """Totals so far; bytes are those of the link, before widening."""
        return self._source.counters()

    def close(self) -> None:
        """Stop reading and free the memory."""
        self._source.close()
        self._regions = []

    def _made(self, number: int, stored: Mapping[str, Tensor], memory: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """The tensors of the block with this number in a pass."""
        return (
            widen_block(stored, memory, self._dtype) if needs_widening(stored, self._dtype) else dict(stored)
        )
