"""Growing token trees with the draft model, in scratch rows of the shared cache.

Every draft step expands the likeliest open nodes, at whatever depth they lie. Serial steps come before a pass
and make its tree; shadow steps come during it, while weights arrive, and look beyond the tree: what follows if
its best leaf is taken, what if the target leaves it for a runner-up. When the pass ends in a token that was
foreseen, what was found out below it is the beginning of the next tree.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from subspec_cli.decoding.drafter import Proposal
from subspec_cli.decoding.sampler import Sampler
from subspec_cli.decoding.verification import VerifyResult
from subspec_cli.drafting.draft_steps import DraftSteps
from subspec_cli.drafting.frontier import Candidate, Drafting, Frontier
from subspec_cli.drafting.growing_tree import GrowingTree
from subspec_cli.drafting.ngram import ContinuationLookup
from subspec_cli.drafting.ranking import SHARPENING
from subspec_cli.drafting.schedule import LEAST_CHANCE, Schedule, TreeLimits
from subspec_cli.limits import MOST_ROWS
from subspec_cli.modeling.kv_cache import KVCache


class Drafter:
    """Grows trees with draft steps under a schedule."""

    def __init__(
        self,
        steps: DraftSteps,
        kv: KVCache,
        schedule: Schedule,
        *,
        eos_ids: Collection[int],
        sharpening: float = SHARPENING,
    ) -> None:
        self._kv = kv
        self._schedule = schedule
        self._shared = Drafting(steps, kv, schedule, ContinuationLookup(), frozenset(eos_ids), sharpening)
        self._ready: GrowingTree | None = None
        self._pass: _Pass | None = None

    def grow(self, root_token: int, sampler: Sampler, tokens_wanted: int) -> Proposal:
        """A tree under the root; rows `[committed, committed + nodes)` of the cache are scratch to it."""
        limits = self._schedule.limits(tokens_wanted)
        tree = self._ready or GrowingTree(root_token, limits.nodes + self._schedule.most_shadow_rows)
        assert tree.nodes[0].token_id == root_token
        self._ready = None
        ready, steps, cost_s = tree.rows, 0, 0.0
        frontier = Frontier(tree, self._shared)
        self._shared.lookup.learn([*self._kv.token_ids, root_token])
        while True:
            if rows := self._next_serial(frontier, limits, cost_s):
                steps += 1
                cost_s += self._schedule.step_s(len(rows))
                frontier.start(rows, sampler)
            elif not frontier.is_settled:
                frontier.settle()  # and decide again, knowing all
            elif gaps := tree.compact():
                self._kv.move_scratch(gaps)  # which may leave room for more
            else:
                break
        proposed = tree.freeze(self._leaves(tree, limits, cost_s))
        proposal = Proposal(proposed, steps, ready, cost_s)
        self._pass = _Pass(frontier, sampler, proposal, max_depth=max(0, tokens_wanted - 1))
        return proposal

    def work_in_shadow(self, layer: int) -> int:
        """Expand what lies beyond the tree being verified, as far as this layer's share of idle time goes."""
        now, steps = self._pass, 0
        if now is None or not self._schedule.most_shadow_rows:
            return 0
        nodes = len(now.proposal.tree)
        while True:
            room = nodes + self._schedule.most_shadow_rows - now.frontier.tree.rows
            room = min(MOST_ROWS, room)
            rows = now.frontier.candidates(room, room, now.max_depth)
            count = self._schedule.shadow_step(
                [row.chance for row in rows], layer=layer, nodes=nodes, spent_s=now.spent_s
            )
            if not count:
                return steps
            now.spent_s += self._schedule.step_s(count)
            now.frontier.start(rows[:count], now.sampler)
            steps += 1

    def learn(self, result: VerifyResult, *, ends: bool) -> None:
        """Calibrate by the outcome; keep the tree below the bonus token, its rows moved to the new scratch."""
        now = self._pass
        self._pass = None
        if now is None:
            return
        self._schedule.observe(now.proposal.tree, result, now.proposal.cost_s)
        if ends:
            return
        now.frontier.settle()
        tree = now.frontier.tree
        outcome = tree.outcome(result.accepted_nodes[-1], result.token_ids[-1])
        if outcome is None:
            return
        wanted = now.max_depth + 1 - len(result.token_ids)
        limits = self._schedule.limits(wanted)
        self._ready, rows = tree.subtree(outcome, most_rows=limits.nodes - 1, max_depth=limits.depth)
        # Rows were counted from where the cache ended before this pass was committed.
        self._kv.move_scratch([row - len(result.token_ids) for row in rows])

    def forget(self) -> None:
        """Drop tree and findings: their rows belong to another answer."""
        self._shared.steps.drop()
        self._ready = self._pass = None
        self._shared.lookup.forget()

    def _next_serial(self, frontier: Frontier, limits: TreeLimits, cost_s: float) -> list[Candidate]:
        """What to expand next; nothing when the tree is as large as it pays."""
        schedule, tree, tip = self._schedule, frontier.tree, None
        free = min(limits.nodes - 1 - frontier.nodes_at_most, tree.capacity - tree.rows)
        room = min(free, limits.width)
        if schedule.fixed.depth is not None:
            tip = frontier.tip(limits.depth)
            # The chain goes to its depth; others share its steps, as far as the rest of the chain leaves room.
            if tip is None:
                return []
            room = min(max(1, free - (limits.depth - tip.depth - 1)), limits.width)
        if min(room, free) < 1:
            return []
        rows = frontier.candidates(room, min(free, limits.width), limits.depth, first=tip)
        nodes, expected = frontier.outlook()
        count = schedule.serial_rows(
            [row.chance for row in rows],
            expected_tokens=expected,
            nodes=min(nodes, limits.nodes),
            spent_s=cost_s,
        )
        return rows[:count]

    def _leaves(self, tree: GrowingTree, limits: TreeLimits, cost_s: float) -> list[int]:
        """Open nodes worth verifying: they cost no draft step. The end of the chain is always among them."""
        room = limits.nodes - tree.rows
        if tree.rows == 0:
            return [0]
        tip = tree.tip()
        chosen = [tip] if room > 0 and tree.nodes[tip].row < 0 else []
        nodes, expected = tree.likely(LEAST_CHANCE)
        least = self._schedule.leaf_chance(
            expected_tokens=expected, nodes=min(nodes, limits.nodes), spent_s=cost_s
        )
        able = tree.best_open(room, max_depth=limits.depth + 1, eos_ids=frozenset())
        others = [number for number in able if number != tip and tree.nodes[number].chance >= least]
        return [*chosen, *others][:room]


@dataclass(slots=True)
class _Pass:
    """The tree under verification, and what its shadow has done."""

    frontier: Frontier
    sampler: Sampler
    proposal: Proposal
    max_depth: int
    """Depth of the last token that is still wanted, less the bonus token."""
    spent_s: float = 0.0
