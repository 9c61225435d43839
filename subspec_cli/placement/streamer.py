"""Streaming target weights: blocks of layers, in the order of use, through a few slots.

A reader thread runs ahead of the consumer and wraps around at the end of a pass, so while the draft runs every
slot fills with the first blocks of the next pass. Streaming is an iterator: `for block in streamer.blocks()`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from subspec_cli.store.direct_io import BlockLayout, DirectReader, allocate_buffer

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}


@dataclass(frozen=True, slots=True)
class StreamCounters:
    """Totals since the start; subtract two to get an interval."""

    wait_time_s: float = 0.0
    """Time the consumer waited for weights."""
    streamed_bytes: int = 0
    """Tensor bytes handed over."""
    read_time_s: float = 0.0
    """Time the link was busy."""

    def since(self, earlier: StreamCounters) -> StreamCounters:
        """Difference to an earlier reading."""
        return StreamCounters(
            self.wait_time_s - earlier.wait_time_s,
            self.streamed_bytes - earlier.streamed_bytes,
            self.read_time_s - earlier.read_time_s,
        )


class Streamer(Protocol):
    """Whatever moves streamed blocks to the device."""

    @property
    def is_direct(self) -> bool:
        """Whether files are read past the page cache."""
        ...

    def blocks(self) -> Generator[Mapping[str, Tensor], None, None]:
        """One pass: the tensors of each block by name, valid until the next one is asked for.

        Asking gives the last block's slot back at once; a block is waited for when a tensor of it is taken.
        """
        ...

    def counters(self) -> StreamCounters:
        """Totals so far."""
        ...

    def close(self) -> None:
        """Stop reading and give the memory back."""
        ...


def block_tensors(layout: BlockLayout, buffer: memoryview) -> dict[str, Tensor]:
    """Tensors of a block as views of its buffer, by full name."""
    return {
        item.entry.name: torch.frombuffer(
            buffer,
            dtype=DTYPES[item.entry.dtype],
            count=item.entry.size_bytes // DTYPES[item.entry.dtype].itemsize,
            offset=item.buffer_offset,
        ).view(item.entry.shape)
        for item in layout.placements
    }


def read_resident(layouts: Sequence[BlockLayout]) -> list[dict[str, Tensor]]:
    """Read blocks to stay, each in memory of its own, by the same path as streamed ones."""
    reader = DirectReader()
    try:
        held = []
        for layout in layouts:
            buffer = memoryview(allocate_buffer(layout.buffer_bytes))
            reader.read_block(layout, buffer)
            held.append(block_tensors(layout, buffer))
        return held
    finally:
        reader.close()


class _ArrivingBlock(Mapping[str, Tensor]):
    """A block by name, waited for when it is first looked at."""

    def __init__(self, layout: BlockLayout, wait: Callable[[], memoryview]) -> None:
        self._layout = layout
        self._wait = wait
        self._tensors: dict[str, Tensor] | None = None

    def wait(self) -> dict[str, Tensor]:
        """The tensors, once they are there."""
        if self._tensors is None:
            self._tensors = block_tensors(self._layout, self._wait())
        return self._tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.wait()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.wait())

    def __len__(self) -> int:
        return len(self._layout.placements)


class DiskStreamer:
    """Streams from the checkpoint's files into `slots` buffers of main memory.

    The n-th block ever read goes to slot n modulo `slots`. `_read` counts blocks in slots or beyond, `_used`
    blocks the consumer has let go of; both only grow, and `_read - _used <= slots` always.
    """

    def __init__(self, layouts: Sequence[BlockLayout], slots: int) -> None:
        assert slots >= 2
        assert layouts
        self._layouts = tuple(layouts)
        size_bytes = max(layout.buffer_bytes for layout in layouts)
        self._buffers = [memoryview(allocate_buffer(size_bytes)) for _ in range(slots)]
        self._changed = threading.Condition()
        self._read = 0
        self._used = 0
        self._epoch = 0
        self._closing = False
        self._failure: BaseException | None = None
        self._counters = StreamCounters()
        self._reader = DirectReader()
        self._thread = threading.Thread(target=self._read_ahead, name="weight-reader", daemon=True)
        self._thread.start()

    def blocks(self) -> Generator[Mapping[str, Tensor], None, None]:
        """One pass over all blocks; leaving early makes the next pass start at the first block again."""
        finished = 0
        try:
            for layout in self._layouts:
                block = _ArrivingBlock(layout, self._wait_for_block)
                yield block
                block.wait()
                finished += 1
                self._let_go(layout.tensor_bytes)
        finally:
            if finished < len(self._layouts):
                self._restart()

    def counters(self) -> StreamCounters:
        """Totals so far."""
        return self._counters

    @property
    def is_direct(self) -> bool:
        """Whether files are read past the page cache; waits for the first block, which tells."""
        with self._changed:
            self._changed.wait_for(lambda: self._read > 0 or self._failure is not None or self._closing)
        return self._reader.is_direct

    def close(self) -> None:
        """Stop the reader and give the buffers back."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._buffers.clear()

    def _wait_for_block(self) -> memoryview:
        started = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._read > self._used or self._failure is not None)
            if self._failure is not None:
                raise self._failure
            waited_s = time.perf_counter() - started
            self._count(wait_time_s=waited_s)
            return self._buffers[self._used % len(self._buffers)]

    def _let_go(self, tensor_bytes: int) -> None:
        with self._changed:
            self._used += 1
            self._count(streamed_bytes=tensor_bytes)
            self._changed.notify_all()

    def _restart(self) -> None:
        with self._changed:
            # What lies in the slots belongs to the abandoned pass; a read under way is dropped by its epoch.
            self._epoch += 1
            self._read = self._used = 0
            self._changed.notify_all()

    def _count(self, *, wait_time_s: float = 0.0, streamed_bytes: int = 0, read_time_s: float = 0.0) -> None:
        old = self._counters
        self._counters = StreamCounters(
            old.wait_time_s + wait_time_s, old.streamed_bytes + streamed_bytes, old.read_time_s + read_time_s
        )

    def _read_ahead(self) -> None:
        try:
            while self._read_next():
                continue
        except BaseException as error:  # handed to the consumer, which raises it
            with self._changed:
                self._failure = error
                self._changed.notify_all()
        finally:
            self._reader.close()

    def _read_next(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._read - self._used < len(self._buffers))
            if self._closing:
                return False
            number, epoch = self._read, self._epoch
        started = time.perf_counter()
        self._reader.read_block(
            self._layouts[number % len(self._layouts)], self._buffers[number % len(self._buffers)]
        )
        with self._changed:
            self._count(read_time_s=time.perf_counter() - started)
            if epoch == self._epoch:
                self._read += 1
                self._changed.notify_all()
        return True
