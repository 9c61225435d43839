"""Elapsed time on a GPU, measured by its own events, so that the host never waits for a figure."""

from __future__ import annotations

from collections import deque

import torch


class GpuClock:
    """Sums intervals between two points of a stream; an interval counts once the GPU has passed its end."""

    def __init__(self) -> None:
        self._spare: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._running: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._total_s = 0.0

    def start(self, stream: torch.cuda.Stream) -> None:
        """Begin an interval at this point of the stream; an interval that was never stopped is dropped."""
        self._collect()
        if self._running is None:
            timed = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._running = self._spare.pop() if self._spare else timed
        self._running[0].record(stream)

    def stop(self, stream: torch.cuda.Stream) -> None:
        """End the interval at this point of the stream."""
        assert self._running is not None
        self._running[1].record(stream)
        self._pending.append(self._running)
        self._running = None

    def total_s(self) -> float:
        """Sum of the intervals that the GPU has finished."""
        self._collect()
        return self._total_s

    def _collect(self) -> None:
        while self._pending and self._pending[0][1].query():
            begin, end = self._pending.popleft()
            self._total_s += begin.elapsed_time(end) / 1000
            self._spare.append((begin, end))
