"""The words of a plan: why it is as it is, and what would help."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from subspec_cli.planning.advice import LEAST_GAIN, Advice, Change
from subspec_cli.planning.memory import WAITING_ROWS
from subspec_cli.planning.plan import OffloadPlan
from subspec_cli.planning.prediction import Outcome, Prediction
from subspec_cli.planning.reason import (
    ContextCost,
    FasterBits,
    GivenLayers,
    LayersThatPay,
    PlanReason,
    ResidentDraft,
    ShorterContext,
    StreamChoice,
    WholeModel,
)
from subspec_cli.units import GIB, counted, format_bytes, format_work_time


def reason_text(reason: PlanReason) -> str:
    """Return why a plan is as it is, as one line."""
    return "; ".join(_reasons(reason))


def prompt_text(plan: OffloadPlan) -> str:
    """Return how many passes read a prompt, and why, as one line."""
    if plan.prompt_rows < plan.context:
        return (
            f"one pass for every {plan.prompt_rows:,} tokens: {counted(plan.slots, 'slot')} cannot hold a layer's "
            "feed-forward, so the activations of all rows of a pass wait in memory"
        )
    if not plan.streamed:
        return f"one pass for up to {plan.context:,} tokens, as nothing is streamed"
    if any(line.label == WAITING_ROWS for line in plan.lines):
        return f"one pass for up to {plan.context:,} tokens, whose activations wait in memory between blocks"
    return f"one pass for up to {plan.context:,} tokens: the slots hold a layer's whole feed-forward"


def _reasons(reason: PlanReason) -> Iterator[str]:
    yield _layers_text(reason.layers)
    if reason.draft is not None:
        yield _draft_text(reason.draft)
    if reason.no_draft is not None:
        tokens = counted(reason.no_draft.prompt_tokens, "token")
        yield f"no draft, as the substitutes do not fit beside {tokens} of prompt"
    if reason.context is not None:
        yield _context_text(reason.context)
    if reason.context_cost is not None:
        yield _context_cost_text(reason.context_cost)
    if reason.substitutes is not None:
        yield _bits_text(reason.substitutes)
    if reason.stream is not None:
        yield _stream_text(reason.stream)


def _layers_text(layers: GivenLayers | WholeModel | LayersThatPay) -> str:
    match layers:
        case GivenLayers():
            return f"{layers.resident} resident layers, as asked for"
        case WholeModel():
            return f"the whole model fits: {format_bytes(layers.model_bytes)} of {format_bytes(layers.budget_bytes)}"
        case LayersThatPay():
            what = "as many resident layers as pay" if layers.resident else "no layer resident"
            spare, layer = format_bytes(layers.spare_bytes), format_bytes(layers.layer_bytes)
            return f"{what}: {spare} to spare, a layer takes {layer}"


def _draft_text(draft: ResidentDraft) -> str:
    how = "the draft runs them too" if draft.shares else "the draft keeps its substitutes"
    if draft.gain is None:
        return how
    instead = f"{'with' if draft.shares else 'without'} substitutes beside them"
    if draft.gain < 0.005:
        return f"{how}, predicted about as fast as {instead}"
    return f"{how}, predicted {draft.gain:.0%} faster than {instead}"


def _context_text(shorter: ShorterContext) -> str:
    loss = shorter.loss
    if loss is None:
        return f"context cut to {shorter.context} tokens to fit"
    return f"context {shorter.context}, as {shorter.longest} would cost {_share(loss)} of the speed"


def _context_cost_text(cost: ContextCost) -> str:
    return f"a context of {cost.context} costs {_share(cost.loss)} of the speed with {cost.shortest}"


def _share(loss: float) -> str:
    return f"{loss:.{0 if loss >= 0.01 else 1}%}"


def _bits_text(substitutes: FasterBits) -> str:
    named = " and ".join(f"{bits}-bit" for bits in substitutes.slower_bits)
    return f"{substitutes.bits}-bit substitutes, predicted faster than {named}"


def _stream_text(stream: StreamChoice) -> str:
    sizes = f"{format_bytes(stream.residual_bytes)} of residuals a pass in place of {format_bytes(stream.raw_bytes)}"
    rebuilt = f"rebuilt in {format_work_time(stream.rebuild_s)}"
    if stream.residuals:
        return f"streams {sizes}, {rebuilt}: predicted {stream.gain:.0%} faster than raw"
    slow = "" if find_spec("numba") else "; numba rebuilds faster: pip install 'subspec-cli[residual]'"
    return f"streams raw, predicted {stream.gain:.0%} faster than {sizes}, {rebuilt}{slow}"


def assumptions(prediction: Prediction) -> tuple[str, ...]:
    """Return what a prediction assumes, one short text for each figure."""
    basis, origin = prediction.basis, prediction.origin
    rate, pageable = basis.link_bytes_per_s, basis.pageable_bytes_per_s
    unpinned = "" if pageable == rate else f", {pageable / 1e9:.3g} from memory that is not pinned"
    widen_s = basis.timing.widen_s
    widening = (f"streamed weights to 16 bits {widen_s * 1e3:.3g} ms a pass ({origin})",) if widen_s else ()
    return (
        f"link {rate / 1e9:.3g} GB/s ({origin}{unpinned})",
        f"{prediction.cached_rows:.0f} tokens in the KV cache",
        f"{step_words(prediction)} {format_work_time(prediction.step_s)} ({origin})",
        f"target compute {format_work_time(basis.plain.compute_s)} a pass ({origin})",
        *widening,
        f"survival {prediction.survival:.3g} a level ({acceptance_text(prediction)})",
    )


def step_words(prediction: Prediction) -> str:
    """Return what a prediction calls the drafting of one more level."""
    return "draft step" if prediction.sequences == 1 else "draft steps of a level of all"


def budget_text(plan: OffloadPlan) -> str:
    """Return how an automatic budget came about, in parentheses; empty for one that was given."""
    found = plan.automatic
    if found is None:
        return ""
    reserve = "a quarter" if plan.device == "cpu" else format_bytes(found.reserve_bytes)
    return f" (auto: {format_bytes(found.free_bytes)} free now, {reserve} left to others)"


def acceptance_text(prediction: Prediction) -> str:
    """Return where the survival of a prediction comes from, in a few words."""
    if tokens := prediction.learned_tokens:
        return f"acceptance learned from {tokens:,} tokens"
    return "acceptance assumed"


def range_lines(prediction: Prediction) -> tuple[tuple[str, str], ...]:
    """Return the ends of what may be expected, each with its name; empty once acceptance was learned."""
    low, high = prediction.low, prediction.high
    if low is None or high is None:
        return ()
    return (
        ("low", f"{_outcome_text(low)}, as for a small model's sampled prose"),
        ("high", f"{_outcome_text(high)}, as published for a 7B model"),
    )


def _outcome_text(outcome: Outcome) -> str:
    return f"{outcome.tok_per_s:.3g} tok/s with tau {outcome.tau:.1f} (survival {outcome.survival:.3g})"


def advice_text(advice: Advice) -> str:
    """Return what would help most with its predicted speed, as one line."""
    best, setting = advice.best, advice.best_setting
    if best is None:
        if advice.needs_nothing:
            return "the whole model fits: nothing is needed"
        return f"no change tried here helps by {LEAST_GAIN * 100:.0f} % or more"
    more = best.tok_per_s / advice.tok_per_s - 1
    text = f"{_change_text(best.change)}: {best.tok_per_s:.1f} tok/s predicted, {more:.0%} more"
    if setting is not None:
        text += f"; of the settings, {_change_text(setting.change)}: {setting.tok_per_s:.1f} tok/s"
    return text


def _change_text(change: Change) -> str:
    request, added_gib = change.request, change.added_bytes // GIB
    match change.what:
        case "budget":
            option = request.profile.budget_option
            return f"{added_gib} GiB more ({option} {request.budget_bytes / GIB:.4g})"
        case "link":
            return f"{'a disk' if request.profile.streams_from_disk else 'a link'} twice as fast"
        case "context":
            return f"a smaller --context {request.context}"
        case "ram":
            assert request.ram_bytes is not None
            return f"{added_gib} GiB more host memory (--ram-gb {request.ram_bytes / GIB:.4g})"
        case "bits":
            return f"substitutes of {request.substitute_bits} bits (--bits {request.substitute_bits})"
