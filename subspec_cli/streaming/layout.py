"""The layout of a block's tensors in a buffer: file extents that are read with few requests.

The address of a tensor is always congruent to its file offset modulo 4096. Kernels that select their code by
pointer alignment thus see the same alignment for resident and for streamed weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.files.direct_io import PAGE_BYTES, Extent, page_ceil


@dataclass(frozen=True, slots=True)
class Placement:
    """The place of one tensor in the buffer of its block."""

    entry: TensorEntry
    buffer_offset: int


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """The extents of one block and the tensors in them; made once, read many times."""

    extents: tuple[Extent, ...]
    placements: tuple[Placement, ...]
    buffer_bytes: int
    """Size of the buffer, a multiple of the page size."""

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors, without the gaps between them."""
        return sum(item.entry.size_bytes for item in self.placements)


def layout_block(entries: Iterable[TensorEntry]) -> BlockLayout:
    """Lay out tensors so that neighbours in a file are read with one request."""
    extents: list[Extent] = []
    placements: list[Placement] = []
    run: list[TensorEntry] = []
    position = 0

    def close_run() -> None:
        nonlocal position
        first = run[0].offset_bytes // PAGE_BYTES * PAGE_BYTES
        end = run[-1].offset_bytes + run[-1].size_bytes
        extents.append(Extent(run[0].path, first, end - first, position))
        placements.extend(Placement(entry, position + entry.offset_bytes - first) for entry in run)
        position += page_ceil(end - first)
        run.clear()

    for entry in sorted(entries, key=lambda item: (str(item.path), item.offset_bytes)):
        if run and (
            entry.path != run[0].path or entry.offset_bytes != run[-1].offset_bytes + run[-1].size_bytes
        ):
            close_run()
        run.append(entry)
    if run:
        close_run()
    return BlockLayout(tuple(extents), tuple(placements), position)
