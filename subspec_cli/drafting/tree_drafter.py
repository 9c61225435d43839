"""The tree drafter: it grows token trees with the draft model, in scratch rows of the shared KV cache.

Every draft step expands the likeliest open nodes, at any depth. Serial steps run before a pass and make
its tree. Shadow steps run during the pass, while weights arrive, and look beyond the tree. The pass will end with a
node of the tree and a token below it that is not in the tree; the steps expand the likeliest of these pairs, and what
follows them where that is likelier than another pair. When the pass ends in a token that was drafted, what was found
below it begins the next tree.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from subspec_cli.decoding.drafter import Proposal
from subspec_cli.decoding.penalties import PathState
from subspec_cli.decoding.sampler import Sampler
from subspec_cli.decoding.verification import VerifyResult
from subspec_cli.drafting.draft_steps import SHARPENING, DraftSteps
from subspec_cli.drafting.frontier import Candidate, DraftContext, Frontier
from subspec_cli.drafting.growing_tree import ROOT, GrowingTree, NodeId, ScratchRow
from subspec_cli.drafting.history import History
from subspec_cli.drafting.ngram import NGramLookup
from subspec_cli.drafting.policy import LEAST_CHANCE, DraftPolicy, Outlook, TreeLimits
from subspec_cli.limits import MOST_ROWS
from subspec_cli.modeling.kv_cache import KVCache


class TreeDrafter:
    """Drafts for one answer after another; what it learns from verified trees is kept between answers."""

    def __init__(
        self,
        steps: DraftSteps,
        kv: KVCache,
        policy: DraftPolicy,
        *,
        eos_ids: Collection[int],
        sharpening: float = SHARPENING,
        history: History | None = None,
    ) -> None:
        self._shared = DraftContext(
            steps, kv, policy, history or History(), NGramLookup(), frozenset(eos_ids), sharpening
        )

    def begin(self, sampler: Sampler) -> TreeDraft:
        """Begin an answer: scratch rows and steps in flight of the last one are dropped."""
        self._shared.steps.begin(sampler)
        self._shared.ngrams.forget()
        return TreeDraft(self._shared)


@dataclass(slots=True)
class _Pass:
    """The tree under verification, and what its shadow has done."""

    frontier: Frontier
    proposal: Proposal
    max_depth: int
    """Depth of the last token that is still wanted, without the bonus token."""
    cached_rows: int
    """Committed rows when the pass begins."""
    spent_s: float = 0.0
    step_rows: list[ScratchRow] = field(default_factory=list)
    """First row of each shadow step."""

    def steps_with(self, rows: Sequence[ScratchRow]) -> int:
        """Return how many shadow steps computed one of these rows."""
        return len({bisect.bisect_right(self.step_rows, row) for row in rows})


class _Ready(NamedTuple):
    """What the last shadow has found below the newest token."""

    tree: GrowingTree
    steps: int
    """The shadow steps that found it."""


class TreeDraft:
    """The drafting for one answer: trees one after another, and the passes between them."""

    def __init__(self, shared: DraftContext) -> None:
        self._shared = shared
        self._ready: _Ready | None = None
        self._pass: _Pass | None = None

    def grow(self, root_token: int, tokens_wanted: int, state: PathState | None = None) -> Proposal:
        """Return a tree under the root; rows `[committed, committed + nodes)` of the cache are its scratch."""
        shared, policy = self._shared, self._shared.policy
        shared.steps.penalize(state)
        limits = policy.limits(tokens_wanted)
        tree, useful_steps = self._ready or _Ready(
            GrowingTree(root_token, limits.nodes + policy.shadow_rows), 0
        )
        assert tree.nodes[ROOT].token_id == root_token
        self._ready = None
        ready_nodes, ready_levels, steps, cost_s = tree.rows, tree.levels, 0, 0.0
        frontier = Frontier(tree, shared)
        shared.ngrams.learn([*shared.kv.token_ids, root_token])
        while True:
            if rows := self._next_rows(frontier, limits, cost_s):
                steps += 1
                cost_s += policy.step_s(len(rows), shared.kv.committed)
                frontier.start(rows)
            elif not frontier.is_drained:
                frontier.drain()  # and decide again, knowing all tokens
            elif gaps := tree.compact():
                shared.kv.move_scratch(gaps)  # which may leave room for more
            else:
                break
        frozen = tree.freeze(self._leaves(tree, limits, cost_s))
        proposal = Proposal(frozen, steps, cost_s, ready_nodes, ready_levels, useful_steps)
        self._pass = _Pass(frontier, proposal, max(0, tokens_wanted - 1), shared.kv.committed)
        return proposal

    def work_in_shadow(self, layer: int) -> int:
        """Expand what lies beyond the tree under verification, within this layer's share of idle time."""
        current, policy, steps = self._pass, self._shared.policy, 0
        if current is None or not policy.shadow_rows:
            return 0
        nodes = len(current.proposal.tree)
        while True:
            free_rows = min(MOST_ROWS, nodes + policy.shadow_rows - current.frontier.tree.rows)
            rows = current.frontier.offer(free_rows, free_rows, current.max_depth).rows
            count = policy.shadow_step_rows(
                [current.frontier.worth(row) for row in rows],
                layer=layer,
                nodes=nodes,
                spent_s=current.spent_s,
                cached_rows=current.cached_rows,
            )
            if not count:
                return steps
            current.spent_s += policy.step_s(count, current.cached_rows)
            current.step_rows.append(ScratchRow(current.frontier.tree.rows))
            current.frontier.start(rows[:count])
            steps += 1

    def learn(self, result: VerifyResult, *, ends: bool) -> None:
        """Learn from the outcome; keep the tree below the bonus token and move its rows to the new scratch."""
        current, shared = self._pass, self._shared
        self._pass = None
        if current is None:
            return
        verified = current.proposal.tree
        pass_s = shared.policy.costs.pass_s(len(verified), current.cached_rows)
        current.frontier.drain()
        tree = current.frontier.tree
        rankings = tree.rankings(result.accepted_nodes, result.token_ids)
        shared.history.observe(verified, result, rankings, pass_s=pass_s, drafting_s=current.proposal.cost_s)
        if ends:
            return
        outcome = tree.outcome(result.accepted_nodes[-1], result.token_ids[-1])
        if outcome is None:
            return
        limits = shared.policy.limits(current.max_depth + 1 - len(result.token_ids))
        kept, rows = tree.subtree(outcome, most_rows=limits.nodes - 1, max_depth=limits.depth)
        self._ready = _Ready(kept, current.steps_with(rows))
        # Rows were counted from where the cache ended before this pass was committed.
        shared.kv.move_scratch([row - len(result.token_ids) for row in rows])

    def _next_rows(self, frontier: Frontier, limits: TreeLimits, cost_s: float) -> list[Candidate]:
        """Return what to expand next; nothing when the tree is as large as it pays."""
        policy, tree, tip = self._shared.policy, frontier.tree, None
        free_rows = min(limits.nodes - 1 - frontier.nodes_at_most, tree.capacity - tree.rows)
        most_nodes = min(free_rows, limits.width)
        if policy.fixed.depth is not None:
            tip = frontier.tip(limits.depth)
            # The chain goes to its depth; other nodes share its steps if the rest of the chain leaves them rows.
            if tip is None:
                return []
            most_nodes = min(max(1, free_rows - (limits.depth - tip.depth - 1)), limits.width)
        if min(most_nodes, free_rows) < 1:
            return []
        offer = frontier.offer(most_nodes, min(free_rows, limits.width), limits.depth, first=tip)
        nodes = min(offer.nodes, limits.nodes)
        outlook = Outlook(offer.expected_tokens, nodes, cost_s, self._shared.kv.committed)
        chances = [row.chance for row in offer.rows]
        return offer.rows[: policy.serial_rows(chances, outlook, self._shared.history)]

    def _leaves(self, tree: GrowingTree, limits: TreeLimits, cost_s: float) -> list[NodeId]:
        """Return the open nodes worth verifying. They cost no draft step; the end of the chain is among them."""
        most = limits.nodes - tree.rows
        if tree.rows == 0:
            return [ROOT]
        tip = tree.tip()
        chosen = [tip] if most > 0 and tree.nodes[tip].row is None else []
        nodes, expected = tree.likely(LEAST_CHANCE)
        outlook = Outlook(expected, min(nodes, limits.nodes), cost_s, self._shared.kv.committed)
        least = self._shared.policy.least_leaf_chance(outlook, self._shared.history)
        open_nodes = tree.best_open(most, max_depth=limits.depth + 1, eos_ids=frozenset())
        others = [node for node in open_nodes if node != tip and tree.nodes[node].chance >= least]
        return [*chosen, *others][:most]
