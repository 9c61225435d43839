"""What the target accepted of earlier drafts, level by level, and the survival that a plan may expect from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Final

from subspec_cli.limits import MOST_DEPTH
from subspec_cli.metrics import GenerationStats

LEAST_TOKENS: Final = 32
"""Tokens below which a survival says more about one answer than about the model."""
_MOST_LEVELS: Final = 4000.0
"""Levels that are remembered. Of older ones, as many are forgotten as newer ones come beyond them."""
_PRIOR_LEVELS: Final = 32.0
"""Weight of the assumed survival, in levels."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Counts over passes. Those of older runs fade, so they are no whole numbers."""

    tokens: float = 0.0
    """Tokens that the passes gave, bonus tokens included."""
    tried: tuple[float, ...] = ()
    """Entry d: passes in which the target accepted d tokens of a deeper tree, and so decided on one more level."""
    taken: tuple[float, ...] = ()
    """Entry d: of those, the ones in which it accepted one more token."""

    def survival(self, assumed: float) -> float:
        """Return the chance that one more level is accepted; few counts stay near what is assumed without any."""
        return (sum(self.taken) + _PRIOR_LEVELS * assumed) / (sum(self.tried) + _PRIOR_LEVELS)

    def then(self, newer: Acceptance) -> Acceptance:
        """Return the counts after a newer run; these here fade where both together are too many."""
        tried = sum(self.tried)
        keep = min(1.0, max(0.0, _MOST_LEVELS - sum(newer.tried)) / tried) if tried else 1.0
        return Acceptance(
            keep * self.tokens + newer.tokens,
            _sums(self.tried, newer.tried, keep),
            _sums(self.taken, newer.taken, keep),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"tokens": self.tokens, "tried": list(self.tried), "taken": list(self.taken)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Acceptance:
        """Read back `as_dict`; raises KeyError, TypeError or ValueError for anything else."""
        tokens, tried, taken = values["tokens"], tuple(values["tried"]), tuple(values["taken"])
        counts = (tokens, *tried, *taken)
        if not all(type(count) in (int, float) and 0 <= count < math.inf for count in counts):
            raise ValueError("no counts")
        if len(tried) > MOST_DEPTH or any(less > more for more, less in zip(tried, taken, strict=True)):
            raise ValueError("more levels taken than tried")
        return cls(tokens, tried, taken)


def acceptance_of(answers: Iterable[GenerationStats]) -> Acceptance:
    """Return the counts of some speculative answers."""
    total = Acceptance()
    for stats in answers:
        tried = stats.reached_by_depth[:MOST_DEPTH]
        taken = tuple(float(sum(stats.accepted_histogram[depth + 1 :])) for depth in range(len(tried)))
        one = Acceptance(float(max(0, stats.new_tokens - 1)), tuple(map(float, tried)), taken)
        total = total.then(one)
    return total


def _sums(older: tuple[float, ...], newer: tuple[float, ...], keep: float) -> tuple[float, ...]:
    return tuple(keep * old + new for old, new in zip_longest(older, newer, fillvalue=0.0))
