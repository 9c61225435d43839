"""Timing callables and the link: medians of a few runs. Knows no model."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Final

import torch

from subspec_cli.files.direct_io import DirectReader, allocate_buffer
from subspec_cli.planning.costs import RowTimes, snapped
from subspec_cli.streaming.layout import BlockLayout

_LINK_S: Final = 0.7
"""Time spent on measuring the link."""
_REPEATS: Final = 5
_MOST_ROUNDS: Final = 3
"""Most times that each block of a small model is read."""
_COPY_BYTES: Final = 256 << 20


def time_rows(
    work: Callable[[int], object],
    row_counts: Sequence[int],
    *,
    finish: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    typical: Callable[[Sequence[float]], float] = statistics.median,
) -> RowTimes:
    """Time `work(rows)` for each count, in seconds: what is typical of a few runs after one that is not counted.

    `finish` waits for work that was only queued.
    """
    found = []
    for rows in row_counts:
        seconds = []
        for _ in range(_REPEATS + 1):
            started = clock()
            work(rows)
            finish()
            seconds.append(clock() - started)
        found.append(typical(seconds[1:]))
    return RowTimes(tuple(row_counts), tuple(found))


def disk_rate(layouts: Sequence[BlockLayout], *, seconds: float = _LINK_S) -> float:
    """Measure bytes per second of reading blocks one after another, past the page cache if the system allows it."""
    reader, done_bytes, blocks = DirectReader(), 0, _MOST_ROUNDS * len(layouts)
    buffer = memoryview(allocate_buffer(max(layout.buffer_bytes for layout in layouts)))
    started = time.perf_counter()
    try:
        for layout in islice(cycle(layouts), blocks):
            reader.read_extents(layout.extents, buffer)
            done_bytes += layout.tensor_bytes
            if time.perf_counter() - started >= seconds:
                break
        return snapped(done_bytes / (time.perf_counter() - started))
    finally:
        reader.close()


class Reading:
    """Reads blocks in the background and measures the rate."""

    def __init__(self, layouts: Sequence[BlockLayout]) -> None:
        self._layouts = layouts
        self._stop = threading.Event()
        self._done_bytes = 0
        self._busy_s = 0.0

    @property
    def bytes_per_s(self) -> float:
        """Rate so far in bytes per second; 0 before the first block."""
        return snapped(self._done_bytes / self._busy_s) if self._busy_s else 0.0

    def run(self) -> None:
        """Read until `stop` is called; at least one block."""
        reader = DirectReader()
        buffer = memoryview(allocate_buffer(max(layout.buffer_bytes for layout in self._layouts)))
        try:
            for layout in cycle(self._layouts):
                started = time.perf_counter()
                reader.read_extents(layout.extents, buffer)
                self._busy_s += time.perf_counter() - started
                self._done_bytes += layout.tensor_bytes
                if self._stop.is_set():
                    return
        finally:
            reader.close()

    def stop(self) -> None:
        """End the reading after the block in flight."""
        self._stop.set()


@contextmanager
def reading(layouts: Sequence[BlockLayout]) -> Iterator[Reading]:
    """Read blocks in the background, as in a pass: link and computing share cores and memory."""
    read = Reading(layouts)
    thread = threading.Thread(target=read.run, name="probe-reader", daemon=True)
    thread.start()
    try:
        yield read
    finally:
        read.stop()
        thread.join()


def copy_rate(device: torch.device, *, pinned: bool) -> float:
    """Measure bytes per second of copies from host memory to a GPU, snapped to the grid."""
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)

    def finish() -> None:
        torch.cuda.synchronize(device)

    copies = time_rows(lambda _rows: target.copy_(source, non_blocking=True), (1,), finish=finish)
    return snapped(_COPY_BYTES / copies.seconds[0])
