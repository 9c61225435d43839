"""Of the changes that a user could make, the one that is predicted to help most. `cli/plan_text.py` words it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

from subspec_cli.errors import ResourceError
from subspec_cli.planning.plan import OffloadPlan, make_plan
from subspec_cli.planning.request import PlanRequest, usual_contexts
from subspec_cli.units import GIB

LEAST_GAIN: Final = 0.03
"""Gains below this share are not worth a change."""


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that could be different."""

    what: Literal["budget", "link", "context", "ram", "bits"]
    request: PlanRequest
    """The request with this change."""
    added_bytes: int = 0
    """Memory beyond the present budget or limit."""

    @property
    def is_hardware(self) -> bool:
        """Whether it takes more than another flag."""
        return self.what == "link"


@dataclass(frozen=True, slots=True)
class Gain:
    """A change with what it is predicted to give."""

    change: Change
    tok_per_s: float


@dataclass(frozen=True, slots=True)
class Advice:
    """What would help most."""

    tok_per_s: float
    """Prediction of the plan as it is."""
    needs_nothing: bool
    """Whether the whole model fits and nothing is streamed."""
    best: Gain | None = None
    """None if no change that was tried helps enough."""
    best_setting: Gain | None = None
    """The best change by a flag, where `best` is hardware."""


def advise(request: PlanRequest, plan: OffloadPlan, others: tuple[PlanRequest, ...] = ()) -> Advice:
    """Return what would help most; `others` are the same request with substitutes of other bits."""
    now = plan.prediction.tok_per_s
    advice = Advice(now, needs_nothing=plan.fits and not plan.streamed)
    gains = []
    for change in (*_changes(request, plan), *(Change("bits", other) for other in others)):
        try:
            rate = make_plan(change.request).prediction.tok_per_s
        except ResourceError:
            continue
        if rate > now * (1 + LEAST_GAIN):
            gains.append(Gain(change, rate))
    if not gains:
        return advice
    best = max(gains, key=lambda item: item.tok_per_s)
    settings = [item for item in gains if best.change.is_hardware and not item.change.is_hardware]
    setting = max(settings, key=lambda item: item.tok_per_s, default=None)
    return replace(advice, best=best, best_setting=setting)


def _changes(request: PlanRequest, plan: OffloadPlan) -> Iterator[Change]:
    for added_bytes in (GIB, 2 * GIB):
        larger = replace(request, budget_bytes=request.budget_bytes + added_bytes)
        yield Change("budget", larger, added_bytes)
    costs = request.costs
    faster = replace(costs, link_bytes_per_s=2 * costs.link_bytes_per_s)
    if request.profile.streams_from_disk:
        faster = replace(faster, disk_bytes_per_s=2 * costs.disk_bytes_per_s)
    yield Change("link", replace(request, costs=faster))
    if (shorter := usual_contexts(plan.context // 2)[0]) >= 256:
        yield Change("context", replace(request, context=shorter))
    if request.ram_bytes is not None and len(plan.pinned_layers) < len(plan.streamed):
        added_bytes = 8 * GIB
        yield Change("ram", replace(request, ram_bytes=request.ram_bytes + added_bytes), added_bytes)
