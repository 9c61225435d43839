"""Reading blocks from disk ahead of their use: a thread that goes round them, through a few buffers in turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from subspec_cli.files.direct_io import DirectReader
from subspec_cli.streaming.layout import BlockLayout


class ReadAhead:
    """A reader thread. The n-th block ever read goes to buffer n modulo `buffers`, their number.

    `_read` counts blocks in buffers or beyond, `_used` those that were let go of; both only grow but for a
    restart, and `_read - _used <= buffers` always. What touches them holds `changed`, the owner's condition.

    `free_buffer` gives the memory of a buffer that was let go of, once it may be overwritten; it may wait, and is
    called without the condition. `on_read` is called with it held, whenever a block has come in.
    """

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        buffers: int,
        changed: threading.Condition,
        free_buffer: Callable[[int], memoryview],
        on_read: Callable[[], None] = lambda: None,
    ) -> None:
        self._layouts = tuple(layouts)
        self._buffers = buffers
        self._changed = changed
        self._free_buffer = free_buffer
        self._on_read = on_read
        self._read = 0
        self._used = 0
        self._epoch = 0
        self._closing = False
        self._reader = DirectReader()
        self.failure: BaseException | None = None
        """What ended the thread, for the consumer to raise."""
        self.read_time_s = 0.0
        """Time spent reading."""
        self._thread = threading.Thread(target=self._read_on, name="weight-reader", daemon=True)

    def start(self) -> None:
        """Begin to read; the owner is complete by now."""
        self._thread.start()

    @property
    def has_block(self) -> bool:
        """Whether the next block has been read."""
        return self._read > self._used

    @property
    def next_buffer(self) -> int:
        """Which buffer the next block is in, or will be."""
        return self._used % self._buffers

    def let_go(self) -> None:
        """The next block is done with: the one after it is next, and its buffer is read into again."""
        assert self.has_block
        self._used += 1
        self._changed.notify_all()

    def restart(self) -> None:
        """Begin at the first block again."""
        # What lies in the buffers belongs to the abandoned pass; a read under way is dropped by its epoch.
        self._epoch += 1
        self._read = self._used = 0
        self._changed.notify_all()

    def is_direct(self) -> bool:
        """Whether files are read past the page cache; waits for the first block, which tells."""
        with self._changed:
            self._changed.wait_for(lambda: self.read_time_s > 0 or self.failure is not None or self._closing)
        return self._reader.is_direct

    def close(self) -> None:
        """Stop the thread and close the files."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _read_on(self) -> None:
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
            self._changed.wait_for(lambda: self._closing or self._read - self._used < self._buffers)
            if self._closing:
                return False
            number, epoch = self._read, self._epoch
        buffer = self._free_buffer(number % self._buffers)
        started = time.perf_counter()
        self._reader.read_extents(self._layouts[number % len(self._layouts)].extents, buffer)
        with self._changed:
            self.read_time_s += time.perf_counter() - started
            if epoch == self._epoch:
                self._read += 1
                self._on_read()
            self._changed.notify_all()
        return True
