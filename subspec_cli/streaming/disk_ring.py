"""A ring of pinned buffers: layers that do not fit in host memory are read into it ahead of their copy to the GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from subspec_cli.streaming.layout import BlockLayout
from subspec_cli.streaming.pinned_memory import PinnedBuffer
from subspec_cli.streaming.read_ahead import ReadAhead


class DiskRing:
    """Pinned buffers; each is read into again once the copy out of it is done.

    `on_change` is called by the reader thread, without a lock, when a layer was read or reading has failed.
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
        self.reader = ReadAhead(layouts, len(buffers), self._writable, on_change)
        """Reads ahead; the owner of the ring starts, restarts and closes it."""

    def poll(self) -> Tensor | None:
        """The next layer's pinned bytes, `[buffer_bytes]` of uint8; None if it has not been read yet."""
        at = self.reader.poll()
        return None if at is None else self._buffers[at].tensor

    def release(self, copy_stream: torch.cuda.Stream) -> None:
        """Release the next layer's buffer; it is read into again after the latest copy on `copy_stream`."""
        at = self.reader.poll()
        assert at is not None
        # Recorded before the release: the reader thread may ask for the buffer at once.
        self._drained[at].record(copy_stream)
        self.reader.release()

    def _writable(self, at: int) -> memoryview:
        # The copy out of the buffer has been queued, but it may not be done.
        self._drained[at].synchronize()
        return self._buffers[at].view
