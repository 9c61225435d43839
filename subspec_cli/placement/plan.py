"""Which layers stay in memory and which are streamed, from sizes and a budget alone: pure arithmetic.

Every byte that grows with the model, the context or the tree has a line; the budget is never exceeded by the
sum of the lines, and one line is a stated margin for what does not grow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from subspec_cli.errors import ResourceError, UsageError
from subspec_cli.placement.geometry import ModelGeometry
from subspec_cli.units import GIB, MIB, format_bytes

DEFAULT_CONTEXT: Final = 4096
_CONTEXTS: Final = (4096, 3072, 2048, 1536, 1024, 768, 512, 256)
"""Contexts tried when the user names none, largest first."""
_SLOTS: Final = 3
"""Stream slots: one in use, one ready, one arriving."""
ATTENTION_TILE_BYTES: Final = 4 * MIB
"""Most bytes of one tile of float64 scores; a few such temporaries live at a time."""
_MARGIN_BYTES: Final = 64 * MIB
"""Interpreter growth, thread stacks, kernel scratch and the allocator's own waste."""
_PAGE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a plan is made from."""

    geometry: ModelGeometry
    budget_bytes: int
    device: str
    """`cpu` or `cuda`."""
    substitute_bytes: tuple[int, ...] | None
    """Bytes of each layer's substitute in memory; None plans plain decoding, which needs none."""
    tokenizer_bytes: int
    """Size of the tokenizer's files, which cost host memory in proportion."""
    context: int | None
    resident_layers: int | None
    """Layers to keep resident, as the user said; None lets the plan decide."""
    tree_nodes: int
    prefill_rows: int
    model_context: int
    """Most positions the model was made for."""


@dataclass(frozen=True, slots=True)
class PlanLine:
    """One line of the byte table."""

    label: str
    size_bytes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class OffloadPlan:
    """Where everything lives, and why."""

    budget_bytes: int
    context: int
    resident: tuple[int, ...]
    """Layers held in device memory, shared by target and draft."""
    streamed: tuple[int, ...]
    slots: int
    lines: tuple[PlanLine, ...]
    streamed_bytes_per_pass: int
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
    def total_bytes(self) -> int:
        """Sum of all lines."""
        return _sum(self.lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "budget_bytes": self.budget_bytes,
            "planned_bytes": self.total_bytes,
            "context": self.context,
            "resident_layers": list(self.resident),
            "streamed_layers": list(self.streamed),
            "slots": self.slots,
            "streamed_bytes_per_pass": self.streamed_bytes_per_pass,
            "fits": self.fits,
            "reason": self.reason,
            "lines": [
                {"label": line.label, "size_bytes": line.size_bytes, "note": line.note} for line in self.lines
            ],
        }


def make_plan(request: PlanRequest) -> OffloadPlan:
    """The plan with the most resident layers that the budget holds.

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
    for context in _contexts(request):
        if (plan := _plan_for(request, context)) is not None:
            return plan
    raise _too_small(request)


def _contexts(request: PlanRequest) -> Iterable[int]:
    if request.context is not None:
        return (request.context,)
    most = min(request.model_context, DEFAULT_CONTEXT)
    return (most, *(context for context in _CONTEXTS if context < most))


def _plan_for(request: PlanRequest, context: int) -> OffloadPlan | None:
    """The best plan with this context, None if it does not hold at all."""
    wanted = request.resident_layers
    layers = request.geometry.layers
    counts = range(layers, -1, -1) if wanted is None else (wanted,)
    for count in counts:
        lines = _lines(request, context, count)
        if _sum(lines) <= request.budget_bytes:
            return _finish(request, context, count, lines)
    return None


def spread(count: int, layers: int) -> tuple[int, ...]:
    """`count` of `layers` layer numbers, evenly spread: the link works on while resident layers compute."""
    return tuple(sorted({(2 * i + 1) * layers // (2 * count) for i in range(count)})) if count else ()


def _lines(request: PlanRequest, context: int, resident: int) -> tuple[PlanLine, ...]:
    geometry = request.geometry
    streamed = geometry.layers - resident
    chosen = set(spread(resident, geometry.layers))
    tables = 1 if geometry.tied_head or request.device == "cpu" else 2
    slot_bytes = max(geometry.block_bytes.values()) + 8 * _PAGE_BYTES
    substitutes = [size for layer, size in enumerate(request.substitute_bytes or ()) if layer not in chosen]
    small = geometry.layers * geometry.layer_small_bytes + geometry.hidden * geometry.element_bytes
    rows = context + request.tree_nodes
    lines = [
        PlanLine(
            "embedding and head" if tables == 2 or geometry.tied_head else "head",
            tables * geometry.table_bytes,
        ),
        PlanLine("norms and biases", small),
        PlanLine(
            "resident layers", resident * geometry.layer_matrix_bytes, f"{resident} of {geometry.layers}"
        ),
        PlanLine("substitutes", sum(substitutes), f"{len(substitutes)} layers"),
        PlanLine(
            "stream slots", _SLOTS * slot_bytes if streamed else 0, f"{_SLOTS} x {format_bytes(slot_bytes)}"
        ),
        PlanLine("KV cache", rows * geometry.kv_row_bytes, f"{rows} rows"),
        PlanLine("workspace", _workspace_bytes(request, rows)),
        PlanLine("margin", _MARGIN_BYTES),
    ]
    return tuple(line for line in lines if line.size_bytes)


def _sum(lines: Iterable[PlanLine]) -> int:
    return sum(line.size_bytes for line in lines)


def _workspace_bytes(request: PlanRequest, rows: int) -> int:
    """Activations of the widest forward, float64 attention and logits; the tokenizer on the host."""
    geometry = request.geometry
    width = 4 * geometry.hidden + 3 * geometry.feed_forward + 3 * geometry.heads * geometry.head_dim
    activations = request.prefill_rows * width * max(geometry.element_bytes, 4)
    float64_keys = 3 * geometry.kv_heads * rows * geometry.head_dim * 8
    tiles = 3 * ATTENTION_TILE_BYTES
    logits = request.tree_nodes * geometry.vocab * geometry.element_bytes + 8 * geometry.vocab * 8
    tokenizer = 8 * request.tokenizer_bytes if request.device == "cpu" else 0
    return activations + float64_keys + tiles + logits + tokenizer


def _finish(
    request: PlanRequest, context: int, resident_count: int, lines: tuple[PlanLine, ...]
) -> OffloadPlan:
    geometry = request.geometry
    resident = spread(resident_count, geometry.layers)
    streamed = tuple(layer for layer in range(geometry.layers) if layer not in resident)
    whole = _sum(_lines(request, context, geometry.layers))
    fits = whole <= request.budget_bytes
    if request.resident_layers is not None:
        reason = f"{resident_count} resident layers, as asked for"
    elif fits:
        reason = f"the whole model fits: {format_bytes(whole)} of {format_bytes(request.budget_bytes)}"
    else:
        spare = request.budget_bytes - _sum(lines)
        layer = format_bytes(geometry.layer_matrix_bytes)
        reason = f"as many resident layers as fit: {format_bytes(spare)} to spare, a layer takes {layer}"
    if request.context is None and context < min(request.model_context, DEFAULT_CONTEXT):
        reason += f"; context cut to {context} tokens to fit"
    return OffloadPlan(
        budget_bytes=request.budget_bytes,
        context=context,
        resident=resident,
        streamed=streamed,
        slots=_SLOTS if streamed else 0,
        lines=lines,
        streamed_bytes_per_pass=len(streamed) * geometry.layer_matrix_bytes,
        reason=reason,
        fits=fits,
    )


def _too_small(request: PlanRequest) -> ResourceError:
    context = request.context or min(_CONTEXTS[-1], request.model_context)
    wanted = request.resident_layers
    counts = range(request.geometry.layers + 1) if wanted is None else (wanted,)
    # Not always the plan without resident layers: holding two layers may cost less than slots for streaming them.
    lines = min((_lines(request, context, count) for count in counts), key=_sum)
    least = _sum(lines)
    option = "--memory-gb" if request.device == "cpu" else "--vram-gb"
    # Rounded up to hundredths of a GiB, so that the number can be typed as it stands.
    enough = -(-least * 100 // GIB) / 100
    largest = max(lines, key=lambda line: line.size_bytes)
    lower = "a smaller --context or " if request.context and request.context > _CONTEXTS[-1] else ""
    return ResourceError(
        f"a budget of {format_bytes(request.budget_bytes)} is too small: {format_bytes(least)} is the least, "
        f"of which {largest.label} {format_bytes(largest.size_bytes)}",
        f"{option} {enough:.2f} works with a context of {context}; {lower}substitutes of fewer bits lower it",
    )
