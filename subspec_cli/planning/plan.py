"""Which layers stay in memory and which are streamed, from sizes, speeds and a budget alone: pure arithmetic.

The sum of the memory lines (`memory`) never exceeds the budget. The plan takes the layout that fits (`search`)
and is predicted to be fastest (`timing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.layer_tensors import spread
from subspec_cli.errors import ResourceError, UsageError
from subspec_cli.limits import MOST_ROWS
from subspec_cli.planning.costs import MachineCosts, PlanCosts, RowTimes, weighted_sum
from subspec_cli.planning.device_profile import DeviceKind, EmbeddingPlace, device_profile
from subspec_cli.planning.layer_sizes import LayerSizes
from subspec_cli.planning.memory import HeadBits, PinnedLayers, PlanLine
from subspec_cli.planning.prediction import Prediction, predict
from subspec_cli.planning.reason import FasterBits, NoRoomToDraft, PlanReason, StreamChoice, plan_reason
from subspec_cli.planning.request import AutomaticBudget, PlanRequest, pass_nodes, usual_contexts
from subspec_cli.planning.search import LayoutSearch, PlanOption, TimedLayout
from subspec_cli.planning.shortage import shortage
from subspec_cli.planning.timing import (
    NODE_BUDGETS,
    hidden_nodes,
    hidden_prompt_rows,
    link_s,
    pass_compute,
    step_times,
    verified_rows,
    widen_s,
)
from subspec_cli.units import counted


@dataclass(frozen=True, slots=True)
class OffloadPlan:
    """Where everything is, what it is predicted to give, and why."""

    device: DeviceKind
    budget_bytes: int
    context: int
    resident: tuple[int, ...]
    """Layers of the target that are held in device memory."""
    shared: tuple[int, ...]
    """Resident layers that the draft runs too, in place of a substitute."""
    streamed: tuple[int, ...]
    pinned_layers: tuple[int, ...]
    """Streamed layers that wait in pinned host memory; the other streamed ones are read from disk."""
    ring_slots: int
    """Pinned buffers of a layer each, through which layers are read from disk for a GPU."""
    slots: int
    """Buffers of the stream on the device: of a block on the CPU, of a layer on a GPU."""
    drafts: bool
    """Whether there are substitutes, so that tokens can be drafted."""
    substitute_bits: int
    draft_head_bits: HeadBits
    """16: the draft uses the target's head; 4: it has its own low-bit copy."""
    embedding: EmbeddingPlace
    tree_nodes: int
    """Most nodes of a draft tree: as many as hide behind the link, or as a fixed depth or width needs."""
    shadow_rows: int
    """Cache rows for drafting in the shadow of a pass; 0 where nothing streams or nothing is drafted."""
    draft_rows: int
    """Most rows of one draft step."""
    prompt_rows: int
    """Most rows of prompts in one pass without trees."""
    company_rows: int
    """Most rows of prompts in a pass with trees: whole chunks that compute while the link is busy anyway."""
    lines: tuple[PlanLine, ...]
    host_lines: tuple[PlanLine, ...]
    """Host memory beside the budget."""
    streamed_bytes_per_pass: int
    prediction: Prediction
    reason: PlanReason
    fits: bool
    """Whether the whole model fits the budget, so that nothing needs to be streamed."""
    automatic: AutomaticBudget | None = None
    """How the budget came about, if the user gave none."""
    sequences: int = 1
    """Answers in flight at the same time, each with a context and scratch rows of its own."""

    @property
    def resident_layers(self) -> int:
        """Number of resident layers."""
        return len(self.resident)

    @property
    def streamed_layers(self) -> int:
        """Number of streamed layers."""
        return len(self.streamed)

    @property
    def pass_nodes(self) -> int:
        """Most nodes of all trees of a pass."""
        return pass_nodes(self.tree_nodes, self.sequences)

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

    @property
    def process_bytes(self) -> int:
        """Host memory of the whole process, the bare process included: what a task manager shows."""
        return self.host_bytes + (self.total_bytes if device_profile(self.device).budget_is_ram else 0)

    def costs(self, machine: MachineCosts, geometry: ModelGeometry) -> PlanCosts:
        """Return what the passes and draft steps of this plan take, from the parts that were timed or assumed."""
        straight = device_profile(self.device).streams_from_disk
        from_disk = 0 if straight else len(self.streamed) - len(self.pinned_layers)
        widening_s = widen_s(machine, geometry, len(self.streamed))
        return PlanCosts(
            link_s=link_s(machine, LayerSizes(geometry.link_layer_bytes).mean, len(self.streamed), from_disk),
            compute=weighted_sum([(1, pass_compute(machine, geometry)), (1, RowTimes((1,), (widening_s,)))]),
            step=step_times(machine, geometry, len(self.shared), self.draft_head_bits, self.embedding),
            pass_attention=weighted_sum([(geometry.layers, machine.target_attention)]),
            step_attention=weighted_sum([(geometry.layers, machine.draft_attention)]),
            prefetch_s=self.prediction.basis.timing.prefetch_s,
        )

    def as_dict(self, *, reason: str, assumptions: Sequence[str]) -> dict[str, Any]:
        """Return plain values for JSON; `reason` and `assumptions` are the sentences for them."""
        return {
            "device": self.device,
            "budget_bytes": self.budget_bytes,
            "planned_bytes": self.total_bytes,
            "host_bytes": self.host_bytes,
            "process_bytes": self.process_bytes,
            "context": self.context,
            "parallel": self.sequences,
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
            "prompt_rows": self.prompt_rows,
            "streamed_bytes_per_pass": self.streamed_bytes_per_pass,
            "streams_residuals": self.reason.stream is not None and self.reason.stream.residuals,
            "fits": self.fits,
            "automatic_budget": None if self.automatic is None else asdict(self.automatic),
            "reason": reason,
            "context_cost": self.reason.context_cost.loss if self.reason.context_cost else 0.0,
            "prediction": self.prediction.as_dict(assumptions),
            "lines": _as_dicts(self.lines),
            "host_lines": _as_dicts(self.host_lines),
        }


def make_plan(request: PlanRequest) -> OffloadPlan:
    """Return the plan that is predicted to be fastest of all that the budget holds.

    Raises:
        ResourceError: the budget is too small; the error names the least that works.
        UsageError: more resident layers than the model has, or a context beyond the model's.

    A prompt that the request names must have passed `check_prompt_fits`.
    """
    layers = request.geometry.layers
    if request.resident_layers is not None and request.resident_layers > layers:
        raise UsageError(
            f"--resident-layers {request.resident_layers}: the model has {counted(layers, 'layer')}"
        )
    if request.context is not None and request.context > request.model_context:
        raise UsageError(
            f"--context {request.context}: the model was made for {request.model_context} positions"
        )
    search = LayoutSearch(request)
    option = search.best(request.budget_bytes)
    if option is None:
        raise shortage(search)
    plan = _finished(search, option)
    assert plan.scratch_rows <= request.scratch_rows, (
        "the run would allocate more cache rows than were counted"
    )
    return plan


@dataclass(frozen=True, slots=True)
class PlanBounds:
    """The least that a request needs, and the most that its budget holds."""

    least_budget_bytes: int
    least_context: int
    """Context of the smallest budget."""
    largest_context: int
    """Longest context that the budget holds, however slow; 0 if it holds none."""


def bounds_of(request: PlanRequest) -> PlanBounds:
    """Return the smallest budget that works, and the longest context that the present one holds.

    Raises ResourceError if the limit of host memory leaves no layout at all.
    """
    search = LayoutSearch(request)
    if not search.front:
        raise shortage(search)
    context = request.context or usual_contexts(request.model_context)[-1]
    return PlanBounds(
        least_budget_bytes=search.total_bytes(search.front[0], context),
        least_context=context,
        largest_context=search.largest_context(request.budget_bytes),
    )


def fastest_plan(requests: Sequence[PlanRequest]) -> tuple[int, OffloadPlan]:
    """Return the fastest of several requests' plans, and its index; raises the first error if no plan can be made.

    The requests are for several sets of substitutes of one model, most recent first: equals go to the first. If
    they name a prompt, the plan that holds most of the answer wins, and plain decoding is the last resort.
    """
    plans, errors = [], []
    for number, request in enumerate(requests):
        try:
            plans.append((number, make_plan(request)))
        except ResourceError as error:
            errors.append(error)
    if not plans:
        return 0, _undrafted(requests[0], errors[0])
    for_prompt = requests[0].wanted is not None
    number, plan = max(
        plans, key=lambda item: (item[1].context if for_prompt else 0, item[1].prediction.tok_per_s, -item[0])
    )
    is_fastest = all(other.prediction.tok_per_s <= plan.prediction.tok_per_s for _, other in plans)
    slower_bits = {request.substitute_bits for request in requests} - {plan.substitute_bits}
    if slower_bits and is_fastest:
        substitutes = FasterBits(plan.substitute_bits, tuple(sorted(slower_bits)))
        plan = replace(plan, reason=replace(plan.reason, substitutes=substitutes))
    return number, _with_stream_choice(plan, number, plans, requests)


def _with_stream_choice(
    plan: OffloadPlan, number: int, plans: Sequence[tuple[int, OffloadPlan]], requests: Sequence[PlanRequest]
) -> OffloadPlan:
    """Return the plan with the reason for its form of streaming, if the same substitutes have another form."""
    own = requests[number]
    others = [
        (requests[at], other)
        for at, other in plans
        if requests[at].streams_residuals != own.streams_residuals
        and requests[at].substitute_bits == own.substitute_bits
    ]
    if not others or not plan.streamed:
        return plan
    other_request, other = others[0]
    request = own if own.streams_residuals else other_request
    residual_bytes = sum(request.geometry.link_layer_bytes[layer] for layer in plan.streamed)
    choice = StreamChoice(
        residuals=own.streams_residuals,
        raw_bytes=sum(request.geometry.layer_bytes[layer] for layer in plan.streamed),
        residual_bytes=residual_bytes,
        rebuild_s=residual_bytes / request.costs.widen_bytes_per_s,
        gain=plan.prediction.tok_per_s / other.prediction.tok_per_s - 1,
    )
    return replace(plan, reason=replace(plan.reason, stream=choice))


def _undrafted(request: PlanRequest, error: ResourceError) -> OffloadPlan:
    """Return plain decoding for a prompt that leaves no room for substitutes; without one, raises `error`."""
    if request.wanted is None or request.context is not None or request.substitute_bytes is None:
        raise error
    plan = make_plan(replace(request, substitute_bytes=None))
    return replace(plan, reason=replace(plan.reason, no_draft=NoRoomToDraft(request.wanted.prompt)))


def _finished(search: LayoutSearch, option: PlanOption) -> OffloadPlan:
    request, memory, timed, layout = search.request, search.memory, option.timed, option.timed.layout
    layers = request.geometry.layers
    resident = spread(layout.resident, layers)
    streamed = tuple(layer for layer in range(layers) if layer not in resident)
    pinned = memory.pinned(layout) or PinnedLayers(0, 0)
    free_bytes = request.budget_bytes - search.total_bytes(timed, option.context)
    prompt = memory.prompt_pass(layout, option.context, free_bytes)
    prediction = predict(request, timed.timing, timed.depth)
    return OffloadPlan(
        device=request.device,
        budget_bytes=request.budget_bytes,
        context=option.context,
        resident=resident,
        shared=_pick(layout.shared, resident),
        streamed=streamed,
        pinned_layers=_pick(pinned.layers, streamed),
        ring_slots=pinned.ring_slots,
        slots=layout.slots,
        drafts=layout.drafts,
        substitute_bits=request.substitute_bits,
        draft_head_bits=layout.draft_head_bits,
        embedding=layout.embedding,
        tree_nodes=_tree_nodes(request, timed, prediction),
        shadow_rows=request.shadow_rows if streamed and layout.drafts else 0,
        draft_rows=max(request.fixed_width or 0, MOST_ROWS),
        prompt_rows=prompt.rows,
        company_rows=hidden_prompt_rows(
            timed.timing.link_s - timed.timing.widen_s, _compute(request), prompt.rows
        ),
        lines=memory.lines(layout, option.context, prompt),
        host_lines=memory.host_lines(layout),
        streamed_bytes_per_pass=sum(request.geometry.link_layer_bytes[layer] for layer in streamed),
        prediction=prediction,
        reason=plan_reason(search, option),
        fits=memory.whole_model_bytes(layout.embedding, option.context) <= request.budget_bytes,
        automatic=request.automatic,
        sequences=request.sequences,
    )


def _pick(count: int, layers: Sequence[int]) -> tuple[int, ...]:
    return tuple(layers[index] for index in spread(count, len(layers)))


def _tree_nodes(request: PlanRequest, timed: TimedLayout, prediction: Prediction) -> int:
    """Return how many nodes may be verified: all that hide behind the link, and all that the best depth wants.

    A survival that is assumed may turn out high.
    """
    if request.fixed_depth is not None or request.fixed_width is not None:
        return request.tree_nodes
    hidden = hidden_nodes(timed.timing.link_s, _compute(request), request.tree_nodes)
    deepest = max(timed.depth.depth, prediction.high.depth if prediction.high else 0)
    wanted = verified_rows(deepest, request.tree_nodes)
    enough = next((nodes for nodes in NODE_BUDGETS if nodes >= wanted), wanted)
    return min(max(hidden, enough), request.tree_nodes)


def _compute(request: PlanRequest) -> RowTimes:
    return pass_compute(request.costs, request.geometry, request.cached_rows)


def _as_dicts(lines: Sequence[PlanLine]) -> list[dict[str, Any]]:
    return [{"label": line.label, "size_bytes": line.size_bytes, "note": line.note} for line in lines]
