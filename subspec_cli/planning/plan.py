"""Which layers stay in memory and which are streamed, from sizes, speeds and a budget alone: pure arithmetic.

The budget is never exceeded by the sum of the lines (`plan_lines`); of all that it holds, what is predicted to
be fastest is taken (`plan_search`, `predict`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from subspec_cli.checkpoint.layer_tensors import spread
from subspec_cli.errors import ResourceError, UsageError
from subspec_cli.limits import ATTENTION_TILE_BYTES, MOST_ROWS, SHADOW_ROWS
from subspec_cli.planning.memory import Ledger, PlanLine
from subspec_cli.planning.reason import context_reason, main_reason, too_small
from subspec_cli.planning.request import DEFAULT_CONTEXT, LEAST_CONTEXT, Choice, PlanRequest
from subspec_cli.planning.search import Candidate, paces
from subspec_cli.planning.shelf import Shelf, usual_contexts
from subspec_cli.planning.timing import (
    NODE_BUDGETS,
    Prediction,
    node_budget,
    pass_compute,
    prediction_of,
    verified_rows,
)

__all__ = [
    "ATTENTION_TILE_BYTES",
    "DEFAULT_CONTEXT",
    "LEAST_CONTEXT",
    "SHADOW_ROWS",
    "OffloadPlan",
    "PlanBounds",
    "PlanLine",
    "PlanRequest",
    "bounds_of",
    "fastest_plan",
    "make_plan",
    "spread",
]


@dataclass(frozen=True, slots=True)
class OffloadPlan:
    """Where everything lives, what it is predicted to give, and why."""

    device: str
    budget_bytes: int
    context: int
    resident: tuple[int, ...]
    """Layers of the target that are held in device memory."""
    shared: tuple[int, ...]
    """Those of them that the draft runs too, in place of a substitute."""
    streamed: tuple[int, ...]
    pinned_layers: tuple[int, ...]
    """Streamed layers that wait in pinned host memory; the other streamed ones are read from disk."""
    ring_slots: int
    """Pinned buffers of a layer each, through which layers from disk pass on their way to a GPU."""
    slots: int
    """Buffers of the stream on the device: of a block on the CPU, of a layer on a GPU."""
    drafts: bool
    """Whether there are substitutes, so that tokens can be drafted."""
    substitute_bits: int
    draft_head_bits: int
    """16: the draft uses the target's head; 4: it has a low-bit copy of its own."""
    embedding: str
    """`tied` to the head, on the `device`, in `host` memory or on `disk`."""
    tree_nodes: int
    """Most nodes of a draft tree: as many as hide behind the link, or as a fixed depth or width needs."""
    shadow_rows: int
    """Cache rows for drafting in the shadow of a pass; 0 where nothing streams or nothing is drafted."""
    draft_rows: int
    """Most rows of one draft step."""
    lines: tuple[PlanLine, ...]
    host_lines: tuple[PlanLine, ...]
    """Host memory beside the budget."""
    streamed_bytes_per_pass: int
    prediction: Prediction
    reason: str
    fits: bool
    """Whether the whole model fits the budget, so that nothing needs to be streamed."""

    @property
    def resident_layers(self) -> int:
        """Number of resident layers."""
        return len(self.resident)

    @property
    def streamed_layers(self) -> int:
        """Number of streamed layers."""
        return len(self.streamed)

    @property
    def scratch_rows(self) -> int:
        """Rows that the KV cache has beside those of the context."""
        return self.tree_nodes + self.shadow_rows

    @property
    def total_bytes(self) -> int:
        """Sum of all lines."""
        return sum(line.size_bytes for line in self.lines)

    @property
    def host_bytes(self) -> int:
        """Host memory beside the budget."""
        return sum(line.size_bytes for line in self.host_lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "device": self.device,
            "budget_bytes": self.budget_bytes,
            "planned_bytes": self.total_bytes,
            "host_bytes": self.host_bytes,
            "context": self.context,
            "resident_layers": list(self.resident),
            "shared_layers": list(self.shared),
            "streamed_layers": list(self.streamed),
            "pinned_layers": list(self.pinned_layers),
            "ring_slots": self.ring_slots,
            "slots": self.slots,
            "drafts": self.drafts,
            "substitute_bits": self.substitute_bits,
            "draft_head_bits": self.draft_head_bits,
            "embedding": self.embedding,
            "tree_nodes": self.tree_nodes,
            "streamed_bytes_per_pass": self.streamed_bytes_per_pass,
            "fits": self.fits,
            "reason": self.reason,
            "prediction": self.prediction.as_dict(),
            "lines": _as_dicts(self.lines),
            "host_lines": _as_dicts(self.host_lines),
        }


def make_plan(request: PlanRequest) -> OffloadPlan:
    """The plan that is predicted to be fastest of all that the budget holds.

    Raises ResourceError with the smallest budget that works, UsageError for more layers than the model has or
    a context beyond the model's.
    """
    layers = request.geometry.layers
    if request.resident_layers is not None and request.resident_layers > layers:
        raise UsageError(f"--resident-layers {request.resident_layers}: the model has {layers} layers")
    if request.context is not None and request.context > request.model_context:
        raise UsageError(
            f"--context {request.context}: the model was made for {request.model_context} positions"
        )
    ledger = Ledger(request)
    shelf = Shelf(request, ledger)
    found = shelf.choose(request.budget_bytes)
    if found is None:
        raise too_small(request, ledger, shelf)
    return _finish(request, ledger, shelf, *found)


@dataclass(frozen=True, slots=True)
class PlanBounds:
    """How little a request could do with, and how far its budget reaches."""

    least_budget_bytes: int
    least_context: int
    """Context of the smallest budget."""
    largest_context: int
    """Longest context that the budget holds, however slow; 0 if it holds none."""


def bounds_of(request: PlanRequest) -> PlanBounds:
    """The smallest budget that works, and the longest context that the present one holds.

    Raises ResourceError if the bound on host memory leaves no choice at all.
    """
    ledger = Ledger(request)
    shelf = Shelf(request, ledger)
    if not shelf.candidates:
        raise too_small(request, ledger, shelf)
    context = request.context or usual_contexts(request.model_context)[-1]
    return PlanBounds(
        least_budget_bytes=shelf.total_bytes(shelf.candidates[0], context),
        least_context=context,
        largest_context=shelf.largest_context(request.budget_bytes),
    )


def fastest_plan(requests: Sequence[PlanRequest]) -> tuple[int, OffloadPlan]:
    """The fastest of several requests' plans, and its number; raises the first one's error if none can be made.

    For several sets of substitutes that stand side by side, most recent first: equals go to the first.
    """
    plans, errors = [], []
    for number, request in enumerate(requests):
        try:
            plans.append((number, make_plan(request)))
        except ResourceError as error:
            errors.append(error)
    if not plans:
        raise errors[0]
    number, plan = max(plans, key=lambda item: (item[1].prediction.tok_per_s, -item[0]))
    if len(requests) > 1:
        others = sorted({request.substitute_bits for request in requests} - {plan.substitute_bits})
        named = " and ".join(f"{bits}-bit" for bits in others)
        if named:
            reason = f"{plan.reason}; {plan.substitute_bits}-bit substitutes, predicted faster than {named}"
            plan = replace(plan, reason=reason)
    return number, plan


def _pick(count: int, layers: Sequence[int]) -> tuple[int, ...]:
    return tuple(layers[index] for index in spread(count, len(layers)))


def _finish(
    request: PlanRequest, ledger: Ledger, shelf: Shelf, context: int, candidate: Candidate
) -> OffloadPlan:
    geometry, choice = request.geometry, candidate.choice
    resident = spread(choice.resident, geometry.layers)
    streamed = tuple(layer for layer in range(geometry.layers) if layer not in resident)
    pinned, ring_slots = ledger.pinned(choice) or (0, 0)
    whole = Choice(0, geometry.layers, False, 0, 16, choice.embedding)
    whole_bytes = ledger.base_bytes(whole) + context * ledger.row_bytes
    fits = whole_bytes <= request.budget_bytes
    reasons = (
        main_reason(request, ledger, shelf, candidate, whole_bytes if fits else None, context),
        context_reason(request, shelf, candidate, context),
    )
    plan = OffloadPlan(
        device=request.device,
        budget_bytes=request.budget_bytes,
        context=context,
        resident=resident,
        shared=_pick(choice.shared, resident),
        streamed=streamed,
        pinned_layers=_pick(pinned, streamed),
        ring_slots=ring_slots,
        slots=choice.slots,
        drafts=choice.drafts,
        substitute_bits=request.substitute_bits,
        draft_head_bits=choice.draft_head_bits,
        embedding=choice.embedding,
        tree_nodes=_tree_nodes(request, candidate),
        shadow_rows=request.shadow_rows if streamed and choice.drafts else 0,
        draft_rows=max(request.fixed_width or 0, MOST_ROWS),
        lines=ledger.lines(choice, context),
        host_lines=ledger.host_lines(choice),
        streamed_bytes_per_pass=len(streamed) * geometry.layer_matrix_bytes,
        prediction=prediction_of(
            candidate.cycle,
            candidate.pace,
            paces(request)[0],
            request.costs,
            survival=request.likely_survival,
            is_measured=request.survival is not None,
        ),
        reason="; ".join(reason for reason in reasons if reason),
        fits=fits,
    )
    assert plan.scratch_rows <= request.scratch_rows, (
        "the run would allocate more cache rows than were counted"
    )
    return plan


def _tree_nodes(request: PlanRequest, candidate: Candidate) -> int:
    """Nodes that may be verified: as many as hide behind the link, and as many as the best depth wants."""
    if request.fixed_depth is not None or request.fixed_width is not None:
        return request.tree_nodes
    compute = pass_compute(request.costs, request.geometry)
    hidden = node_budget(candidate.cycle.link_s, compute, request.tree_nodes)
    wanted = verified_rows(candidate.pace.depth, request.tree_nodes)
    enough = next((nodes for nodes in NODE_BUDGETS if nodes >= wanted), wanted)
    return min(max(hidden, enough), request.tree_nodes)


def _as_dicts(lines: Sequence[PlanLine]) -> list[dict[str, Any]]:
    return [{"label": line.label, "size_bytes": line.size_bytes, "note": line.note} for line in lines]
