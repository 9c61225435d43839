"""Where a choice comes from: all layouts of a request, the Pareto front of size and speed, and context against speed.

The layouts do not depend on the budget. A larger budget can take every layout of a smaller one, so it is never
predicted to be slower.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from subspec_cli.planning.device_profile import EmbeddingPlace
from subspec_cli.planning.memory import HeadBits, MemoryLayout, MemoryModel
from subspec_cli.planning.request import PlanRequest, WantedTokens, usual_contexts
from subspec_cli.planning.timing import DepthOption, RoundTimer, RoundTiming
from subspec_cli.substitutes.settings import group_size_for

_MOST_OF_THE_OTHER_KIND: Final = 1
"""The best mix of shared and target-only layers is nearly pure; one layer of the other kind may use the rest."""
_CONTEXT_PRICE: Final = 0.03
"""Share of the speed that a longer context may cost, compared with the least context that is wanted."""


class TimedLayout(NamedTuple):
    """A layout with its size and its predicted speed."""

    base_bytes: int
    """Sum of all memory lines for a context of no tokens."""
    tok_per_s: float
    layout: MemoryLayout
    timing: RoundTiming
    depth: DepthOption
    """The depth at which the layout is fastest."""


class PlanOption(NamedTuple):
    """A context, and a layout that fits beside it."""

    context: int
    timed: TimedLayout


class LayoutSearch:
    """All layouts of one request, sized and timed: which of them a budget holds, and which is best."""

    def __init__(self, request: PlanRequest) -> None:
        self.request = request
        self.memory = MemoryModel(request)
        timed = timed_layouts(request, self.memory)
        self._by_size = sorted(timed, key=lambda item: (item.base_bytes, -item.tok_per_s))
        self.front = _pareto_front(self._by_size)
        """Layouts that are faster than all smaller ones, smallest first; empty if host memory holds no layout."""
        self._front_bytes = [item.base_bytes for item in self.front]

    def total_bytes(self, timed: TimedLayout, context: int) -> int:
        """Return the sum of all memory lines."""
        return timed.base_bytes + self.memory.context_bytes(context)

    def fastest(self, budget_bytes: int, context: int) -> TimedLayout | None:
        """Return the fastest layout that the budget holds with this context."""
        at = bisect.bisect_right(self._front_bytes, budget_bytes - self.memory.context_bytes(context))
        return self.front[at - 1] if at else None

    def fastest_of_kind(self, budget_bytes: int, context: int, *, shared: bool) -> TimedLayout | None:
        """Return the fastest layout whose resident layers are all shared, or all for the target alone."""
        free_bytes = budget_bytes - self.memory.context_bytes(context)
        fitting = [
            item
            for item in self._by_size
            if item.base_bytes <= free_bytes
            and item.layout.drafts
            and item.layout.resident
            and not (item.layout.target_only if shared else item.layout.shared)
        ]
        return max(fitting, key=lambda item: item.tok_per_s, default=None)

    def largest_context(self, budget_bytes: int) -> int:
        """Return the longest context that the budget holds at all, up to the model's; 0 if there is none."""
        if not self.front:
            return 0
        longest = self.memory.largest_context(budget_bytes - self._front_bytes[0])
        return min(longest, self.request.model_context)

    def best(self, budget_bytes: int) -> PlanOption | None:
        """Return context and layout for a budget; None if it holds no layout.

        A context that the user gave is kept, and one for a known prompt holds it. Otherwise context is traded for
        speed, at every size up to the budget at which the choice can change: a larger budget never gives up speed
        that a smaller one had.
        """
        if self.request.context is not None:
            found = self.fastest(budget_bytes, self.request.context)
            return None if found is None else PlanOption(self.request.context, found)
        if self.request.wanted is not None:
            return self._for_prompt(budget_bytes, self.request.wanted)
        contexts = usual_contexts(self.request.model_context)
        added = [self.memory.context_bytes(context) for context in contexts]
        sizes = {size + context_bytes for size in self._front_bytes for context_bytes in added}
        best: PlanOption | None = None
        for size in sorted(size for size in sizes if size <= budget_bytes):
            best = self._trade_context(size, contexts, best)
        return best

    def _for_prompt(self, budget_bytes: int, wanted: WantedTokens) -> PlanOption | None:
        """Return the layout that answers soonest, for all of the answer or as much of it as the budget holds."""
        context = min(wanted.context, self.request.model_context)
        if (found := self._soonest(budget_bytes, context, wanted)) is not None:
            return PlanOption(context, found)
        if wanted.is_whole:
            return None
        context = self.largest_context(budget_bytes)
        found = self._soonest(budget_bytes, context, wanted) if context > wanted.prompt else None
        return None if found is None else PlanOption(context, found)

    def _soonest(self, budget_bytes: int, context: int, wanted: WantedTokens) -> TimedLayout | None:
        """Return the layout that reads the prompt and answers in the least time; computing the prompt is the same."""
        free_bytes = budget_bytes - self.memory.context_bytes(context)

        def seconds(item: TimedLayout) -> float:
            prompt = self.memory.prompt_pass(item.layout, context, free_bytes - item.base_bytes)
            passes = -(-wanted.prompt // prompt.rows)
            answers = self.request.sequences * wanted.answer
            return passes * item.timing.link_s + answers / item.tok_per_s

        fitting = (item for item in self._by_size if item.base_bytes <= free_bytes)
        return min(fitting, key=seconds, default=None)

    def _trade_context(
        self, budget_bytes: int, contexts: Sequence[int], smaller: PlanOption | None
    ) -> PlanOption | None:
        """Return the longest context at an acceptable price, no slower than the option of the next smaller size."""
        options = [(context, self.fastest(budget_bytes, context)) for context in contexts]
        least = min(self.request.least_context, contexts[0])
        usual = max((item.tok_per_s for context, item in options if item and context >= least), default=0.0)
        slowest = smaller.timed.tok_per_s if smaller else 0.0
        for context, item in options:
            if item is None or item.tok_per_s < slowest:
                continue
            if context <= least or item.tok_per_s >= usual * (1 - _CONTEXT_PRICE):
                return PlanOption(context, item)
        return smaller


def timed_layouts(request: PlanRequest, memory: MemoryModel) -> Iterator[TimedLayout]:
    """Yield every layout with its size and speed; none if host memory does not even hold a ring."""
    timer = RoundTimer(request, memory)
    for layout in layouts(request):
        if (pinned := memory.pinned(layout)) is not None:
            rate, timing, depth = timer.fastest(layout, pinned)
            yield TimedLayout(memory.base_bytes(layout), rate, layout, timing, depth)


def layouts(request: PlanRequest) -> Iterator[MemoryLayout]:
    """Yield every layout of a request, of any size."""
    layers, slot_counts = request.geometry.layers, request.profile.slot_counts
    tied: tuple[EmbeddingPlace, ...] = ("tied",)
    heads: list[tuple[bool, HeadBits]] = [(False, 16), (True, 16)]
    # The low-bit kernels do not take every size of a vocabulary.
    if group_size_for((request.geometry.vocab, request.geometry.hidden)) is not None:
        heads.append((True, 4))
    for place in tied if request.geometry.tied_head else request.profile.untied_places:
        for drafts, head_bits in heads if request.substitute_bytes is not None else heads[:1]:
            for shared, target_only in _resident_layers(request, drafts=drafts):
                resident = shared + target_only
                # While layers are streamed, the table on the device would take the memory of layers, and save a
                # few microseconds a step.
                if place == "device" and resident < layers:
                    continue
                for slots in slot_counts if resident < layers else (0,):
                    yield MemoryLayout(shared, target_only, drafts, slots, head_bits, place)


def _resident_layers(request: PlanRequest, *, drafts: bool) -> Iterator[tuple[int, int]]:
    """Yield numbers of shared and of target-only layers."""
    layers, wanted = request.geometry.layers, request.resident_layers
    for shared in range(layers + 1) if drafts else (0,):
        for target_only in range(layers + 1 - shared):
            resident = shared + target_only
            if wanted not in (None, resident):
                continue
            # If there are substitutes, a layout without a draft is tried only with all layers resident.
            if not drafts and resident < layers and request.substitute_bytes is not None:
                continue
            if min(shared, target_only) <= _MOST_OF_THE_OTHER_KIND:
                yield shared, target_only


def _pareto_front(by_size: Sequence[TimedLayout]) -> list[TimedLayout]:
    """Return the layouts that are faster than all smaller ones; `by_size` is in order of size.

    At equal speed the layout with more resident layers wins: if compute is the bottleneck, the link may still turn
    out slower than predicted.
    """
    front: list[TimedLayout] = []
    for item in by_size:
        if not front or _speed_rank(item) > _speed_rank(front[-1]):
            front.append(item)
    return front


def _speed_rank(item: TimedLayout) -> tuple[float, int]:
    return item.tok_per_s, item.layout.resident
