"""Where a second comes from: passes, draft steps, the best depth and tokens per second of a layout.

One round is a target pass and the draft steps before it. The link fills the slots while the draft runs. While a pass
waits for weights, the draft goes on in the shadow of the stream; that helps if what comes next, wherever the path
ends, is among the tokens that it worked below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.limits import MOST_DEPTH, MOST_ROWS, PREFILL_CHUNK, SHADOW_ROWS
from subspec_cli.planning.costs import (
    BASE_CACHED_ROWS,
    LINK_MARGIN,
    MachineCosts,
    RowTimes,
    arrival_s,
    attention_weight,
    overlapped_s,
    weighted_sum,
)
from subspec_cli.planning.device_profile import EmbeddingPlace
from subspec_cli.planning.layer_sizes import LayerSizes
from subspec_cli.planning.memory import HeadBits, MemoryLayout, MemoryModel, PinnedLayers
from subspec_cli.planning.request import PlanRequest

STEP_ROWS: Final = 2
"""Rows of an ordinary draft step: the chain and one node beside it."""
SHADOW_STEP_ROWS: Final = 4
"""Rows of a step in the shadow of the stream, where several likely ends are continued at once."""
DEPTHS: Final = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, MOST_DEPTH)
NODE_BUDGETS: Final = (16, 32, 48, 64, 128)
_PAIRS: Final = 400
"""Pairs of a path's end and its next token that share the chance where the draft errs at every level: so many rows in
the shadow have the pair that comes in half of the passes. Fewer errors leave fewer pairs. By two trained models."""
_HOST_GATHER_S: Final = 10e-6
"""Time a GPU takes to read a draft step's embedding rows, some kilobytes each, from host memory."""
_TWO_SLOTS_LOSS: Final = 1.02
"""Factor on the link's time: with two slots the link stops whenever using a block takes longer than reading one."""


class RoundTiming(NamedTuple):
    """Times of a round that do not depend on its depth; a tuple, because a plan makes thousands of them."""

    link_s: float
    prefetch_s: float
    """Link time of the slots, which fill while the draft runs."""
    step_s: float
    """One more level for every sequence: draft steps with STEP_ROWS for each."""
    shadow_step_s: float
    """A draft step of SHADOW_STEP_ROWS."""
    slot_s: float
    """Link time of one slot."""
    shadow_slots: int
    """Slots that fill while a shadow step runs, beside the two of the pass; 0 is no shadow drafting."""
    most_shadow_slots: int
    """The most that a layout can have."""
    widen_s: float = 0.0
    """Compute time that a pass takes to widen streamed weights of 8 bits, or to rebuild them from residuals."""
    sequences: int = 1
    """Answers in flight."""


class DepthOption(NamedTuple):
    """A depth of the tree, and what follows from it alone; depth 0 is plain decoding."""

    depth: int
    rows: int
    """Rows of a pass over the trees of all sequences."""
    tau: float
    """Tokens per pass and sequence, the bonus token included."""
    survival: float
    """Probability that the target accepts one more level."""
    compute_s: float
    """Compute time of a pass over the tree, without waiting for weights."""


def link_s(machine: MachineCosts, layer_bytes: int, streamed: int, from_disk: int) -> float:
    """Return the seconds until the streamed layers of one pass have arrived; disk and bus work in parallel."""
    return max(
        streamed * layer_bytes / machine.link_bytes_per_s, from_disk * layer_bytes / machine.disk_bytes_per_s
    )


def widen_s(machine: MachineCosts, geometry: ModelGeometry, streamed: int) -> float:
    """Return the seconds that a pass takes to widen or rebuild its streamed layers; 0 if they are in 16 bits."""
    if geometry.stored is None:
        return 0.0
    return streamed * LayerSizes(geometry.link_layer_bytes).mean / machine.widen_bytes_per_s


def pass_compute(
    machine: MachineCosts, geometry: ModelGeometry, cached_rows: int = BASE_CACHED_ROWS
) -> RowTimes:
    """Return the compute times of one target pass, without waiting for weights."""
    return weighted_sum(
        [
            (geometry.layers, machine.target_layer),
            (geometry.layers * attention_weight(cached_rows), machine.target_attention),
            (1, machine.target_head),
        ]
    )


def step_times(
    machine: MachineCosts,
    geometry: ModelGeometry,
    shared: int,
    head_bits: HeadBits,
    embedding: EmbeddingPlace,
    *,
    cached_rows: int = BASE_CACHED_ROWS,
) -> RowTimes:
    """Return the times of one draft step: substitutes, shared layers, the draft's head and the overhead."""
    gather_s = _HOST_GATHER_S if embedding == "host" else 0.0
    return weighted_sum(
        [
            (geometry.layers - shared, machine.substitute_layer),
            (shared, machine.shared_layer),
            (geometry.layers * attention_weight(cached_rows), machine.draft_attention),
            (1, machine.low_bit_head if head_bits == 4 else machine.draft_head),
            (1, RowTimes((1,), (machine.step_overhead_s + gather_s,))),
        ]
    )


def verified_rows(depth: int, most_nodes: int) -> int:
    """Return the rows of a tree in a pass: the root, the chain and about as many nodes beside it."""
    return min(most_nodes, 2 * depth + 1)


def level_s(step: RowTimes, sequences: int) -> float:
    """Return the seconds of one more level for every sequence: full draft steps, and one with the rows left."""
    full, rest = divmod(sequences * STEP_ROWS, MOST_ROWS)
    return full * step.at(MOST_ROWS) + (step.at(rest) if rest else 0.0)


def hidden_nodes(link_time_s: float, compute: RowTimes, most_nodes: int) -> int:
    """Return the largest tree whose compute time still hides behind the link."""
    fitting = [n for n in NODE_BUDGETS if n <= most_nodes and compute.at(n) <= link_time_s]
    return fitting[-1] if fitting else min(NODE_BUDGETS[0], most_nodes)


def hidden_prompt_rows(link_time_s: float, compute: RowTimes, most_rows: int) -> int:
    """Return the prompt rows, in whole chunks, whose compute time hides behind the link; 0 if not even one does."""
    chunks = range(PREFILL_CHUNK, most_rows + 1, PREFILL_CHUNK)
    return max((rows for rows in chunks if compute.at(rows) <= link_time_s), default=0)


def pass_s(timing: RoundTiming, option: DepthOption) -> float:
    """Return the wait for a pass. The weights that the link moved while the draft ran have already arrived."""
    return overlapped_s(_arrival_s(timing, option), option.compute_s + timing.widen_s)


def _arrival_s(timing: RoundTiming, option: DepthOption) -> float:
    return arrival_s(timing.link_s, timing.prefetch_s, option.depth * timing.step_s)


def round_s(timing: RoundTiming, option: DepthOption) -> float:
    """Return the seconds of one round, which decide every plan: tokens per second are tau / seconds."""
    return pass_s(timing, option) + (option.depth - shadow_levels(timing, option)) * timing.step_s


def shadow_levels(timing: RoundTiming, option: DepthOption) -> float:
    """Return how many levels of a tree the shadow of the last pass is likely to have drafted."""
    link_s = min(LINK_MARGIN * timing.link_s, _arrival_s(timing, option))
    spare_s = _shadow_share(timing) * (link_s - option.compute_s - timing.widen_s)
    steps = min(int(spare_s / timing.shadow_step_s), SHADOW_ROWS // SHADOW_STEP_ROWS)
    if steps <= 0 or not option.depth:
        return 0.0
    rows, errors = steps * SHADOW_STEP_ROWS / timing.sequences, 1.0 - option.survival
    # Half of the levels until the next error: deeper ones seldom win a row from another pair.
    levels = min(steps, option.depth, max(1.0, 0.5 / errors) if errors > 0 else option.depth)
    return levels * rows / (rows + _PAIRS * errors)


def _shadow_share(timing: RoundTiming) -> float:
    """Return the share of the link's spare time in which steps can run without delaying it."""
    if not timing.shadow_slots:
        return 0.0
    wanted = min(max(1, math.ceil(timing.shadow_step_s / timing.slot_s)), timing.most_shadow_slots)
    return min(1.0, timing.shadow_slots / wanted)


def fastest_depth(timing: RoundTiming, options: Sequence[DepthOption]) -> tuple[float, DepthOption]:
    """Return the highest tokens per second of these depths, and its depth."""
    rates = [timing.sequences * option.tau / round_s(timing, option) for option in options]
    best = max(rates)
    return best, options[rates.index(best)]


def depth_options(request: PlanRequest) -> tuple[DepthOption, ...]:
    """Return plain decoding, and the depths to choose from: only one if the user fixed it."""
    fixed, most_nodes = request.fixed_depth, request.tree_nodes
    depths = (0, fixed) if fixed else (0, *(depth for depth in DEPTHS if depth < most_nodes))
    compute = pass_compute(request.costs, request.geometry, request.cached_rows)
    survival = request.likely_survival
    rows = {
        depth: min(request.sequences * verified_rows(depth, most_nodes), request.pass_nodes)
        for depth in depths
    }
    return tuple(
        DepthOption(
            depth,
            rows[depth],
            tau=sum(survival**level for level in range(depth + 1)),
            survival=survival,
            compute_s=compute.at(rows[depth]),
        )
        for depth in depths
    )


class RoundTimer:
    """Times the layouts of one request."""

    def __init__(self, request: PlanRequest, memory: MemoryModel) -> None:
        self._request = request
        self._memory = memory
        self._plain, *deeper = depth_options(request)
        # Plain decoding is an option, since speculation may be slower, unless the user fixed its depth.
        self._drafted = deeper if request.fixed_depth else [self._plain, *deeper]
        self._slot_counts = request.profile.slot_counts
        self._draft_timings: dict[tuple[int, HeadBits, EmbeddingPlace], _DraftTiming] = {}

    def fastest(self, layout: MemoryLayout, pinned: PinnedLayers) -> tuple[float, RoundTiming, DepthOption]:
        """Return the tokens per second of a layout at its best depth, its round timing, and that depth."""
        timing = self._round_timing(layout, pinned)
        rate, depth = fastest_depth(timing, self._drafted if layout.drafts else [self._plain])
        return rate, timing, depth

    def _round_timing(self, layout: MemoryLayout, pinned: PinnedLayers) -> RoundTiming:
        request, memory = self._request, self._memory
        draft = self._draft_timing(layout)
        streamed = memory.layers - layout.resident
        from_disk = 0 if request.profile.streams_from_disk else streamed - pinned.layers
        time_s = link_s(request.costs, memory.mean_link_bytes, streamed, from_disk)
        if layout.slots == self._slot_counts[0]:
            time_s *= _TWO_SLOTS_LOSS
        if pinned.ring_slots:
            prefetch_s = pinned.ring_slots * memory.mean_link_bytes / request.costs.disk_bytes_per_s
        else:
            prefetch_s = layout.slots * memory.mean_slot_bytes / request.costs.link_bytes_per_s
        most = self._slot_counts[-1]
        return RoundTiming(
            time_s,
            prefetch_s,
            draft.step_s,
            draft.shadow_step_s,
            slot_s=memory.slot_bytes / request.costs.link_bytes_per_s,
            shadow_slots=max(0, layout.slots - 2) if request.shadow_rows else 0,
            most_shadow_slots=most - 2,
            widen_s=widen_s(request.costs, request.geometry, streamed),
            sequences=request.sequences,
        )

    def _draft_timing(self, layout: MemoryLayout) -> _DraftTiming:
        key = (layout.shared, layout.draft_head_bits, layout.embedding)
        if key not in self._draft_timings:
            costs = self._request.costs
            times = step_times(costs, self._request.geometry, *key, cached_rows=self._request.cached_rows)
            self._draft_timings[key] = _DraftTiming(
                level_s(times, self._request.sequences), times.at(SHADOW_STEP_ROWS)
            )
        return self._draft_timings[key]


class _DraftTiming(NamedTuple):
    """Times of the draft steps of all layouts with the same draft."""

    step_s: float
    shadow_step_s: float
