"""Layers that stay on disk, read into a few pinned buffers in turn, ahead of the copies to the GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from subspec_cli.streaming.layout import BlockLayout
from subspec_cli.streaming.pinned_memory import PinnedBuffer
from subspec_cli.streaming.read_ahead import ReadAhead


class DiskRing:
    """Pinned buffers, each of which is read into again once the copy out of it is done.

    `on_change` is called by the reader thread, without a lock, when a layer has come in or reading has failed.
    """

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        buffers: Sequence[PinnedBuffer],
        on_change: Callable[[], None],
    ) -> None:
        self._buffers = tuple(buffers)
        # A thread that waits for a blocking event sleeps; spinning would take a core from the kernels' launches.
        self._drained = [torch.cuda.Event(blocking=True) for _ in buffers]
        self.ahead = ReadAhead(layouts, len(buffers), self._writable, on_change)
        """The reader; the owner of the ring starts, restarts and closes it."""

    def poll(self) -> Tensor | None:
        """The next layer's pinned bytes, `[buffer_bytes]` of uint8; None if it has not been read yet."""
        at = self.ahead.poll()
        return None if at is None else self._buffers[at].tensor

    def release(self, copies: torch.cuda.Stream) -> None:
        """Free the next layer's buffer behind the copy out of it, which is the latest work on `copies`."""
        at = self.ahead.poll()
        assert at is not None
        # Recorded before the release: the reader thread may ask for the buffer at once.
        self._drained[at].record(copies)
        self.ahead.release()

    def _writable(self, at: int) -> memoryview:
        # The copy out of the buffer has been queued, but it may not be done.
        self._drained[at].synchronize()
        return self._buffers[at].view
