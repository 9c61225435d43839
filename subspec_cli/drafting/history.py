"""What drafting has learned from verified trees: how often the target agrees, and how fast the run is.

A history outlives answers. It is fed with outcomes alone and reads no clock, so equal runs learn the same.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from subspec_cli.decoding.tree import TokenTree
from subspec_cli.decoding.verification import VerifyResult

_BIN_EDGES: Final = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97, 0.995)
_PRIOR_WEIGHT: Final = 4.0
_MEMORY: Final = 0.98
"""Weight that older observations of a bin keep when a new one comes in."""
_RATE_MEMORY: Final = 0.8
"""Weight that tokens and time of earlier rounds keep when a new one comes in."""
_YIELD_WEIGHT: Final = 0.1
"""Weight of a new observation of what a draft step adds."""
_SHARE_WEIGHT: Final = 0.02
"""Weight of a new observation of the chances of a node's children."""


class Calibration:
    """Observed acceptance of drafted edges by the draft's own probability, with a prior that trusts it."""

    def __init__(self) -> None:
        edges = (0.0, *_BIN_EDGES, 1.0)
        self._tried = [_PRIOR_WEIGHT] * (len(edges) - 1)
        self._taken = [_PRIOR_WEIGHT * (a + b) / 2 for a, b in pairwise(edges)]

    def probability(self, guess: float) -> float:
        """Return the chance that the target takes an edge to which the draft gives probability `guess`."""
        index = bisect.bisect_right(_BIN_EDGES, guess)
        return self._taken[index] / self._tried[index]

    def observe(self, guess: float, *, taken: bool) -> None:
        """Record the fate of an edge whose parent the target reached."""
        index = bisect.bisect_right(_BIN_EDGES, guess)
        self._tried[index] = self._tried[index] * _MEMORY + 1.0
        self._taken[index] = self._taken[index] * _MEMORY + (1.0 if taken else 0.0)


class History:
    """Running averages of the outcomes of draft steps and passes."""

    def __init__(self) -> None:
        self.calibration = Calibration()
        self.child_shares: tuple[float, ...] = (0.8, 0.1, 0.05)
        """Mean chance of a node's best, second and third child, given that the target reaches the node."""
        self.step_yield = 0.9
        """Mean chance that a draft step adds, per chance of the nodes it expands."""
        self.passes_without_draft = 0
        """Passes over a root alone since the last drafted tree."""
        self._recent_tokens = 0.0
        self._recent_s = 0.0

    def tokens_per_s(self, expected_tokens: float, round_s: float) -> float:
        """Return the run's rate over recent rounds and one more that is expected to give these tokens."""
        return (expected_tokens + self._recent_tokens) / (round_s + self._recent_s)

    def gain(self, chance: float) -> float:
        """Return the tokens that expanding nodes of this total chance is likely to add."""
        return self.step_yield * chance

    def learn_child_shares(self, shares: Sequence[float]) -> None:
        """Record the chances of a node's children given the node, best first."""
        found = (*shares, 0.0, 0.0, 0.0)
        self.child_shares = tuple(
            mean + _SHARE_WEIGHT * (share - mean)
            for mean, share in zip(self.child_shares, found, strict=False)
        )

    def learn_yield(self, gained: float) -> None:
        """Record the chance that a draft step added, per chance of the nodes it expanded."""
        self.step_yield += _YIELD_WEIGHT * (min(gained, 1.0) - self.step_yield)

    def observe(self, tree: TokenTree, result: VerifyResult, *, pass_s: float, drafting_s: float) -> None:
        """Learn from a verified tree, with the costs of its pass and of the draft steps before it.

        Every child of a node on the target's path is evidence: it was taken or it was not.
        """
        self.passes_without_draft = 0 if len(tree) > 1 else self.passes_without_draft + 1
        self._recent_tokens = _RATE_MEMORY * self._recent_tokens + len(result.token_ids)
        self._recent_s = _RATE_MEMORY * self._recent_s + pass_s + drafting_s
        reached = set(result.accepted_nodes)
        for node, parent in enumerate(tree.parents[1:], start=1):
            if parent in reached:
                guess = math.exp(tree.log_probs[node] - tree.log_probs[parent])
                self.calibration.observe(guess, taken=node in reached)
