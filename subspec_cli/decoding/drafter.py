"""Growing a token tree with the draft model, level by level, in scratch rows of the shared cache.

The draft's own greedy chain is always in the tree and always first; other nodes go where the draft is unsure.
A node is *expanded* if the draft looks for its children, else it stays a leaf that cost no draft step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch

from subspec_cli.decoding.batches import level_batch
from subspec_cli.decoding.choose import Chooser, Row
from subspec_cli.decoding.schedule import Schedule, TreeLimits
from subspec_cli.decoding.tree import TokenTree, TreeBuilder
from subspec_cli.modeling.decoder import DraftDecoder
from subspec_cli.modeling.kv_cache import KVCache

SHARPENING: Final = 0.2
"""Temperature of the draft's guess: low, so that side paths do not crowd out the likely one (SubSpec, 2509.18344)."""
_LEAF_CHANCE: Final = 0.02
"""Least chance to be on the target's path for a node to be worth verifying."""
_EXPAND_CHANCE: Final = 0.08
"""Least chance for a node beside the chain to be worth a row of the next draft step."""
_RANKED: Final = 8
"""Children looked at per node."""


class TreeGrower(Protocol):
    """What the engine asks for a tree."""

    def grow(self, root_token: int, chooser: Chooser, tokens_wanted: int) -> TokenTree:
        """A tree under `root_token`, the newest emitted token, with `tokens_wanted` more tokens to come."""
        ...


class RootOnly:
    """Plain decoding: a tree of one node, so one token a pass."""

    def grow(self, root_token: int, chooser: Chooser, tokens_wanted: int) -> TokenTree:  # noqa: ARG002
        """The root alone."""
        return TokenTree((root_token,), (-1,), (0,), (0.0,))


@dataclass(frozen=True, slots=True)
class _Candidate:
    parent: int
    token_id: int
    log_prob: float
    chance: float
    """Calibrated probability that the target's path goes through it."""


class Drafter:
    """Grows trees with the draft model under a schedule."""

    def __init__(
        self,
        draft: DraftDecoder,
        kv: KVCache,
        schedule: Schedule,
        *,
        eos_ids: Collection[int],
        device: torch.device,
        fixed_width: bool = False,
    ) -> None:
        self._draft = draft
        self._kv = kv
        self._schedule = schedule
        self._eos_ids = frozenset(eos_ids)
        self._device = device
        self._fixed_width = fixed_width
        self._yield = 0.9

    def grow(self, root_token: int, chooser: Chooser, tokens_wanted: int) -> TokenTree:
        """A tree under the root; rows `[committed, committed + nodes)` of the cache are scratch to it."""
        limits = self._schedule.limits(tokens_wanted)
        builder = TreeBuilder(root_token, limits.nodes)
        chances = {0: 1.0}
        first, count, steps = 0, 1, 0
        while steps < limits.depth and count and len(builder) < limits.nodes:
            frontier = sum(chances[node] for node in range(first, first + count))
            if not self._schedule.pays(
                expected_tokens=sum(chances.values()), gain=frontier * self._yield, steps=steps
            ):
                break
            ranked = self._step(builder, first, count, chooser, chances)
            if not ranked:
                break
            first, count = self._append_level(builder, ranked, chances, limits, limits.depth - steps)
            self._learn_yield(sum(chances[node] for node in range(first, len(builder))) / frontier)
            steps += 1
        return builder.finish()

    def _step(
        self, builder: TreeBuilder, first: int, count: int, chooser: Chooser, chances: dict[int, float]
    ) -> list[_Candidate]:
        """One draft forward over nodes `[first, first + count)`: their likeliest children, chain's first."""
        started = time.perf_counter()
        committed = self._kv.committed
        batch = level_batch(builder, first, count, committed, self._device)
        rows = self._draft.forward(batch, self._kv).double().cpu().numpy()
        found = []
        for node, row in zip(range(first, first + count), rows, strict=True):
            scores = chooser.scores(row, committed + builder.depth(node) + 1)
            for token_id, log_prob in likeliest(scores, _RANKED):
                chance = chances[node] * self._schedule.calibration.probability(math.exp(log_prob))
                found.append(_Candidate(node, token_id, builder.log_prob(node) + log_prob, chance))
        self._schedule.step_time.add(time.perf_counter() - started)
        return found

    def _append_level(
        self,
        builder: TreeBuilder,
        ranked: list[_Candidate],
        chances: dict[int, float],
        limits: TreeLimits,
        levels_left: int,
    ) -> tuple[int, int]:
        """Add the chain's next node and the best of the rest; returns the nodes to expand next."""
        first = len(builder)
        # The chain comes first in every level, so its best child is the first of the ranked.
        chain, rest = ranked[0], sorted(ranked[1:], key=lambda item: -item.chance)
        room = max(0, limits.nodes - first - levels_left)
        # A width that was asked for is kept to the node; else leaves, which cost no draft step, come on top.
        beside = limits.width - 1 if self._fixed_width else 2 * limits.width
        worth = [item for item in rest if self._fixed_width or item.chance >= _LEAF_CHANCE]
        level = [chain, *worth[: min(room, beside)]]
        expanded = [item for item in level if self._is_expanded(item, chain)][: limits.width]
        leaves = [item for item in level if item not in expanded]
        for item in (*expanded, *leaves):
            chances[builder.add(item.parent, item.token_id, item.log_prob)] = item.chance
        return first, len(expanded)

    def _is_expanded(self, item: _Candidate, chain: _Candidate) -> bool:
        if item.token_id in self._eos_ids:
            return False
        return item is chain or self._fixed_width or item.chance >= _EXPAND_CHANCE

    def _learn_yield(self, gained: float) -> None:
        self._yield += 0.1 * (min(gained, 1.0) - self._yield)


def likeliest(scores: Row, count: int) -> list[tuple[int, float]]:
    """The best (token id, log-probability) pairs of a row, sharpened, best first.

    Tokens that a filter forbids are left out; of a draft row that is not finite, nothing is proposed.
    """
    count = min(count, len(scores))
    best = np.argpartition(scores, -count)[-count:]
    best = best[np.isfinite(scores[best])]
    if not len(best):
        return []
    best = best[np.lexsort((best, -scores[best]))]
    # At this sharpness what lies beyond the ranked tokens weighs nothing that matters to a guess.
    sharp = (scores[best] - scores[best[0]]) / SHARPENING
    log_total = float(np.log(np.exp(sharp).sum()))
    return [
        (int(token), float(sharp_score) - log_total) for token, sharp_score in zip(best, sharp, strict=True)
    ]
