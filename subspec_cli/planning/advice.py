"""One line of advice: of the changes that a user could make, the one that is predicted to help most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from subspec_cli.errors import ResourceError
from subspec_cli.planning.plan import OffloadPlan, PlanRequest, make_plan
from subspec_cli.planning.shelf import usual_contexts
from subspec_cli.units import GIB

_WORTH_SAYING: Final = 0.03
"""Gains below this share are not worth a change."""


@dataclass(frozen=True, slots=True)
class Change:
    """Something that could be otherwise."""

    label: str
    request: PlanRequest
    is_hardware: bool = False
    """Whether it takes more than another flag."""


def advise(request: PlanRequest, plan: OffloadPlan, others: tuple[PlanRequest, ...] = ()) -> str:
    """What would help most, with its predicted figure; `others` are the request with substitutes of other bits."""
    now = plan.prediction.tok_per_s
    found = []
    for change in (*_changes(request, plan), *_other_bits(others)):
        try:
            rate = make_plan(change.request).prediction.tok_per_s
        except ResourceError:
            continue
        if rate > now * (1 + _WORTH_SAYING):
            found.append((rate, change))
    if not found:
        held = "the whole model fits" if plan.fits and not plan.streamed else "no change tried here"
        return (
            f"{held}{': nothing is needed' if plan.fits and not plan.streamed else ' helps by 3 % or more'}"
        )
    rate, best = max(found, key=lambda item: item[0])
    text = f"{best.label}: {rate:.1f} tok/s predicted, {rate / now - 1:.0%} more"
    by_flag = [item for item in found if not item[1].is_hardware]
    if best.is_hardware and by_flag:
        rate, flag = max(by_flag, key=lambda item: item[0])
        text += f"; of the settings, {flag.label}: {rate:.1f} tok/s"
    return text


def _changes(request: PlanRequest, plan: OffloadPlan) -> Iterator[Change]:
    option = "--memory-gb" if request.device == "cpu" else "--vram-gb"
    for more in (1, 2):
        larger = request.budget_bytes + more * GIB
        yield Change(f"{more} GiB more ({option} {larger / GIB:.4g})", replace(request, budget_bytes=larger))
    costs = request.costs
    faster = replace(costs, link_bytes_per_s=2 * costs.link_bytes_per_s)
    if request.device == "cpu":
        faster = replace(faster, disk_bytes_per_s=2 * costs.disk_bytes_per_s)
    name = "a disk" if request.device == "cpu" else "a link"
    yield Change(f"{name} twice as fast", replace(request, costs=faster), is_hardware=True)
    if (shorter := usual_contexts(plan.context // 2)[0]) >= 256:
        yield Change(f"a smaller --context {shorter}", replace(request, context=shorter))
    if request.ram_bytes is not None and len(plan.pinned_layers) < len(plan.streamed):
        larger = request.ram_bytes + 8 * GIB
        yield Change(
            f"8 GiB more host memory (--ram-gb {larger / GIB:.4g})", replace(request, ram_bytes=larger)
        )


def _other_bits(others: tuple[PlanRequest, ...]) -> Iterator[Change]:
    for other in others:
        yield Change(f"substitutes of {other.substitute_bits} bits (--bits {other.substitute_bits})", other)
