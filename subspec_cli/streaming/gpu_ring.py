"""Layers that stay on disk, read into a few pinned buffers in turn, ahead of the copies to the GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from subspec_cli.streaming.layout import BlockLayout
from subspec_cli.streaming.pinned_memory import PinnedBuffer
from subspec_cli.streaming.read_ahead import ReadAhead


class DiskRing:
    """Pinned buffers that are read into once the copies out of them are made.

    What takes a layer holds `changed`, the owner's condition; `on_read` is called with it held,
    whenever a layer has come in.
    """

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        buffers: Sequence[PinnedBuffer],
        changed: threading.Condition,
        on_read: Callable[[], None],
    ) -> None:
        self._buffers = tuple(buffers)
        # A thread that waits for one sleeps: spinning would take a core from the kernels' launches.
        self._drained = [torch.cuda.Event(blocking=True) for _ in buffers]
        self.ahead = ReadAhead(layouts, len(buffers), changed, self._free_buffer, on_read)
        """What reads; the owner starts, restarts and closes it."""

    def take(self) -> tuple[PinnedBuffer, torch.cuda.Event]:
        """The next layer's buffer and the event to record behind the copy out of it."""
        at = self.ahead.next_buffer
        self.ahead.let_go()
        return self._buffers[at], self._drained[at]

    def _free_buffer(self, at: int) -> memoryview:
        # The copy of what the buffer holds was queued, which does not mean that it was made.
        self._drained[at].synchronize()
        return self._buffers[at].view
