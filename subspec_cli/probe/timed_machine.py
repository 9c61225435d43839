"""What timing a machine gave, and whether the machine was left alone meanwhile."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from subspec_cli.planning.costs import MachineCosts

_MOST_OTHERS_SHARE: Final = 0.2
"""Largest share of the cores that others may take while costs are timed that are to be kept."""
_MOST_SPREAD: Final = 0.3
"""Largest excess of a usual repetition over the fastest one, as a share."""


@dataclass(frozen=True, slots=True)
class TimedMachine:
    """Costs with the circumstances under which they were timed."""

    costs: MachineCosts
    others_share: float | None
    """Share of the cores that others took; None if it is not known."""
    spread: float
    """Usual excess of a median repetition over the fastest one, as a share."""

    @property
    def trouble(self) -> str | None:
        """Why these costs are not those of the machine alone; None if nothing speaks against them."""
        if self.others_share is not None and self.others_share > _MOST_OTHERS_SHARE:
            return (
                f"the machine was busy while it was timed: others took {self.others_share:.0%} of its cores"
            )
        if self.spread > _MOST_SPREAD:
            return f"repetitions took {self.spread:.0%} more than the fastest while this machine was timed"
        return None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "costs": self.costs.as_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TimedMachine:
        """Read back `as_dict`."""
        return cls(**{**values, "costs": MachineCosts.from_dict(values["costs"])})


class Spread:
    """Medians of repetitions, and how far they were above the fastest ones."""

    def __init__(self) -> None:
        self._excesses: list[float] = []

    def median(self, seconds: Sequence[float]) -> float:
        """Return the median of the repetitions of one piece of work."""
        middle, least = statistics.median(seconds), min(seconds)
        if least > 0:
            self._excesses.append(middle / least - 1)
        return middle

    @property
    def usual(self) -> float:
        """The median excess over all pieces of work, as a share; 0 if there was none."""
        return statistics.median(self._excesses) if self._excesses else 0.0
