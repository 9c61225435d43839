"""A few threads that run a list of jobs for a main thread, which waits, shows reports and may be interrupted."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from subspec_cli.reporter import Reporter

_MAX_THREADS = 4
_MAX_JOIN_S = 0.5
_POLL_S = 0.2


class Stopped(BaseException):
    """Ends a worker because the command ends. It is no error; only the workers' loop catches it."""


class WorkerChannel:
    """Between a main thread and its workers: their reports one way, the order to stop the other way."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._reports: deque[str] = deque()
        self._stop = threading.Event()

    def report(self, text: str) -> None:
        """Queue a line for the user. Usable from any thread."""
        self._reports.append(text)

    def show_reports(self) -> None:
        """Show the queued lines. Call it from the main thread."""
        while self._reports:
            self._reporter.note(self._reports.popleft())

    def stop(self) -> None:
        """Make every worker stop at its next check."""
        self._stop.set()

    def raise_if_stopped(self) -> None:
        """For workers: raise Stopped if `stop` was called."""
        if self._stop.is_set():
            raise Stopped

    def pause(self, seconds: float) -> None:
        """For workers: wait, and raise Stopped as soon as `stop` is called."""
        self._stop.wait(seconds)
        self.raise_if_stopped()


class Workers:
    """Runs jobs in daemon threads, so that a silent connection cannot keep an interrupted command alive."""

    def __init__(self, jobs: Iterable[Callable[[], None]], channel: WorkerChannel) -> None:
        self._jobs = deque(jobs)
        self._left = len(self._jobs)
        self._channel = channel
        self._threads: list[threading.Thread] = []
        self._failure: BaseException | None = None
        self._changed = threading.Condition()

    def start(self) -> None:
        """Start the jobs in order. Later calls do nothing."""
        if not self._threads:
            count = min(_MAX_THREADS, len(self._jobs))
            self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
            for thread in self._threads:
                thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait for a job to end, at most `timeout_s`. Returns whether all have ended; raises a failed job's error."""
        with self._changed:
            if self._failure is None and self._left:
                self._changed.wait(timeout_s)
        self._channel.show_reports()
        if self._failure is not None:
            raise self._failure
        return not self._left

    def close(self) -> bool:
        """Stop the jobs, and wait a moment for their threads. Returns whether all have ended."""
        self._channel.stop()
        deadline_s = time.monotonic() + _MAX_JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.popleft()
            except IndexError:
                return
            try:
                self._channel.raise_if_stopped()
                job()
            except Stopped:
                return
            except BaseException as error:
                self._record_end(error)
                return
            self._record_end(None)

    def _record_end(self, failure: BaseException | None) -> None:
        with self._changed:
            self._left -= 1
            if failure is not None:
                self._failure = self._failure or failure
                self._channel.stop()
            self._changed.notify_all()


def run_all(jobs: Iterable[Callable[[], None]], channel: WorkerChannel) -> None:
    """Run jobs to their end, and show their reports. Raises the error of the first job that failed."""
    workers = Workers(jobs, channel)
    workers.start()
    try:
        while not workers.wait(_POLL_S):
            pass
    except BaseException:
        workers.close()
        raise
