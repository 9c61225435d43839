"""Why a plan is as it is, in figures. `cli/plan_text.py` makes the sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from subspec_cli.planning.request import usual_contexts
from subspec_cli.planning.search import LayoutSearch, PlanOption

_LEAST_LOSS: Final = 0.005
"""Share of the speed that is worth a word."""


@dataclass(frozen=True, slots=True)
class GivenLayers:
    """The user gave the number of resident layers."""

    resident: int


@dataclass(frozen=True, slots=True)
class WholeModel:
    """The whole model fits and is resident."""

    model_bytes: int
    budget_bytes: int


@dataclass(frozen=True, slots=True)
class LayersThatPay:
    """As many layers are resident as make the plan faster, perhaps none."""

    resident: int
    spare_bytes: int
    layer_bytes: int


@dataclass(frozen=True, slots=True)
class ResidentDraft:
    """How the draft uses the resident layers."""

    shares: bool
    """Whether it runs them too. Otherwise it keeps its substitutes beside them."""
    gain: float | None
    """Predicted speedup over the other way, less 1; None if the other way does not fit."""


@dataclass(frozen=True, slots=True)
class ShorterContext:
    """The context is shorter than the longest usual one, or than prompt and answer would need."""

    context: int
    longest: int
    loss: float | None
    """Share of the speed that the longest would cost; None if it does not fit."""


@dataclass(frozen=True, slots=True)
class ContextCost:
    """The context takes memory that would make a shorter one faster."""

    context: int
    shortest: int
    """The shortest usual context."""
    loss: float
    """Share of the speed with the shortest context that is given up."""


@dataclass(frozen=True, slots=True)
class NoRoomToDraft:
    """The substitutes do not fit beside the prompt, plain decoding does."""

    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class FasterBits:
    """The plan's set of substitutes is predicted to be faster than other sets."""

    bits: int
    slower_bits: tuple[int, ...]
    """Bits of the other sets, ascending."""


@dataclass(frozen=True, slots=True)
class StreamChoice:
    """Residuals are prepared, and are streamed or not."""

    residuals: bool
    raw_bytes: int
    """Bytes of a pass over the same layers, raw."""
    residual_bytes: int
    rebuild_s: float
    """Time that rebuilding them takes in a pass."""
    gain: float
    """Predicted speedup over the other form, less 1."""


@dataclass(frozen=True, slots=True)
class PlanReason:
    """All reasons of one plan."""

    layers: GivenLayers | WholeModel | LayersThatPay
    draft: ResidentDraft | None = None
    """None if no resident layer stands beside a draft."""
    context: ShorterContext | None = None
    context_cost: ContextCost | None = None
    """None if a shorter context would hardly be faster."""
    no_draft: NoRoomToDraft | None = None
    """None if tokens are drafted, or if the user wants plain decoding."""
    substitutes: FasterBits | None = None
    """None if there is only one set, or all have the same bits."""
    stream: StreamChoice | None = None
    """None if no residuals are prepared, or nothing is streamed."""


def plan_reason(search: LayoutSearch, option: PlanOption) -> PlanReason:
    """Return why an option was chosen for the request's budget."""
    layout = option.timed.layout
    return PlanReason(
        layers=_layers_reason(search, option),
        draft=_draft_reason(search, option) if layout.drafts and layout.resident else None,
        context=_context_reason(search, option),
        context_cost=_context_cost(search, option),
    )


def _layers_reason(search: LayoutSearch, option: PlanOption) -> GivenLayers | WholeModel | LayersThatPay:
    request, memory, layout = search.request, search.memory, option.timed.layout
    if request.resident_layers is not None:
        return GivenLayers(layout.resident)
    model_bytes = memory.whole_model_bytes(layout.embedding, option.context)
    if layout.resident == memory.layers and model_bytes <= request.budget_bytes:
        return WholeModel(model_bytes, request.budget_bytes)
    spare_bytes = request.budget_bytes - search.total_bytes(option.timed, option.context)
    return LayersThatPay(layout.resident, spare_bytes, memory.layer_bytes)


def _draft_reason(search: LayoutSearch, option: PlanOption) -> ResidentDraft:
    layout = option.timed.layout
    shares = layout.shared > layout.target_only
    other = search.fastest_of_kind(search.request.budget_bytes, option.context, shared=not shares)
    if other is None or other.tok_per_s <= 0:
        return ResidentDraft(shares, None)
    return ResidentDraft(shares, option.timed.tok_per_s / other.tok_per_s - 1)


def _context_reason(search: LayoutSearch, option: PlanOption) -> ShorterContext | None:
    request = search.request
    longest = usual_contexts(request.model_context)[0]
    if request.wanted is not None:
        longest = min(request.wanted.context, request.model_context)
    if request.context is not None or option.context >= longest:
        return None
    longer = search.fastest(search.request.budget_bytes, longest)
    if longer is None or longer.tok_per_s <= 0:
        return ShorterContext(option.context, longest, None)
    return ShorterContext(option.context, longest, 1 - longer.tok_per_s / option.timed.tok_per_s)


def _context_cost(search: LayoutSearch, option: PlanOption) -> ContextCost | None:
    shortest = usual_contexts(search.request.model_context)[-1]
    faster = search.fastest(search.request.budget_bytes, shortest)
    if option.context <= shortest or faster is None or faster.tok_per_s <= 0:
        return None
    loss = 1 - option.timed.tok_per_s / faster.tok_per_s
    return ContextCost(option.context, shortest, loss) if loss >= _LEAST_LOSS else None
