"""Layers that stay on disk, read into a few pinned buffers in turn, ahead of the copies to the card."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch

from subspec_cli.placement.pinned import PinnedBuffer
from subspec_cli.store.direct_io import BlockLayout, DirectReader


class DiskRing:
    """A reader thread and its buffers. The n-th layer ever read goes to buffer n modulo their number.

    `_read` counts layers in buffers or beyond, `_taken` those whose copy to the card has been queued; both only
    grow but for a restart, and `_read - _taken` never exceeds the number of buffers. What touches them holds
    `changed`, the owner's condition; `on_read` is called with it held, whenever a layer has come in.
    """

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        buffers: Sequence[PinnedBuffer],
        changed: threading.Condition,
        on_read: Callable[[], None],
    ) -> None:
        self._layouts = tuple(layouts)
        self._buffers = tuple(buffers)
        # A thread that waits for one sleeps: spinning would take a core from the kernels' launches.
        self._drained = [torch.cuda.Event(blocking=True) for _ in buffers]
        self._changed = changed
        self._on_read = on_read
        self._read = 0
        self._taken = 0
        self._epoch = 0
        self._closing = False
        self._reader = DirectReader()
        self.failure: BaseException | None = None
        """What ended the thread, for the consumer to raise."""
        self.read_time_s = 0.0
        """Time spent reading."""
        self._thread = threading.Thread(target=self._read_ahead, name="weight-reader", daemon=True)

    def start(self) -> None:
        """Begin to read; the owner is complete by now."""
        self._thread.start()

    @property
    def has_layer(self) -> bool:
        """Whether the next layer has been read."""
        return self._read > self._taken

    def take(self) -> tuple[PinnedBuffer, torch.cuda.Event]:
        """The next layer's buffer and the event to record behind the copy out of it."""
        assert self.has_layer
        at = self._taken % len(self._buffers)
        self._taken += 1
        self._changed.notify_all()
        return self._buffers[at], self._drained[at]

    def restart(self, copy_stream: torch.cuda.Stream) -> None:
        """Begin at the first layer again; copies that are queued in the stream may finish first."""
        for event in self._drained:
            event.record(copy_stream)
        # A read under way is dropped by its epoch.
        self._epoch += 1
        self._read = self._taken = 0
        self._changed.notify_all()

    def is_direct(self) -> bool:
        """Whether files are read past the page cache; waits for the first layer, which tells."""
        with self._changed:
            self._changed.wait_for(lambda: self.read_time_s > 0 or self.failure is not None or self._closing)
        return self._reader.is_direct

    def close(self) -> None:
        """Stop the thread and close the files."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _read_ahead(self) -> None:
        try:
            while self._read_next():
                continue
        except BaseException as error:  # handed to the consumer, which raises it
            with self._changed:
                self.failure = error
                self._changed.notify_all()
        finally:
            self._reader.close()

    def _read_next(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._read - self._taken < len(self._buffers))
            if self._closing:
                return False
            number, epoch = self._read, self._epoch
        at = number % len(self._buffers)
        # The copy of what the buffer holds was queued, which does not mean that it was made.
        self._drained[at].synchronize()
        started = time.perf_counter()
        self._reader.read_block(self._layouts[number % len(self._layouts)], self._buffers[at].view)
        with self._changed:
            self.read_time_s += time.perf_counter() - started
            if epoch == self._epoch:
                self._read += 1
                self._on_read()
            self._changed.notify_all()
        return True
