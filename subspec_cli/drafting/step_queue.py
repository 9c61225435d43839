"""Draft steps over the frontiers of several trees, read in the order in which they were started."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from heapq import merge
from itertools import groupby
from typing import NamedTuple

from subspec_cli.drafting.draft_steps import DraftSteps
from subspec_cli.drafting.frontier import Candidate, Frontier


class Choice(NamedTuple):
    """A candidate and its frontier's number among those that grow together."""

    number: int
    candidate: Candidate
    worth: float


def merged(offers: Iterable[tuple[Frontier, Sequence[Candidate]]]) -> list[Choice]:
    """Merge the candidates of some frontiers, likeliest first; each frontier's own stay in their order.

    An n-gram guess continues the row before it, so no candidate may overtake another of its frontier.
    """

    def descending(
        number: int, frontier: Frontier, rows: Sequence[Candidate]
    ) -> Iterator[tuple[float, Choice]]:
        least = float("inf")
        for row in rows:
            worth = frontier.worth(row)
            least = min(least, worth)
            yield -least, Choice(number, row, worth)

    streams = [descending(number, *offer) for number, offer in enumerate(offers)]
    return [choice for _, choice in merge(*streams, key=lambda item: item[0])]


class StepQueue:
    """Starts steps over chosen candidates of some frontiers, and hands each frontier what was found for it."""

    def __init__(self, steps: DraftSteps) -> None:
        self._steps = steps
        self._unread: deque[list[Frontier]] = deque()

    @property
    def is_drained(self) -> bool:
        """Whether no step is in flight."""
        return not self._unread

    def start(self, frontiers: Sequence[Frontier], choices: Sequence[Choice]) -> list[int]:
        """Start a step over the choices, then read the steps before it; return the numbers of its frontiers."""
        chosen = [
            (number, [choice.candidate for choice in rows])
            for number, rows in groupby(sorted(choices, key=_number), key=_number)
        ]
        self._steps.start([frontiers[number].prepare(rows) for number, rows in chosen])
        self._unread.append([frontiers[number] for number, _ in chosen])
        self._read_all_but(self._steps.ahead)
        return [number for number, _ in chosen]

    def drain(self) -> None:
        """Read all steps in flight."""
        self._read_all_but(0)

    def forget(self) -> None:
        """Drop the steps in flight: an interrupt ended their round."""
        self._unread.clear()

    def _read_all_but(self, ahead: int) -> None:
        while len(self._unread) > ahead:
            frontiers = self._unread.popleft()
            for frontier, found in zip(frontiers, self._steps.read(), strict=True):
                frontier.take(found)


def _number(choice: Choice) -> int:
    return choice.number
