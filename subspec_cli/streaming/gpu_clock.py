"""Time that passes on a GPU, measured by the GPU itself: the host never waits to know it."""

from __future__ import annotations

from collections import deque

import torch


class GpuClock:
    """Adds up intervals between two points of a stream, once the GPU is past the second one."""

    def __init__(self) -> None:
        self._spare: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._running: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._total_s = 0.0

    def start(self, stream: torch.cuda.Stream) -> None:
        """An interval begins when the stream gets here; one that never ended is dropped."""
        self._collect()
        if self._running is None:
            timed = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._running = self._spare.pop() if self._spare else timed
        self._running[0].record(stream)

    def stop(self, stream: torch.cuda.Stream) -> None:
        """The interval ends when the stream gets here."""
        assert self._running is not None
        self._running[1].record(stream)
        self._pending.append(self._running)
        self._running = None

    def total_s(self) -> float:
        """Sum of the intervals that are over by now."""
        self._collect()
        return self._total_s

    def _collect(self) -> None:
        while self._pending and self._pending[0][1].query():
            begin, end = self._pending.popleft()
            self._total_s += begin.elapsed_time(end) / 1000
            self._spare.append((begin, end))
