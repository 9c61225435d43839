"""Spreading the lines of a job over replicas that may die: none is lost, and none is answered twice. No Ray here."""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

from subspec_cli.errors import ResourceError
from subspec_cli.serving.batch import BatchProgress, unanswered
from subspec_cli.serving.job import Job, JobLine
from subspec_cli.serving.job_results import JobResults
from subspec_cli.serving.line_answers import LineResult
from subspec_cli.serving.replica import ReplicaFacts

MOST_LOSSES: Final = 3
"""Times that a replica may die without an answer, or replicas over one line, until the job ends."""
_CALLS: Final = 2
"""Calls that a replica has: it goes on with the second one while the results of the first are written."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A replica has loaded the model."""

    replica: int
    facts: ReplicaFacts


@dataclass(frozen=True, slots=True)
class Answered:
    """A replica hands out what is done, and asks for more."""

    replica: int
    results: tuple[LineResult, ...]
    in_flight: int = 0
    open_tokens: int = 0
    peak_memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Lost:
    """A replica died; what it held is not answered."""

    replica: int
    reason: str


Event = Ready | Answered | Lost


class Pool(Protocol):
    """Replicas by number. One that fails for a reason that any other would share raises that from `events`."""

    def start(self, replica: int) -> None:
        """Start a replica, or the one that takes the place of a dead one."""

    def work(self, replica: int, lines: list[JobLine], seed: int) -> None:
        """Hand lines to a replica that is ready, to be answered beside those that it holds. Each call is answered."""

    def events(self) -> list[Event]:
        """Return what has happened, after waiting a moment for it; maybe nothing."""


@dataclass(slots=True)
class _Replica:
    """What the dispatcher knows of one replica."""

    facts: ReplicaFacts | None = None
    """None while it loads the model."""
    held: dict[int, JobLine] = field(default_factory=dict)
    """Lines that it was given and has not answered, by their number."""
    calls: int = 0
    """Calls that it has not answered."""
    in_flight: int = 0
    open_tokens: int = 0
    losses: int = 0
    """Times that it died since it last answered a line."""


class Dispatcher:
    """Gives every line to one replica at a time, and to another one if that dies."""

    def __init__(self, pool: Pool, replicas: int, report: Callable[[BatchProgress], None]) -> None:
        self._pool = pool
        self._report = report
        self._replicas = [_Replica() for _ in range(replicas)]
        self._first: ReplicaFacts | None = None
        """Of the replica that was ready first, like which all must be."""
        self._returned: deque[JobLine] = deque()
        """Lines of dead replicas, which are given out first."""
        self._losses: Counter[int] = Counter()
        """Replicas that died over a line, by its number."""
        self.progress = BatchProgress(0, 0, wanted_replicas=replicas)
        self.peak_memory_bytes = 0
        """Most memory that a replica took beyond a bare process."""

    @property
    def about(self) -> ReplicaFacts:
        """What the first replica said, once it has loaded the model."""
        assert self._first is not None
        return self._first

    def start(self) -> ReplicaFacts:
        """Start all replicas; return what the first one says that has loaded the model."""
        for number in range(len(self._replicas)):
            self._pool.start(number)
        while self._first is None:
            self._handle_events()
        return self.about

    def run(self, job: Job, results: JobResults) -> None:
        """Answer every line whose record is not there yet. What is raised leaves whole records, and no others."""
        progress, seed = self.progress, int(results.identity["seed"])
        progress.lines, progress.known, progress.started_s = job.lines, results.done, time.monotonic()
        lines = unanswered(job, results)
        while self._is_open(lines):
            for number in range(len(self._replicas)):
                self._give(number, lines, seed)
            for result in self._handle_events():
                results.write(result.record)
                progress.add(result)
                self._report(progress)

    def _is_open(self, lines: Iterator[JobLine]) -> bool:
        """Whether a line is not answered. One that nobody has yet is taken to find out."""
        if self._returned or any(replica.held for replica in self._replicas):
            return True
        self._returned.extend(itertools.islice(lines, 1))
        return bool(self._returned)

    def _give(self, number: int, lines: Iterator[JobLine], seed: int) -> None:
        """Fill a replica up, and let it go on."""
        replica = self._replicas[number]
        if replica.facts is None:
            return
        free = most_held(replica.facts.parallel) - len(replica.held)
        given = [self._returned.popleft() for _ in range(min(free, len(self._returned)))]
        given += itertools.islice(lines, free - len(given))
        replica.held |= {line.number: line for line in given}
        while given or (replica.held and replica.calls < _CALLS):
            self._pool.work(number, given, seed)
            replica.calls += 1
            given = []

    def _handle_events(self) -> list[LineResult]:
        """Wait for what happens; return the lines that are done."""
        done: list[LineResult] = []
        for event in self._pool.events():
            match event:
                case Ready():
                    self._first = self._first or event.facts
                    event.facts.check_like(self._first)
                    self._replicas[event.replica].facts = event.facts
                case Answered():
                    done += self._taken(event)
                case Lost():
                    self._restart(event)
        progress, ready = self.progress, [each for each in self._replicas if each.facts]
        progress.replicas = len(ready)
        progress.in_flight = sum(each.in_flight for each in ready)
        progress.open_tokens = sum(each.open_tokens for each in ready)
        self._report(progress)
        return done

    def _taken(self, event: Answered) -> tuple[LineResult, ...]:
        replica = self._replicas[event.replica]
        replica.calls -= 1
        replica.in_flight, replica.open_tokens = event.in_flight, event.open_tokens
        self.peak_memory_bytes = max(self.peak_memory_bytes, event.peak_memory_bytes)
        for result in event.results:
            del replica.held[result.number]
            replica.losses = 0
        return event.results

    def _restart(self, event: Lost) -> None:
        before = self._replicas[event.replica]
        self._replicas[event.replica] = _Replica(losses=before.losses + 1)
        self._returned.extend(before.held.values())
        self._losses.update(before.held.keys())
        self.progress.restarts += 1
        hint = "the log of its node says why; a smaller --memory-gb or --parallel leaves it more room"
        if before.losses + 1 >= MOST_LOSSES:
            raise ResourceError(
                f"replica {event.replica + 1} died {MOST_LOSSES} times without an answer: {event.reason}",
                hint,
            )
        if (
            line := next((number for number in before.held if self._losses[number] >= MOST_LOSSES), None)
        ) is not None:
            raise ResourceError(f"{MOST_LOSSES} replicas died over line {line}: {event.reason}", hint)
        self._pool.start(event.replica)


def most_held(parallel: int) -> int:
    """Return the most lines that a replica holds: a quarter more than its places, so that none stays free."""
    return parallel + -(-parallel // 4)
