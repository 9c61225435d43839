"""How deep and how wide to draft: stop when one more level would earn fewer tokens a second than we make.

With E expected tokens of the tree so far, T the pass time, t the time of a draft step and d steps taken, one
more step that adds g expected tokens pays while g / t > E / (T + d t). T and t are measured as the run goes;
what the draft says of its own chances is calibrated by what the target really took.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from subspec_cli.decoding.tree import TokenTree
from subspec_cli.decoding.verify import VerifyResult

_BIN_EDGES: Final = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97, 0.995)
_PRIOR_WEIGHT: Final = 4.0
_MEMORY: Final = 0.98
"""Weight that older observations keep when a new one of their bin comes in."""
_PROBE_EVERY: Final = 24
"""Passes without a draft before speculation is tried again."""


@dataclass(frozen=True, slots=True)
class TreeLimits:
    """Hard bounds of one tree."""

    depth: int
    """Most levels below the root."""
    width: int
    """Most nodes forwarded per draft step."""
    nodes: int
    """Most nodes in all, root included."""


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


class RunningTime:
    """Smoothed duration of something that repeats."""

    def __init__(self) -> None:
        self._mean_s: float | None = None

    def add(self, seconds: float) -> None:
        """Record one duration; a single outlier moves the mean by no more than half of it."""
        if self._mean_s is None:
            self._mean_s = seconds
        else:
            self._mean_s += 0.2 * (min(seconds, 3.5 * self._mean_s) - self._mean_s)

    def get(self, default_s: float) -> float:
        """The mean, or a default before the first."""
        return default_s if self._mean_s is None else self._mean_s


class Schedule:
    """Cost-aware depth, calibrated as it runs; `fixed_depth` turns the cost rule off."""

    def __init__(self, *, limits: TreeLimits, fixed_depth: bool) -> None:
        self._limits = limits
        self._fixed_depth = fixed_depth
        self.calibration = Calibration()
        self.step_time = RunningTime()
        self.pass_time = RunningTime()
        self._passes_without_draft = 0

    def limits(self, tokens_wanted: int) -> TreeLimits:
        """Bounds for a tree when `tokens_wanted` more tokens may be emitted (the bonus token is one of them)."""
        depth = max(0, min(self._limits.depth, tokens_wanted - 1))
        return TreeLimits(depth, self._limits.width, self._limits.nodes)

    def pays(self, *, expected_tokens: float, gain: float, steps: int) -> bool:
        """Whether one more draft step, expected to add `gain` tokens, is worth its time."""
        if self._fixed_depth:
            return True
        if steps == 0 and self._passes_without_draft >= _PROBE_EVERY:
            return True
        step_s = self.step_time.get(1.0)
        pass_s = self.pass_time.get(20.0 * step_s)
        return gain / step_s > expected_tokens / (pass_s + steps * step_s)

    def observe(self, tree: TokenTree, result: VerifyResult) -> None:
        """Learn from a verified tree: every child of a node on the target's path was taken or not."""
        self._passes_without_draft = 0 if len(tree) > 1 else self._passes_without_draft + 1
        reached = set(result.accepted_nodes)
        for node, parent in enumerate(tree.parents[1:], start=1):
            if parent in reached:
                guess = math.exp(tree.log_probs[node] - tree.log_probs[parent])
                self.calibration.observe(guess, taken=node in reached)
