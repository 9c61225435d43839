"""A few threads that work off a list, for a main thread that waits, shows and may be interrupted."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

_MAX_THREADS = 4
_MAX_JOIN_S = 0.5
_POLL_S = 0.2


class Stopped(BaseException):
    """The command ends, so its threads do: no error, and caught by their loop alone."""


class WorkerChannel:
    """The line between a main thread and its workers: what they tell, and when they are to stop."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._told: deque[str] = deque()
        self._stop = threading.Event()

    def tell(self, text: str) -> None:
        """Note something for the user; from any thread."""
        self._told.append(text)

    def show(self) -> None:
        """Show what was told; from the main thread."""
        while self._told:
            self._show(self._told.popleft())

    def stop(self) -> None:
        """Have every worker stop at its next check."""
        self._stop.set()

    def check(self) -> None:
        """For workers: raises Stopped once they are to stop."""
        if self._stop.is_set():
            raise Stopped

    def pause(self, seconds: float) -> None:
        """For workers: wait; raises Stopped once they are to stop."""
        self._stop.wait(seconds)
        self.check()


class Workers:
    """Runs jobs in daemon threads: a silent connection keeps no command alive that was told to stop."""

    def __init__(self, jobs: Iterable[Callable[[], None]], channel: WorkerChannel) -> None:
        self._jobs = deque(jobs)
        self._left = len(self._jobs)
        self._channel = channel
        self._threads: list[threading.Thread] = []
        self._failure: BaseException | None = None
        self._changed = threading.Condition()

    def start(self) -> None:
        """Begin, the first jobs first; once."""
        if not self._threads:
            count = min(_MAX_THREADS, len(self._jobs))
            self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
            for thread in self._threads:
                thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Return when a job ends, or after the time: whether all have ended. Raises what a job failed with."""
        with self._changed:
            if self._failure is None and self._left:
                self._changed.wait(timeout_s)
        self._channel.show()
        if self._failure is not None:
            raise self._failure
        return not self._left

    def close(self) -> None:
        """Stop what is running."""
        self._channel.stop()
        deadline_s = time.monotonic() + _MAX_JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.popleft()
            except IndexError:
                return
            try:
                self._channel.check()
                job()
            except Stopped:
                return
            except BaseException as error:
                self._ended(error)
                return
            self._ended(None)

    def _ended(self, failure: BaseException | None) -> None:
        with self._changed:
            self._left -= 1
            if failure is not None:
                self._failure = self._failure or failure
                self._channel.stop()
            self._changed.notify_all()


def run_all(jobs: Iterable[Callable[[], None]], channel: WorkerChannel) -> None:
    """Run jobs to their end, showing what they tell; raises what the first one failed with."""
    workers = Workers(jobs, channel)
    workers.start()
    try:
        while not workers.wait(_POLL_S):
            pass
    except BaseException:
        workers.close()
        raise
