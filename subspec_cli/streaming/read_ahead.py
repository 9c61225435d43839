"""Reading blocks from disk ahead of their use: a thread that reads pass after pass into a few buffers."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from subspec_cli.files.direct_io import DirectReader
from subspec_cli.streaming.layout import BlockLayout
from subspec_cli.streaming.streamer import StreamCounters


class ReadAhead:
    """A reader thread and the state of its buffers, under a lock that no other class takes.

    Each buffer is free, being read into, or full. The consumer gets full buffers in the order of reading (`take`
    or `poll`), and a buffer stays full until `release`. One thread at a time may consume.

    `writable` returns the memory of a free buffer once it may be overwritten; it may wait. `on_change` is called
    after every block that was read, and when reading has failed. The reader thread calls both without the lock, so
    they may take other locks and call any method of this class.
    """

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        buffers: int,
        writable: Callable[[int], memoryview],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._layouts = tuple(layouts)
        self._buffers = buffers
        self._writable = writable
        self._on_change = on_change
        self._changed = threading.Condition()
        self._free = deque(range(buffers))
        self._reading: int | None = None
        self._full: deque[tuple[int, int]] = deque()
        """Number of the block and its buffer, oldest first; numbers keep counting from one pass to the next."""
        self._read = 0
        """Blocks read since the start or the last restart."""
        self._epoch = 0
        self._closing = False
        self._failure: BaseException | None = None
        self._counters = StreamCounters()
        self._reader = DirectReader()
        self._thread = threading.Thread(target=self._run, name="weight-reader", daemon=True)

    def start(self) -> None:
        """Begin to read; from now on `writable` and `on_change` are called."""
        self._thread.start()

    def take(self, place: int = 0) -> int:
        """Wait for a block and return its buffer; raises the error that ended the thread, on every call.

        `place` counts blocks that were not released, oldest first.
        """
        started = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: len(self._full) > place or self._failure is not None)
            if self._failure is not None:
                raise self._failure
            self._counters += StreamCounters(wait_time_s=time.perf_counter() - started)
            return self._full[place][1]

    def poll(self) -> int | None:
        """The buffer of the next block; None if the block has not been read yet."""
        with self._changed:
            return self._full[0][1] if self._full else None

    def release(self) -> None:
        """Free the buffer of the oldest block, which has been used; the block after it is the oldest."""
        with self._changed:
            number, at = self._full.popleft()
            self._free.append(at)
            self._counters += StreamCounters(streamed_bytes=self._layout(number).tensor_bytes)
            self._changed.notify_all()

    def restart(self) -> None:
        """Drop what has been read for the abandoned pass and read from the first block again."""
        with self._changed:
            # A read in flight belongs to the old epoch and is dropped when it ends.
            self._epoch += 1
            self._read = 0
            self._full.clear()
            # The free buffers are listed from scratch, because an interrupt may have cut a release short.
            self._free = deque(at for at in range(self._buffers) if at != self._reading)
            self._changed.notify_all()

    def counters(self) -> StreamCounters:
        """Totals so far: time in `take`, tensor bytes of released blocks, time spent reading."""
        with self._changed:
            return self._counters

    @property
    def failure(self) -> BaseException | None:
        """The error that ended the thread."""
        with self._changed:
            return self._failure

    def is_direct(self) -> bool:
        """Whether files are read past the page cache; waits for the first block, which shows it."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._counters.read_time_s > 0 or self._failure is not None or self._closing
            )
        return self._reader.is_direct

    def close(self) -> None:
        """Stop the thread, after the read in flight, and close the files."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def check_integrity(self) -> None:
        """Assert that every buffer has exactly one state and that full ones hold the latest blocks in order."""
        with self._changed:
            reading = [] if self._reading is None else [self._reading]
            buffers = [*self._free, *reading, *(at for _, at in self._full)]
            assert sorted(buffers) == list(range(self._buffers)), (
                f"buffers that are free, being read into or full: {buffers}"
            )
            numbers = [number for number, _ in self._full]
            latest = list(range(self._read - len(numbers), self._read))
            assert numbers == latest, f"blocks {numbers} are held, expected {latest}"
            assert not numbers or numbers[0] >= 0, "more blocks are held than were read"
            counters = self._counters
            assert min(counters.wait_time_s, counters.streamed_bytes, counters.read_time_s) >= 0

    def _layout(self, number: int) -> BlockLayout:
        return self._layouts[number % len(self._layouts)]

    def _run(self) -> None:
        try:
            while (begun := self._begin_read()) is not None:
                number, at, epoch = begun
                buffer = self._writable(at)
                started = time.perf_counter()
                self._reader.read_extents(self._layout(number).extents, buffer)
                if self._finish_read(epoch, time.perf_counter() - started):
                    self._on_change()
        except BaseException as error:  # handed to the consumer, which raises it
            with self._changed:
                self._failure = error
                self._changed.notify_all()
            self._on_change()
        finally:
            self._reader.close()

    def _begin_read(self) -> tuple[int, int, int] | None:
        """Wait for a free buffer; return the block to read, the buffer and the epoch, or None when closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or bool(self._free))
            if self._closing:
                return None
            self._reading = self._free.popleft()
            return self._read, self._reading, self._epoch

    def _finish_read(self, epoch: int, read_time_s: float) -> bool:
        """Mark the buffer as full; free it and return False if the pass was abandoned during the read."""
        with self._changed:
            assert self._reading is not None
            at, self._reading = self._reading, None
            self._counters += StreamCounters(read_time_s=read_time_s)
            is_current = epoch == self._epoch
            if is_current:
                self._full.append((self._read, at))
                self._read += 1
            else:
                self._free.appendleft(at)
            self._changed.notify_all()
            return is_current
