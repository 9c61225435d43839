"""What things cost on a machine: rates and seconds that were measured, or are assumed and say so.

Times snap to a geometric grid when they are measured. Then small noise between two probes decides nothing, and runs
plan and draft alike. Layers are timed with a few cached rows; attention adds time in proportion to the further ones.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

CostOrigin = Literal["measured", "assumed"]
BASE_CACHED_ROWS: Final = 256
"""Cached rows that attention reads where layers are timed."""
ATTENTION_ROWS: Final = 1024
"""Cached rows beyond those, of which the attention times are the seconds."""
LINK_MARGIN: Final = 0.75
"""Share of a pass's link time that computing is planned to fill. A link that is faster than when it was probed must
not wait: a shadow step that delays the pass costs several times what it can save."""
_GRID_PER_DOUBLING: Final = 16
"""Grid points per factor of two: neighbours differ by 4.4 %."""


def snapped(value: float) -> float:
    """Return the nearest value of a geometric grid, in four digits; 0 stays 0."""
    if value <= 0:
        return 0.0
    power = round(math.log2(value) * _GRID_PER_DOUBLING) / _GRID_PER_DOUBLING
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
        """Return the seconds for `rows` rows: linear between the counts that were timed, and extrapolated beyond."""
        if rows <= self.rows[0] or len(self.rows) == 1:
            return self.seconds[0]
        right = min(bisect.bisect_left(self.rows, rows), len(self.rows) - 1)
        low, high = self.rows[right - 1], self.rows[right]
        share = (rows - low) / (high - low)
        return self.seconds[right - 1] + share * (self.seconds[right] - self.seconds[right - 1])

    def snapped(self) -> RowTimes:
        """Return these times on the grid, and never less for more rows."""
        seconds: list[float] = []
        for value in self.seconds:
            seconds.append(max(snapped(value), seconds[-1] if seconds else 0.0))
        return RowTimes(self.rows, tuple(seconds))


def attention_weight(cached_rows: float) -> float:
    """Return how often the attention times are added for so many cached rows; fewer than the base cost no less."""
    return max(0.0, cached_rows - BASE_CACHED_ROWS) / ATTENTION_ROWS


def attention_times(short: RowTimes, long: RowTimes, further_rows: int) -> RowTimes:
    """Return what 1,024 more cached rows add, from times that differ by `further_rows` of them; never negative."""
    seconds = (
        max(0.0, more - less) * ATTENTION_ROWS / further_rows
        for less, more in zip(short.seconds, long.seconds, strict=True)
    )
    return RowTimes(short.rows, tuple(seconds))


def weighted_sum(parts: Sequence[tuple[float, RowTimes]]) -> RowTimes:
    """Return the times of several pieces run in sequence, each as often as its weight says."""
    rows = tuple(sorted({count for _, part in parts for count in part.rows}))
    return RowTimes(rows, tuple(sum(weight * part.at(count) for weight, part in parts) for count in rows))


@dataclass(frozen=True, slots=True)
class MachineCosts:
    """Times of the parts of a pass and of a draft step, on one machine for one model's shapes."""

    link_bytes_per_s: float
    """Rate at which streamed weights reach a slot: from disk on the CPU, from pinned memory on a GPU."""
    pageable_bytes_per_s: float
    """Rate of copies to a GPU from memory that is not pinned; on the CPU, which copies nothing, the link's rate."""
    disk_bytes_per_s: float
    """Rate of direct reads; on the CPU it is the link's rate."""
    target_layer: RowTimes
    """One layer of the target, its weights in device memory."""
    target_head: RowTimes
    substitute_layer: RowTimes
    """One layer of the draft that runs a substitute."""
    shared_layer: RowTimes
    """One layer of the draft that runs the target's own resident layer."""
    draft_head: RowTimes
    """The 16-bit head as the draft runs it."""
    low_bit_head: RowTimes
    """A 4-bit head as the draft runs it."""
    target_attention: RowTimes
    """What 1,024 more cached rows add to one layer of the target."""
    draft_attention: RowTimes
    """What 1,024 more cached rows add to one layer of the draft."""
    step_overhead_s: float
    """Host work of one draft step, on its batch and its tree, while the step waits for it."""
    origin: CostOrigin
    widen_bytes_per_s: float = 0.0
    """Rate at which streamed weights of fewer bits become 16 bits, in streamed bytes; 0 where none are."""
    rebuild_bytes_per_s: float = 0.0
    """Rate at which 16-bit weights are rebuilt from residuals, in bytes of 16 bits; 0 where none are prepared."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON and for the cache."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MachineCosts:
        """Read back `as_dict`; raises KeyError, TypeError, ValueError or AssertionError for anything else."""
        read: dict[str, Any] = {}
        for entry in dataclasses.fields(cls):
            if entry.default is not dataclasses.MISSING and entry.name not in values:
                continue  # kept before this was timed
            value = values[entry.name]
            if entry.type == "RowTimes":
                value = _row_times(value)
            elif entry.name != "origin":
                value = float(value)
            elif value not in get_args(CostOrigin):
                raise ValueError(f"no origin of costs: {value!r}")
            read[entry.name] = value
        return cls(**read)


def _row_times(value: Mapping[str, Any]) -> RowTimes:
    seconds = tuple(float(s) for s in value["seconds"])
    if not all(0 <= s < math.inf for s in seconds):
        raise ValueError(f"no times: {seconds}")
    return RowTimes(tuple(int(n) for n in value["rows"]), seconds)


def overlapped_s(link_s: float, computed_s: float) -> float:
    """Return the seconds of a pass whose link and compute overlap: the longer of them, and a part of the other.

    Blocks take now longer to arrive, now to compute, and a few slots do not even that out. The cube root of the sum
    of cubes is fitted to measured passes: 1.455 s of link and 0.58 of compute took 1.49, 0.83 and 0.75 took 1.03.
    """
    longer, shorter = max(link_s, computed_s), max(0.0, min(link_s, computed_s))
    return longer if shorter == 0 else longer * math.cbrt(1 + (shorter / longer) ** 3)


def arrival_s(link_s: float, prefetch_s: float, drafted_s: float) -> float:
    """Return the seconds until all weights of a pass are there, of which the slots took some while the draft ran."""
    return max(0.0, link_s - min(prefetch_s, drafted_s))


@dataclass(frozen=True, slots=True)
class PlanCosts:
    """Times of one plan's passes and draft steps, by their rows and by the cached rows that they read."""

    link_s: float
    """Link time for the bytes of one pass."""
    compute: RowTimes
    """Compute time of one target pass by its rows, without waiting for weights, at `BASE_CACHED_ROWS`."""
    step: RowTimes
    """One draft step by its rows, at `BASE_CACHED_ROWS`."""
    pass_attention: RowTimes
    """What 1,024 more cached rows add to a pass."""
    step_attention: RowTimes
    """What 1,024 more cached rows add to a draft step."""
    prefetch_s: float = 0.0
    """Link time of what all slots hold. It passes while the draft runs before a pass."""

    def compute_s(self, rows: int, cached_rows: float) -> float:
        """Return the seconds that a target pass computes."""
        return self.compute.at(rows) + attention_weight(cached_rows) * self.pass_attention.at(rows)

    def arrival_s(self, drafted_s: float) -> float:
        """Return the seconds until all weights of a pass are there that begins after drafting for so long."""
        return arrival_s(self.link_s, self.prefetch_s, drafted_s)

    def pass_s(self, rows: int, cached_rows: float, drafted_s: float = 0.0) -> float:
        """Return the seconds of a target pass that begins after drafting for so long."""
        return overlapped_s(self.arrival_s(drafted_s), self.compute_s(rows, cached_rows))

    def step_at(self, cached_rows: float) -> RowTimes:
        """Return the times of a draft step over so many cached rows."""
        return weighted_sum([(1, self.step), (attention_weight(cached_rows), self.step_attention)])

    def step_s(self, rows: int, cached_rows: float) -> float:
        """Return the seconds of a draft step."""
        return self.step.at(rows) + attention_weight(cached_rows) * self.step_attention.at(rows)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)
