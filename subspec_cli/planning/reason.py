"""The words for a plan: why it is as it is, and what a budget lacks that is too small."""

from __future__ import annotations

from subspec_cli.errors import ResourceError
from subspec_cli.planning.memory import Ledger
from subspec_cli.planning.request import PlanRequest
from subspec_cli.planning.search import Candidate
from subspec_cli.planning.shelf import Shelf, usual_contexts
from subspec_cli.units import GIB, format_bytes


def main_reason(
    request: PlanRequest,
    ledger: Ledger,
    shelf: Shelf,
    candidate: Candidate,
    whole_bytes: int | None,
    context: int,
) -> str:
    """Why so many layers are resident, and of this kind; `whole_bytes` is the model's size where all of it fits."""
    choice, budget_bytes = candidate.choice, request.budget_bytes
    if request.resident_layers is not None:
        text = f"{choice.resident} resident layers, as asked for"
    elif whole_bytes is not None and choice.resident == ledger.layers:
        text = f"the whole model fits: {format_bytes(whole_bytes)} of {format_bytes(budget_bytes)}"
    else:
        spare = format_bytes(budget_bytes - shelf.total_bytes(candidate, context))
        layer = format_bytes(ledger.layer_bytes)
        if choice.resident:
            text = f"as many resident layers as pay: {spare} to spare, a layer takes {layer}"
        else:
            text = f"no layer resident: {spare} to spare, a layer takes {layer}"
    if choice.drafts and choice.resident:
        text += f"; {_kind_reason(request, shelf, candidate, context)}"
    return text


def _kind_reason(request: PlanRequest, shelf: Shelf, candidate: Candidate, context: int) -> str:
    """Whether the draft shares resident layers or keeps substitutes beside them, and what it gains."""
    choice = candidate.choice
    shares = choice.shared > choice.target_only
    how = "the draft runs them too" if shares else "the draft keeps its substitutes"
    other = shelf.other_kind(request.budget_bytes, context, shared=not shares)
    if other is None or other.tok_per_s <= 0:
        return how
    gain = candidate.tok_per_s / other.tok_per_s - 1
    instead = f"{'with' if shares else 'without'} substitutes beside them"
    if gain < 0.005:
        return f"{how}, predicted about as fast as {instead}"
    return f"{how}, predicted {gain:.0%} faster than {instead}"


def context_reason(request: PlanRequest, shelf: Shelf, candidate: Candidate, context: int) -> str:
    """Why the context is shorter than usual; empty if it is not."""
    longest = usual_contexts(request.model_context)[0]
    if request.context is not None or context >= longest:
        return ""
    longer = shelf.fastest(request.budget_bytes, longest)
    if longer is None or longer.tok_per_s <= 0:
        return f"context cut to {context} tokens to fit"
    loss = 1 - longer.tok_per_s / candidate.tok_per_s
    return f"context {context}, as {longest} would cost {loss:.{0 if loss >= 0.01 else 1}%} of the speed"


def too_small(request: PlanRequest, ledger: Ledger, shelf: Shelf) -> ResourceError:
    """The error for a budget that holds no choice: the smallest that works, and what would lower it."""
    contexts = usual_contexts(request.model_context)
    context = request.context or contexts[-1]
    if not shelf.candidates:
        return _too_little_ram(request, ledger)
    least = shelf.candidates[0]
    least_bytes = shelf.total_bytes(least, context)
    option = "--memory-gb" if request.device == "cpu" else "--vram-gb"
    # Rounded up to hundredths of a GiB, so that the number can be typed as it stands.
    enough = -(-least_bytes * 100 // GIB) / 100
    largest = max(ledger.lines(least.choice, context), key=lambda line: line.size_bytes)
    lower = "a smaller --context or " if request.context and request.context > contexts[-1] else ""
    return ResourceError(
        f"a budget of {format_bytes(request.budget_bytes)} is too small: {format_bytes(least_bytes)} is the least, "
        f"of which {largest.label} {format_bytes(largest.size_bytes)}",
        f"{option} {enough:.2f} works with a context of {context}; {lower}substitutes of fewer bits lower it",
    )


def _too_little_ram(request: PlanRequest, ledger: Ledger) -> ResourceError:
    least_bytes = ledger.least_host_bytes()
    enough = -(-least_bytes * 100 // GIB) / 100
    return ResourceError(
        f"{format_bytes(request.ram_bytes or 0)} of host memory are too little: {format_bytes(least_bytes)} is the "
        "least, with every streamed layer read from disk",
        f"--ram-gb {enough:.2f} works, and more lets layers wait in pinned memory",
    )
