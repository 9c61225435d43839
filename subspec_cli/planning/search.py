"""Weighing the ways to fill a budget: every choice has a size and a predicted speed, whatever the budget.

Because the choices do not depend on the budget, a larger one has all those of a smaller one to choose from: it
is never predicted to be slower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from subspec_cli.planning.memory import Ledger
from subspec_cli.planning.request import Choice, PlanRequest
from subspec_cli.planning.timing import (
    DEPTHS,
    SHADOW_STEP_ROWS,
    STEP_ROWS,
    Cycle,
    Pace,
    best_pace,
    link_s,
    pace_of,
    pass_compute,
    step_times,
)

_MOST_OF_THE_OTHER_KIND: Final = 1
"""The best mix of shared and target-only layers lies at an end; one of the other kind may fill what is left."""
_SLOTS: Final = {"cpu": (2, 4, 5, 8), "cuda": (2, 3)}
"""Slot counts by device, where a slot is a block or a whole layer."""
_TWO_SLOTS_LOSS: Final = 1.02
"""With two slots the link stops whenever a block takes longer to use than to bring."""


class Candidate(NamedTuple):
    """A choice with its size and what it is predicted to give."""

    base_bytes: int
    """Of all lines, for a context of no tokens."""
    tok_per_s: float
    choice: Choice
    cycle: Cycle
    pace: Pace


@dataclass(frozen=True, slots=True)
class Step:
    """Draft steps by what they run through, and the slots that they would need."""

    ordinary_s: float
    shadow_s: float
    wanted_slots: int
    """Slots that keep the link busy through a step in its shadow."""


class Weigher:
    """Prices and times the choices of one request."""

    def __init__(self, request: PlanRequest, ledger: Ledger) -> None:
        self._request = request
        self._ledger = ledger
        self._plain, *others = paces(request)
        # Speculation is left off while it would lose, unless the user fixed its depth.
        self._drafted = others if request.fixed_depth else [self._plain, *others]
        self._slots = _SLOTS[request.device]
        self._steps: dict[tuple[int, int, str], Step] = {}

    def candidates(self) -> Iterator[Candidate]:
        """Every choice that can be made; none, if host memory holds not even a ring."""
        for drafts, head_bits, embedding in _kinds(self._request):
            for shared, target_only in self._pairs(drafts=drafts):
                # Elsewhere a copy of the table would take the place of layers, for a few microseconds a step.
                if embedding == "device" and shared + target_only < self._ledger.layers:
                    continue
                step = self._step(shared, head_bits, embedding)
                for slots in self._slot_counts(shared + target_only):
                    choice = Choice(shared, target_only, drafts, slots, head_bits, embedding)
                    if (pinned := self._ledger.pinned(choice)) is not None:
                        yield self._candidate(choice, step, *pinned)

    def _candidate(self, choice: Choice, step: Step, pinned: int, ring_slots: int) -> Candidate:
        cycle = self._cycle(choice, step, pinned, ring_slots)
        rate, pace = best_pace(cycle, self._drafted if choice.drafts else [self._plain])
        return Candidate(self._ledger.base_bytes(choice), rate, choice, cycle, pace)

    def _cycle(self, choice: Choice, step: Step, pinned: int, ring_slots: int) -> Cycle:
        request, ledger = self._request, self._ledger
        streamed = ledger.layers - choice.resident
        on_gpu = request.device == "cuda"
        time_s = link_s(request.costs, ledger.layer_bytes, streamed, streamed - pinned if on_gpu else 0)
        if choice.slots == self._slots[0]:
            time_s *= _TWO_SLOTS_LOSS
        if ring_slots:
            ahead_s = ring_slots * ledger.layer_bytes / request.costs.disk_bytes_per_s
        else:
            ahead_s = choice.slots * ledger.ahead_bytes / request.costs.link_bytes_per_s
        share = min(1.0, (choice.slots - 2) / (step.wanted_slots - 2)) if request.shadow_rows else 0.0
        return Cycle(time_s, ahead_s, step.ordinary_s, step.shadow_s, max(0.0, share))

    def _step(self, shared: int, head_bits: int, embedding: str) -> Step:
        key = (shared, head_bits, embedding)
        if key not in self._steps:
            self._steps[key] = self._timed_step(*key)
        return self._steps[key]

    def _timed_step(self, shared: int, head_bits: int, embedding: str) -> Step:
        costs = self._request.costs
        times = step_times(costs, self._request.geometry, shared, head_bits, embedding)
        shadow_s = times.at(SHADOW_STEP_ROWS)
        blocks = math.ceil(shadow_s * costs.link_bytes_per_s / self._ledger.slot_bytes)
        return Step(times.at(STEP_ROWS), shadow_s, min(max(3, blocks + 2), self._slots[-1]))

    def _pairs(self, *, drafts: bool) -> Iterator[tuple[int, int]]:
        """Numbers of shared and of target-only layers."""
        layers, wanted = self._ledger.layers, self._request.resident_layers
        for shared in range(layers + 1) if drafts else (0,):
            for target_only in range(layers + 1 - shared):
                resident = shared + target_only
                if wanted not in (None, resident):
                    continue
                # Without substitutes there is nothing that speculation would need, so all layers at once.
                if not drafts and resident < layers and self._request.substitute_bytes is not None:
                    continue
                if min(shared, target_only) <= _MOST_OF_THE_OTHER_KIND:
                    yield shared, target_only

    def _slot_counts(self, resident: int) -> Sequence[int]:
        return self._slots if resident < self._ledger.layers else (0,)


def paces(request: PlanRequest) -> tuple[Pace, ...]:
    """Plain decoding, and the depths to choose from: one only, if the user named it."""
    fixed = request.fixed_depth
    depths = (0, fixed) if fixed else (0, *(depth for depth in DEPTHS if depth < request.tree_nodes))
    compute = pass_compute(request.costs, request.geometry)
    return tuple(pace_of(depth, request.likely_survival, compute, request.tree_nodes) for depth in depths)


def _kinds(request: PlanRequest) -> Iterator[tuple[bool, int, str]]:
    """With a draft or without, its head, and the place of the embedding."""
    if request.geometry.tied_head:
        places: tuple[str, ...] = ("tied",)
    else:
        places = ("host", "device") if request.device == "cuda" else ("disk",)
    for place in places:
        yield False, 16, place
        if request.substitute_bytes is not None:
            yield True, 16, place
            yield True, 4, place
