"""What things take on a machine: rates and seconds that were probed, or are assumed and say so.

Times snap to a geometric grid when they are taken, so that small noise between two probes decides nothing: two
runs with the same cached costs plan and draft alike.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

_STEPS_PER_DOUBLING: Final = 16
"""Steps of the grid of snapped to the grid values: neighbours differ by 4.4 %."""


def snapped(value: float) -> float:
    """The nearest value of a geometric grid, printed short; 0 stays 0."""
    if value <= 0:
        return 0.0
    power = round(math.log2(value) * _STEPS_PER_DOUBLING) / _STEPS_PER_DOUBLING
    return float(f"{2.0**power:.4g}")


@dataclass(frozen=True, slots=True)
class RowTimes:
    """Seconds of a piece of work by the number of rows in it."""

    rows: tuple[int, ...]
    """Row counts that were timed, ascending."""
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        assert self.rows
        assert len(self.rows) == len(self.seconds)

    def at(self, rows: int) -> float:
        """Seconds for `rows` rows: straight lines between the counts that were timed, and on beyond them."""
        if rows <= self.rows[0] or len(self.rows) == 1:
            return self.seconds[0]
        right = min(bisect.bisect_left(self.rows, rows), len(self.rows) - 1)
        low, high = self.rows[right - 1], self.rows[right]
        share = (rows - low) / (high - low)
        return self.seconds[right - 1] + share * (self.seconds[right] - self.seconds[right - 1])

    def snapped(self) -> RowTimes:
        """The same on the grid, and never falling with more rows."""
        seconds: list[float] = []
        for value in self.seconds:
            seconds.append(max(snapped(value), seconds[-1] if seconds else 0.0))
        return RowTimes(self.rows, tuple(seconds))


def weighted_sum(parts: Sequence[tuple[float, RowTimes]]) -> RowTimes:
    """Times of several pieces one after another, each as often as its weight says."""
    rows = tuple(sorted({count for _, part in parts for count in part.rows}))
    return RowTimes(rows, tuple(sum(weight * part.at(count) for weight, part in parts) for count in rows))


@dataclass(frozen=True, slots=True)
class MachineCosts:
    """What the parts of a pass and of a draft step take on one machine for one model's shapes."""

    link_bytes_per_s: float
    """Rate at which streamed weights reach a slot: from disk on the CPU, from pinned memory on a GPU."""
    pageable_bytes_per_s: float
    """Rate of copies to a GPU from memory that is not pinned; on the CPU, where nothing is copied, the link's."""
    disk_bytes_per_s: float
    """Rate of direct reads; on the CPU the link itself."""
    target_layer: RowTimes
    """One layer of the target, its weights in device memory."""
    target_head: RowTimes
    substitute_layer: RowTimes
    """One layer of the draft made of its substitute."""
    shared_layer: RowTimes
    """One layer of the draft that is the target's own resident layer."""
    draft_head: RowTimes
    """The 16-bit head as the draft runs it."""
    low_bit_head: RowTimes
    """A 4-bit head as the draft runs it."""
    step_overhead_s: float
    """Batch and tree of one draft step, as far as it waits for the host."""
    origin: str
    """`measured` or `assumed`."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON and for the cache."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MachineCosts:
        """Undo `as_dict`; raises KeyError, TypeError, ValueError or AssertionError for anything else."""
        read: dict[str, Any] = {}
        for entry in dataclasses.fields(cls):
            value = values[entry.name]
            if entry.type == "RowTimes":
                value = RowTimes(
                    tuple(int(n) for n in value["rows"]), tuple(float(s) for s in value["seconds"])
                )
            elif entry.name != "origin":
                value = float(value)
            read[entry.name] = value
        return cls(**read)


@dataclass(frozen=True, slots=True)
class PlanCosts:
    """What one plan's passes and draft steps take."""

    link_s: float
    """Time of the link for the bytes of one pass."""
    compute: RowTimes
    """Computing of one target pass by its rows, weights at hand."""
    step: RowTimes
    """One draft step by its rows."""

    def pass_s(self, rows: int) -> float:
        """Seconds of a target pass: the link and the computing overlap."""
        return max(self.link_s, self.compute.at(rows))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)
