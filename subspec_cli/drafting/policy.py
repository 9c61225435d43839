"""How deep and how wide to draft, and how much in the shadow of a pass: a pure function of costs and history.

The costs are probed once, snapped to a grid and recorded (`PlanCosts`). No clock is read, so two runs grow the same
trees. One rule serves all decisions: a draft step is worth its time while it adds more expected tokens than the run
makes in that time. Let E be the expected tokens of the tree so far and A the tokens of recent rounds, s the time of
this round and B the time of those. Then the run makes r = (E + A) / (s + B) tokens a second. A step of n rows that
adds g(n) tokens pays while g(n) > r t(n), and its width is the n that gains most; t(n) is its own time, and what the
pass takes longer for n more nodes. All times are those at the number of committed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
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
        return outlook.spent_s + self.costs.pass_s(outlook.nodes, outlook.cached_rows)

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
        rate = history.tokens_per_s(outlook.expected_tokens, self.round_s(outlook))
        pass_s = partial(self.costs.pass_s, cached_rows=outlook.cached_rows)
        now_s = pass_s(outlook.nodes)

        def added_s(rows: int) -> float:
            # Each row that a step expands leaves about one node to verify.
            return self.step_s(rows, outlook.cached_rows) + pass_s(outlook.nodes + rows) - now_s

        able = [chances[0], *(chance for chance in chances[1:MOST_ROWS] if chance >= LEAST_CHANCE)]
        gains = [
            history.gain(chance) - rate * added_s(rows)
            for rows, chance in enumerate(accumulate(able), start=1)
        ]
        best = max(range(len(gains)), key=lambda index: (gains[index], -index))
        if gains[best] <= 0 and not forced:
            return 0
        return best + 1 if self.fixed.width is None else min(self.fixed.width, len(chances))

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
        self, chances: Sequence[float], *, layer: int, nodes: int, spent_s: float, cached_rows: float
    ) -> int:
        """Return the rows of the next draft step in the shadow of a pass over `nodes`; 0 waits.

        The time that the link leaves idle is handed out layer by layer, at the costs' own prices. Every row saves a
        step of the next tree with its chance, so the width is the one with most chance per second.
        """
        idle_s = max(0.0, LINK_MARGIN * self.costs.link_s - self.costs.compute_s(nodes, cached_rows))
        allowed_s = idle_s * (layer + 1) / self.layers - spent_s
        step_s = partial(self.step_s, cached_rows=cached_rows)
        likely = [chance for chance in chances[:MOST_ROWS] if chance >= _LEAST_SHADOW_CHANCE]
        rates = [gain / step_s(rows) for rows, gain in enumerate(accumulate(likely), start=1)]
        if not rates:
            return 0
        rows = max(range(len(rates)), key=lambda index: (rates[index], -index)) + 1
        return rows if step_s(rows) <= allowed_s else 0
