"""How deep and how wide to draft, and how much in the shadow of a pass: a pure function of costs and history.

The costs are probed once, snapped to a grid and recorded (`PlanCosts`). No clock is read, so two runs grow the same
trees. One rule serves all decisions: a draft step is worth its time while it adds more expected tokens than the run
makes in that time. Let E be the expected tokens of the tree so far and A the tokens of recent rounds, s the time of
this round and B the time of those. Then the run makes r = (E + A) / (s + B) tokens a second. A step of n rows that
adds g(n) tokens pays while g(n) > r t(n), and its width is the n that gains most; t(n) is its own time, and what the
pass takes longer for n more nodes. Where no step pays any more, steps go on while the slots fill: the pass would wait
for the link in that time. All times are those at the number of committed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final

from subspec_cli.drafting.history import History
from subspec_cli.limits import MOST_ROWS
from subspec_cli.planning.costs import LINK_MARGIN, PlanCosts

LEAST_CHANCE: Final = 0.02
"""A node less likely than this is neither verified nor expanded."""
_LEAST_SHADOW_CHANCE: Final = 0.002
"""What is less likely is not worth a row in the shadow of a pass, whose time costs nothing else."""
_PROBE_EVERY: Final = 24
"""Passes without a draft before speculation is tried again."""


@dataclass(frozen=True, slots=True)
class TreeLimits:
    """Hard bounds of one tree."""

    depth: int
    """Most levels below the root."""
    width: int
    """Most nodes expanded per draft step."""
    nodes: int
    """Most nodes, including the root."""


@dataclass(frozen=True, slots=True)
class FixedShape:
    """Depth and width that the user fixed; None leaves one to the costs."""

    depth: int | None = None
    width: int | None = None

    @property
    def is_set(self) -> bool:
        """Whether the user fixed one of them."""
        return self.depth is not None or self.width is not None


@dataclass(frozen=True, slots=True)
class Outlook:
    """The trees of a pass as they would be verified now."""

    expected_tokens: float
    nodes: int
    spent_s: float
    """Cost of its draft steps so far."""
    cached_rows: float
    """Committed rows of a sequence, which the pass and every draft step read; the mean of several."""


@dataclass(frozen=True, slots=True)
class PassUnderWay:
    """A pass in whose shadow the draft goes on."""

    nodes: int
    drafted_s: float
    """Cost of the draft steps before it."""
    cached_rows: float
    """As in `Outlook`."""


@dataclass(frozen=True, slots=True)
class DraftPolicy:
    """Decides by costs and history; a fixed depth or width is kept at any cost."""

    max_tree: TreeLimits
    costs: PlanCosts
    layers: int
    """Layers of the target, over which the shadow of a pass is spread."""
    fixed: FixedShape = FixedShape()
    shadow_rows: int = 0
    """Most cache rows of a sequence that the shadow of one pass may take; 0 switches it off."""
    together_nodes: int | None = None
    """Most nodes of all trees of a pass; None for those of one tree."""

    @property
    def pass_nodes(self) -> int:
        """Most nodes of all trees of a pass."""
        return self.max_tree.nodes if self.together_nodes is None else self.together_nodes

    def limits(self, tokens_wanted: int) -> TreeLimits:
        """Return the bounds of a tree if `tokens_wanted` more tokens may be emitted, including the bonus token."""
        most = self.max_tree
        return TreeLimits(max(0, min(most.depth, tokens_wanted - 1, most.nodes - 1)), most.width, most.nodes)

    def step_s(self, rows: int, cached_rows: float) -> float:
        """Return the cost of a draft step."""
        return self.costs.step_s(rows, cached_rows)

    def round_s(self, outlook: Outlook) -> float:
        """Return the cost of a round: the draft steps so far, and a pass over the tree."""
        spent_s = outlook.spent_s
        return spent_s + self.costs.pass_s(outlook.nodes, outlook.cached_rows, spent_s)

    def serial_rows(self, chances: Sequence[float], outlook: Outlook, history: History) -> int:
        """Return the rows of the next draft step before the pass; 0 ends the tree.

        `chances` are those of the candidates, likeliest first.
        """
        if not chances:
            return 0
        forced = self.fixed.depth is not None or (
            outlook.spent_s == 0 and history.passes_without_draft >= _PROBE_EVERY
        )
        if self.fixed.width is not None and forced:
            return min(self.fixed.width, len(chances))
        now_s = self.round_s(outlook)
        rate = history.tokens_per_s(outlook.expected_tokens, now_s)
        able = [chances[0], *(chance for chance in chances[1:MOST_ROWS] if chance >= LEAST_CHANCE)]
        gains = [
            history.gain(chance) - rate * (self._round_with_step_s(rows, outlook) - now_s)
            for rows, chance in enumerate(accumulate(able), start=1)
        ]
        width = max(range(len(gains)), key=lambda index: (gains[index], -index)) + 1
        if gains[width - 1] <= 0 and not forced:
            width = self._densest(able, outlook.cached_rows)
            added_s = self._round_with_step_s(width, outlook, hides=True) - now_s
            if history.gain(sum(able[:width])) <= rate * added_s:
                return 0
        return width if self.fixed.width is None else min(self.fixed.width, len(chances))

    def _round_with_step_s(self, rows: int, outlook: Outlook, *, hides: bool = False) -> float:
        """Return the cost of a round with one more step; if it `hides`, the slots fill meanwhile."""
        spent_s, cached_rows = outlook.spent_s, outlook.cached_rows
        longer_s = spent_s + self.step_s(rows, cached_rows)
        # Each row that a step expands leaves about one node to verify.
        nodes = outlook.nodes + rows
        return longer_s + self.costs.pass_s(nodes, cached_rows, longer_s if hides else spent_s)

    def _densest(self, chances: Sequence[float], cached_rows: float) -> int:
        """Return the rows of a draft step with most chance per second."""
        rates = [
            gain / self.step_s(rows, cached_rows) for rows, gain in enumerate(accumulate(chances), start=1)
        ]
        return max(range(len(rates)), key=lambda index: (rates[index], -index)) + 1

    def ngram_pays(self, chance: float, rows: int, cached_rows: float) -> bool:
        """Return whether an n-gram guess of this chance, which saves a step if right, is worth one more row."""
        more_s = self.step_s(rows + 1, cached_rows) - self.step_s(rows, cached_rows)
        return chance * self.step_s(1, cached_rows) > more_s

    def least_leaf_chance(self, outlook: Outlook, history: History) -> float:
        """Return the least chance for which an open node is worth a row of the pass."""
        rate = history.tokens_per_s(outlook.expected_tokens, self.round_s(outlook))
        more = replace(outlook, nodes=outlook.nodes + 8)
        row_s = (self.round_s(more) - self.round_s(outlook)) / 8
        return max(LEAST_CHANCE, rate * row_s)

    def shadow_step_rows(
        self, chances: Sequence[float], under_way: PassUnderWay, *, layer: int, shadow_s: float
    ) -> int:
        """Return the rows of the next draft step in the shadow of the pass under way; 0 waits.

        The link leaves the same idle time in every layer, at the costs' own prices; `shadow_s` of it is spent. A step
        takes it from the layers that follow: it begins once the one before has been made up for, and only if enough
        layers follow. Every row saves a step of the next tree with its chance, so the width is the one with most
        chance per second.
        """
        costs, cached_rows = self.costs, under_way.cached_rows
        arrival_s = costs.arrival_s(under_way.drafted_s)
        idle_s = min(LINK_MARGIN * costs.link_s, arrival_s) - costs.compute_s(under_way.nodes, cached_rows)
        passed, left = (layer + 1) / self.layers, (self.layers - layer - 1) / self.layers
        # The slots are full when the pass begins, and the link stands still behind a step until some are free.
        if passed * costs.link_s <= costs.prefetch_s or shadow_s > idle_s * passed:
            return 0
        likely = [chance for chance in chances[:MOST_ROWS] if chance >= _LEAST_SHADOW_CHANCE]
        if not likely:
            return 0
        rows = self._densest(likely, cached_rows)
        return rows if self.step_s(rows, cached_rows) <= idle_s * left else 0
