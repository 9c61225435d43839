"""What to draft next: how deep, how wide, and how much in the shadow of a pass.

Decided from costs that were probed, snapped to the grid and recorded (`PlanCosts`), from calibrated chances, and from
nothing else: no clock is read, so two runs grow the same trees. One rule serves all: a draft step is worth its
time while it adds more expected tokens than the run makes in that time. With E expected tokens of the tree so
far and A those of recent passes, over the time s of this tree and B of those passes, the run makes
r = (E + A) / (s + B) tokens a second; a step of n rows that takes t(n) and adds g(n) tokens pays while
g(n) > r t(n), and its width is the n that gains most.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

from subspec_cli.decoding.tree import TokenTree
from subspec_cli.decoding.verification import VerifyResult
from subspec_cli.limits import MOST_ROWS
from subspec_cli.planning.costs import PlanCosts

_BIN_EDGES: Final = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97, 0.995)
_PRIOR_WEIGHT: Final = 4.0
_MEMORY: Final = 0.98
"""Weight that older observations keep when a new one of their bin comes in."""
_RATE_MEMORY: Final = 0.8
"""Weight that tokens and time of earlier passes keep when a new one comes in."""
_YIELD_STEP: Final = 0.1
_SHARE_STEP: Final = 0.02
"""Weight of a new observation of what a draft step adds, and of the chances of a node's children."""
_PROBE_EVERY: Final = 24
"""Passes without a draft before speculation is tried again."""
LEAST_CHANCE: Final = 0.02
"""A node less likely than this is neither verified nor expanded."""
_LINK_MARGIN: Final = 0.75
"""Share of a pass's link time that computing is planned to fill. A link faster than it was when it was probed
must not wait: a shadow step that delays the pass costs several times what it can save."""


@dataclass(frozen=True, slots=True)
class TreeLimits:
    """Hard bounds of one tree."""

    depth: int
    """Most levels below the root."""
    width: int
    """Most nodes expanded per draft step."""
    nodes: int
    """Most nodes in all, root included."""


@dataclass(frozen=True, slots=True)
class FixedShape:
    """What the user fixed; None leaves it to the costs."""

    depth: int | None = None
    width: int | None = None


class Calibration:
    """Observed acceptance of drafted edges by the draft's own probability, with a prior that trusts it."""

    def __init__(self) -> None:
        edges = (0.0, *_BIN_EDGES, 1.0)
        self._tried = [_PRIOR_WEIGHT] * (len(edges) - 1)
        self._taken = [_PRIOR_WEIGHT * (a + b) / 2 for a, b in pairwise(edges)]

    def probability(self, guess: float) -> float:
        """Chance that the target takes an edge the draft gives probability `guess`."""
        index = bisect.bisect_right(_BIN_EDGES, guess)
        return self._taken[index] / self._tried[index]

    def observe(self, guess: float, *, taken: bool) -> None:
        """Record the fate of an edge whose parent the target reached."""
        index = bisect.bisect_right(_BIN_EDGES, guess)
        self._tried[index] = self._tried[index] * _MEMORY + 1.0
        self._taken[index] = self._taken[index] * _MEMORY + (1.0 if taken else 0.0)


class Schedule:
    """Decides from costs and calibrated chances; a fixed depth or width is kept whatever it costs."""

    def __init__(
        self,
        *,
        limits: TreeLimits,
        costs: PlanCosts,
        layers: int,
        fixed: FixedShape | None = None,
        shadow_rows: int = 0,
    ) -> None:
        self._limits = limits
        self._costs = costs
        self._layers = layers
        self.fixed = fixed or FixedShape()
        self.most_shadow_rows = shadow_rows
        """Rows that the shadow of one pass may take; 0 switches it off."""
        self.calibration = Calibration()
        self.child_shares: tuple[float, ...] = (0.8, 0.1, 0.05)
        """Mean chance of a node's best, second and third child, where the node is on the target's path."""
        self._yield = 0.9
        self._recent_tokens = 0.0
        self._recent_s = 0.0
        self._passes_without_draft = 0

    def limits(self, tokens_wanted: int) -> TreeLimits:
        """Bounds for a tree when `tokens_wanted` more tokens may be emitted (the bonus token is one of them)."""
        depth = max(0, min(self._limits.depth, tokens_wanted - 1, self._limits.nodes - 1))
        return TreeLimits(depth, self._limits.width, self._limits.nodes)

    def step_s(self, rows: int) -> float:
        """Cost of a draft step."""
        return self._costs.step.at(rows)

    def serial_rows(
        self, chances: Sequence[float], *, expected_tokens: float, nodes: int, spent_s: float
    ) -> int:
        """Rows of the next draft step before the pass, of candidates with these chances, likeliest first.

        0 ends the tree. `nodes` are in it so far, and `spent_s` was its draft steps' cost.
        """
        if not chances:
            return 0
        forced = self.fixed.depth is not None or (spent_s == 0 and self._passes_without_draft >= _PROBE_EVERY)
        if self.fixed.width is not None and forced:
            return min(self.fixed.width, len(chances))
        rate = self._rate(expected_tokens, self._costs.pass_s(nodes) + spent_s)
        able = [chances[0], *(chance for chance in chances[1:MOST_ROWS] if chance >= LEAST_CHANCE)]
        gains = [
            self._yield * gain - rate * self.step_s(rows)
            for rows, gain in enumerate(accumulate(able), start=1)
        ]
        best = max(range(len(gains)), key=lambda index: (gains[index], -index))
        if gains[best] <= 0 and not forced:
            return 0
        return best + 1 if self.fixed.width is None else min(self.fixed.width, len(chances))

    def guess_pays(self, chance: float, rows: int) -> bool:
        """Whether a guess that is right with this chance, and saves a step then, is worth one row more."""
        return chance * self.step_s(1) > self.step_s(rows + 1) - self.step_s(rows)

    def leaf_chance(self, *, expected_tokens: float, nodes: int, spent_s: float) -> float:
        """Least chance for which an open node is worth a row of the pass."""
        pass_s = self._costs.pass_s(nodes)
        rate = self._rate(expected_tokens, pass_s + spent_s)
        return max(LEAST_CHANCE, rate * (self._costs.pass_s(nodes + 8) - pass_s) / 8)

    def shadow_step(self, chances: Sequence[float], *, layer: int, nodes: int, spent_s: float) -> int:
        """Rows of the next draft step in the shadow of a pass over `nodes`, once `layer` is computed; 0 waits.

        The time that the link leaves idle is handed out layer by layer, at the costs' own prices. Every row
        saves a step of the next tree with its chance, so the width is the one with most chance per second.
        """
        idle_s = max(0.0, _LINK_MARGIN * self._costs.link_s - self._costs.compute.at(nodes))
        allowed_s = idle_s * (layer + 1) / self._layers - spent_s
        likely = [chance for chance in chances[:MOST_ROWS] if chance >= LEAST_CHANCE]
        rates = [gain / self.step_s(rows) for rows, gain in enumerate(accumulate(likely), start=1)]
        if not rates:
            return 0
        rows = max(range(len(rates)), key=lambda index: (rates[index], -index)) + 1
        return rows if self.step_s(rows) <= allowed_s else 0

    def gain(self, chance: float) -> float:
        """Tokens that expanding nodes of this chance in all is likely to add."""
        return self._yield * chance

    def learn_child_shares(self, shares: Sequence[float]) -> None:
        """Record the chances of a node's children, best first, given the node."""
        found = (*shares, 0.0, 0.0, 0.0)
        self.child_shares = tuple(
            mean + _SHARE_STEP * (share - mean) for mean, share in zip(self.child_shares, found, strict=False)
        )

    def learn_yield(self, gained: float) -> None:
        """Record what a draft step added, per chance of the nodes it expanded."""
        self._yield += _YIELD_STEP * (min(gained, 1.0) - self._yield)

    def observe(self, tree: TokenTree, result: VerifyResult, spent_s: float) -> None:
        """Learn from a verified tree: every child of a node on the target's path was taken or not."""
        self._passes_without_draft = 0 if len(tree) > 1 else self._passes_without_draft + 1
        self._recent_tokens = _RATE_MEMORY * self._recent_tokens + len(result.token_ids)
        self._recent_s = _RATE_MEMORY * self._recent_s + self._costs.pass_s(len(tree)) + spent_s
        reached = set(result.accepted_nodes)
        for node, parent in enumerate(tree.parents[1:], start=1):
            if parent in reached:
                guess = math.exp(tree.log_probs[node] - tree.log_probs[parent])
                self.calibration.observe(guess, taken=node in reached)

    def _rate(self, expected_tokens: float, tree_s: float) -> float:
        """Tokens a second that the run makes, this tree counted as if verified now."""
        return (expected_tokens + self._recent_tokens) / (tree_s + self._recent_s)
