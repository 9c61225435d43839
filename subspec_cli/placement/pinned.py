"""Streaming from pinned host memory to a CUDA device: one copy per block on a stream of its own.

Two events per slot keep copies and kernels apart: *ready* (the copy is done, kernels may read) and *free* (the
last kernel that read the slot is done, the next copy may overwrite it).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from subspec_cli.placement.streamer import DTYPES, StreamCounters
from subspec_cli.store.direct_io import BlockLayout, DirectReader


class PinnedStreamer:
    """Holds the streamed blocks in pinned memory, one slab each, and copies them ahead of their use."""

    is_direct = True

    def __init__(self, layouts: Sequence[BlockLayout], slots: int, device: torch.device) -> None:
        assert slots >= 2
        self._layouts = tuple(layouts)
        self._slabs = _pinned_slabs(layouts)
        size_bytes = max(layout.buffer_bytes for layout in layouts)
        self._slots = [torch.empty(size_bytes, dtype=torch.uint8, device=device) for _ in range(slots)]
        self._ready = [torch.cuda.Event() for _ in range(slots)]
        self._free = [torch.cuda.Event() for _ in range(slots)]
        self._copy_stream = torch.cuda.Stream(device)
        self._device = device
        self._queued = 0
        self._used = 0
        self._counters = StreamCounters()
        # The slots' memory may have had another owner, whose last kernels are still on the current stream.
        self._copy_stream.wait_stream(torch.cuda.current_stream(device))
        self._fill()

    def blocks(self) -> Generator[dict[str, Tensor], None, None]:
        """One pass over all blocks; leaving early makes the next pass start at the first block again."""
        finished = 0
        try:
            for layout in self._layouts:
                slot = self._used % len(self._slots)
                started = time.perf_counter()
                torch.cuda.current_stream(self._device).wait_event(self._ready[slot])
                self._count(time.perf_counter() - started, 0)
                yield _views(layout, self._slots[slot])
                finished += 1
                self._free[slot].record(torch.cuda.current_stream(self._device))
                self._used += 1
                self._count(0.0, layout.tensor_bytes)
                self._fill()
        finally:
            if finished < len(self._layouts):
                self._restart()

    def counters(self) -> StreamCounters:
        """Totals so far."""
        return self._counters

    def close(self) -> None:
        """Wait for copies under way and give the memory back."""
        self._copy_stream.synchronize()
        self._slabs = ()
        self._slots = []

    def _fill(self) -> None:
        """Queue copies into every slot that is not in use."""
        while self._queued - self._used < len(self._slots):
            slot = self._queued % len(self._slots)
            slab = self._slabs[self._queued % len(self._slabs)]
            with torch.cuda.stream(self._copy_stream):
                # An event never recorded counts as done, so the first round does not wait.
                self._copy_stream.wait_event(self._free[slot])
                self._slots[slot][: slab.numel()].copy_(slab, non_blocking=True)
                self._ready[slot].record(self._copy_stream)
            self._queued += 1

    def _restart(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()
        self._copy_stream.synchronize()
        self._queued = self._used = 0
        self._fill()

    def _count(self, wait_time_s: float, streamed_bytes: int) -> None:
        old = self._counters
        self._counters = StreamCounters(
            old.wait_time_s + wait_time_s, old.streamed_bytes + streamed_bytes, old.read_time_s
        )


def _pinned_slabs(layouts: Sequence[BlockLayout]) -> tuple[Tensor, ...]:
    reader = DirectReader()
    try:
        slabs = []
        for layout in layouts:
            slab = torch.empty(layout.buffer_bytes, dtype=torch.uint8, pin_memory=True)
            reader.read_block(layout, memoryview(slab.numpy().data))
            slabs.append(slab)
        return tuple(slabs)
    finally:
        reader.close()


def _views(layout: BlockLayout, slot: Tensor) -> dict[str, Tensor]:
    return {
        item.entry.name: slot[item.buffer_offset : item.buffer_offset + item.entry.size_bytes]
        .view(DTYPES[item.entry.dtype])
        .view(item.entry.shape)
        for item in layout.placements
    }
