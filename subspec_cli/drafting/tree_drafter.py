"""The tree drafter: it grows token trees with the draft model, in scratch rows of the KV caches.

Every draft step expands the likeliest open nodes, at any depth. Serial steps run before a pass and make
its tree. Shadow steps run during the pass, while weights arrive, and look beyond the tree. The pass will end with a
node of the tree and a token below it that is not in the tree; the steps expand the likeliest of these pairs, and what
follows them where that is likelier than another pair. When the pass ends in a token that was drafted, what was found
below it begins the next tree.

The trees of several answers grow together. Their candidates share the rows of a step by their chances, so a row goes
where it adds most tokens to the round.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

from subspec_cli.decoding.drafter import Proposal, TreeOrder
from subspec_cli.decoding.penalties import PathState
from subspec_cli.decoding.sampler import Sampler
from subspec_cli.decoding.verification import VerifyResult
from subspec_cli.drafting.draft_steps import SHARPENING, DraftSteps
from subspec_cli.drafting.frontier import Candidate, DraftContext, DraftRules, Frontier, Offer
from subspec_cli.drafting.growing_tree import ROOT, GrowingTree, NodeId, ScratchRow
from subspec_cli.drafting.history import History
from subspec_cli.drafting.ngram import NGramLookup
from subspec_cli.drafting.policy import LEAST_CHANCE, DraftPolicy, Outlook, PassUnderWay, TreeLimits
from subspec_cli.drafting.step_queue import Choice, StepQueue, merged
from subspec_cli.limits import MOST_ROWS
from subspec_cli.modeling.kv_cache import KVCache


class TreeDrafter:
    """Drafts for answers; what it learns from verified trees is kept between them."""

    def __init__(
        self,
        steps: DraftSteps,
        policy: DraftPolicy,
        *,
        eos_ids: Collection[int],
        sharpening: float = SHARPENING,
        history: History | None = None,
    ) -> None:
        self._steps = steps
        self._queue = StepQueue(steps)
        self._policy = policy
        self._history = history or History()
        self._rules = DraftRules(policy, self._history, frozenset(eos_ids), sharpening)
        self._ngrams: dict[KVCache, NGramLookup] = {}
        self._passes: list[_Pass] = []
        self._drafted_s = self._shadow_s = 0.0

    def begin(self, sampler: Sampler, kv: KVCache) -> TreeDraft:
        """Begin an answer: scratch rows and steps in flight of the last one over this cache are dropped."""
        ngrams = self._ngrams.setdefault(kv, NGramLookup())
        ngrams.forget()
        self._queue.forget()
        calibration = self._history.calibration.copy()
        steps = self._steps.begin(kv, sampler)
        return TreeDraft(DraftContext(self._rules, steps, kv, ngrams, calibration), self._queue)

    def grow(self, orders: Sequence[TreeOrder[TreeDraft]]) -> list[Proposal]:
        """Return the trees of one pass; rows `[committed, committed + nodes)` of each cache are a tree's scratch."""
        policy = self._policy
        self._queue.drain()  # a round that failed may have left shadow steps in flight
        growths = [_Growth(order, policy.limits(order.tokens_wanted), policy.shadow_rows) for order in orders]
        # A shape that the user fixed is each tree's own.
        groups = [[growth] for growth in growths] if policy.fixed.is_set else [growths]
        spent_s = sum(self._grow(group) for group in groups)
        self._passes = self._frozen(growths, spent_s)
        self._drafted_s, self._shadow_s = spent_s, 0.0
        return [current.proposal for current in self._passes]

    def _grow(self, growths: Sequence[_Growth]) -> float:
        """Grow trees together; return what their draft steps cost."""
        frontiers, spent_s = [growth.frontier for growth in growths], 0.0
        while True:
            if choices := self._next_rows(growths, spent_s):
                cost_s = self._policy.step_s(len(choices), _cached_rows(growths))
                spent_s += cost_s
                for number in self._queue.start(frontiers, choices):
                    growths[number].steps += 1
                    growths[number].cost_s += cost_s
            elif not self._queue.is_drained:
                self._queue.drain()  # and decide again, knowing all tokens
            elif sum(growth.compact() for growth in growths) == 0:  # closing gaps may leave room
                return spent_s

    def work_in_shadow(self, layer: int) -> None:
        """Expand what lies beyond the trees under verification, within this layer's share of idle time."""
        policy, passes = self._policy, self._passes
        if not passes or not policy.shadow_rows:
            return
        frontiers = [current.frontier for current in passes]
        under_way = PassUnderWay(
            sum(len(current.proposal.tree) for current in passes),
            self._drafted_s,
            fmean(current.cached_rows for current in passes),
        )
        while True:
            choices = merged((current.frontier, current.offer(policy.shadow_rows)) for current in passes)
            worths = [choice.worth for choice in choices]
            count = policy.shadow_step_rows(worths, under_way, layer=layer, shadow_s=self._shadow_s)
            if not count:
                return
            self._shadow_s += policy.step_s(count, under_way.cached_rows)
            for number in {choice.number for choice in choices[:count]}:
                passes[number].step_rows.append(ScratchRow(frontiers[number].tree.rows))
            self._queue.start(frontiers, choices[:count])

    def _next_rows(self, growths: Sequence[_Growth], spent_s: float) -> list[Choice]:
        """Return what to expand next; nothing when the trees are as large as it pays."""
        left = self._policy.pass_nodes - sum(growth.frontier.nodes_at_most + 1 for growth in growths)
        offers = [growth.offer(left, keeps_chain=self._policy.fixed.depth is not None) for growth in growths]
        outlook = Outlook(
            sum(offer.expected_tokens for offer in offers),
            sum(min(offer.nodes, growth.limits.nodes) for offer, growth in zip(offers, growths, strict=True)),
            spent_s,
            _cached_rows(growths),
        )
        choices = merged((growth.frontier, offer.rows) for growth, offer in zip(growths, offers, strict=True))
        chances = [choice.candidate.chance for choice in choices]
        return choices[: min(self._policy.serial_rows(chances, outlook, self._history), max(0, left))]

    def _frozen(self, growths: Sequence[_Growth], spent_s: float) -> list[_Pass]:
        """Add leaves to the trees, which are then to be verified in one pass."""
        cached_rows = _cached_rows(growths)
        for growth, leaves in zip(growths, self._leaves(growths, spent_s), strict=True):
            growth.freeze(leaves)
        nodes = sum(len(growth.proposal.tree) for growth in growths)
        share_s = (self._policy.costs.pass_s(nodes, cached_rows, spent_s) + spent_s) / len(growths)
        return [growth.as_pass(share_s) for growth in growths]

    def _leaves(self, growths: Sequence[_Growth], spent_s: float) -> list[list[NodeId]]:
        """Return the open nodes worth verifying, by tree. They cost no draft step; chains end with one of them."""
        likely = [growth.tree.likely(LEAST_CHANCE) for growth in growths]
        outlook = Outlook(
            sum(expected for _, expected in likely),
            sum(min(nodes, growth.limits.nodes) for (nodes, _), growth in zip(likely, growths, strict=True)),
            spent_s,
            _cached_rows(growths),
        )
        least = self._policy.least_leaf_chance(outlook, self._history)
        found = [growth.leaves(least) for growth in growths]
        nodes = sum(growth.tree.rows + len(leaves) for growth, leaves in zip(growths, found, strict=True))
        for _ in range(nodes - self._policy.pass_nodes):
            able = [
                (growth.tree.nodes[leaves[-1]].chance, number)
                for number, (growth, leaves) in enumerate(zip(growths, found, strict=True))
                if len(leaves) > growth.least_leaves
            ]
            if able:
                found[min(able)[1]].pop()
        return found


def _cached_rows(growths: Sequence[_Growth]) -> float:
    return fmean(growth.cached_rows for growth in growths)


@dataclass(slots=True)
class _Pass:
    """The tree under verification, and what its shadow has done."""

    frontier: Frontier
    proposal: Proposal
    max_depth: int
    """Depth of the last token that is still wanted, without the bonus token."""
    cached_rows: int
    """Committed rows when the pass begins."""
    round_s: float
    """The answer's share of what the round costs."""
    step_rows: list[ScratchRow] = field(default_factory=list)
    """First row of each shadow step."""

    def offer(self, shadow_rows: int) -> list[Candidate]:
        """Return what the shadow may expand next, in at most so many rows beyond the tree in all."""
        free_rows = len(self.proposal.tree) + shadow_rows - self.frontier.tree.rows
        most = max(0, min(MOST_ROWS, free_rows))
        return self.frontier.offer(most, most, self.max_depth).rows

    def steps_with(self, rows: Sequence[ScratchRow]) -> int:
        """Return how many shadow steps computed one of these rows."""
        return len({bisect.bisect_right(self.step_rows, row) for row in rows})


class _Ready(NamedTuple):
    """What the last shadow has found below the newest token."""

    tree: GrowingTree
    steps: int
    """The shadow steps that found it."""


class _Growth:
    """A tree while serial steps make it."""

    def __init__(self, order: TreeOrder[TreeDraft], limits: TreeLimits, shadow_rows: int) -> None:
        self.limits = limits
        self.steps, self.cost_s = 0, 0.0
        self._order = order
        self._ready = order.draft.begin_tree(order.root_token, limits.nodes + shadow_rows, order.state)
        self.tree = self._ready.tree
        assert self.tree.nodes[ROOT].token_id == order.root_token
        self._ready_nodes, self._ready_levels = self.tree.rows, self.tree.levels
        constraint = None if order.state is None else order.state.constraint
        self.frontier = Frontier(self.tree, order.draft.context, constraint)
        self.proposal: Proposal

    @property
    def cached_rows(self) -> int:
        """Committed rows of the answer."""
        return self._order.draft.context.kv.committed

    def offer(self, left: int, *, keeps_chain: bool) -> Offer:
        """Return the candidates for the next step, if the pass has room for `left` more nodes.

        If `keeps_chain`, the draft's greedy chain goes on to its depth; other nodes share its steps where the rest of
        the chain leaves them rows.
        """
        limits, tree, tip = self.limits, self.tree, None
        free_rows = min(limits.nodes - 1 - self.frontier.nodes_at_most, left, tree.capacity - tree.rows)
        most_nodes = min(free_rows, limits.width)
        if keeps_chain:
            tip = self.frontier.tip(limits.depth)
            if tip is not None:
                most_nodes = min(max(1, free_rows - (limits.depth - tip.depth - 1)), limits.width)
        if min(most_nodes, free_rows) < 1 or (keeps_chain and tip is None):
            return self.frontier.offer(0, 0, limits.depth)
        return self.frontier.offer(most_nodes, min(free_rows, limits.width), limits.depth, first=tip)

    def compact(self) -> bool:
        """Close the gaps of unused rows, once no step is in flight; return whether there were any."""
        gaps = self.tree.compact()
        if gaps:
            self._order.draft.context.kv.move_scratch(gaps)
        return bool(gaps)

    @property
    def least_leaves(self) -> int:
        """Leaves that the tree keeps: the root alone, or the end of the chain."""
        return 1 if not self.tree.rows or self.tree.nodes[self.tree.tip()].row is None else 0

    def leaves(self, least: float) -> list[NodeId]:
        """Return the end of the chain, then open nodes of at least this chance, likeliest first."""
        tree, limits = self.tree, self.limits
        most = limits.nodes - tree.rows
        if tree.rows == 0:
            return [ROOT]
        tip = tree.tip()
        chosen = [tip] if most > 0 and tree.nodes[tip].row is None else []
        open_nodes = tree.best_open(most, max_depth=limits.depth + 1, eos_ids=frozenset())
        others = [node for node in open_nodes if node != tip and tree.nodes[node].chance >= least]
        return [*chosen, *others][:most]

    def freeze(self, leaves: Sequence[NodeId]) -> None:
        """End the growth: what the tree proposes is known."""
        frozen = self.tree.freeze(leaves)
        ready = self._ready_nodes, self._ready_levels, self._ready.steps
        self.proposal = Proposal(frozen, self.steps, self.cost_s, *ready)

    def as_pass(self, round_s: float) -> _Pass:
        """Return the tree under verification; the answer's share of the round costs `round_s`."""
        max_depth = max(0, self._order.tokens_wanted - 1)
        current = _Pass(self.frontier, self.proposal, max_depth, self.cached_rows, round_s)
        self._order.draft.current = current
        return current


class TreeDraft:
    """The drafting for one answer: trees one after another, and the passes between them."""

    def __init__(self, context: DraftContext, queue: StepQueue) -> None:
        self.context = context
        self.current: _Pass | None = None
        """The pass under way."""
        self._queue = queue
        self._ready: _Ready | None = None
        self._last_steps = 0

    @property
    def shadow_steps(self) -> int:
        """Steps with rows of this answer in the shadow of the pass under way, or of the last one."""
        return self._last_steps if self.current is None else len(self.current.step_rows)

    def begin_tree(self, root_token: int, capacity: int, state: PathState | None) -> _Ready:
        """Return the next tree: what the last shadow has found below the root, or the root alone."""
        self.context.steps.penalize(None if state is None or state.penalties.do_nothing else state)
        ready, self._ready = self._ready or _Ready(GrowingTree(root_token, capacity), 0), None
        self.context.ngrams.learn([*self.context.kv.token_ids, root_token])
        return ready

    def learn(self, result: VerifyResult, *, ends: bool) -> None:
        """Learn from the outcome; keep the tree below the bonus token and move its rows to the new scratch."""
        current, rules = self.current, self.context.rules
        if current is None:
            return
        self._last_steps, self.current = self.shadow_steps, None
        self._queue.drain()
        tree = current.frontier.tree
        rankings = tree.rankings(result.accepted_nodes, result.token_ids)
        rules.history.observe(current.proposal.tree, result, rankings, round_s=current.round_s)
        for ranking in rankings:
            self.context.calibration.observe(ranking)
        if ends:
            return
        outcome = tree.outcome(result.accepted_nodes[-1], result.token_ids[-1])
        if outcome is None:
            return
        limits = rules.policy.limits(current.max_depth + 1 - len(result.token_ids))
        kept, rows = tree.subtree(outcome, most_rows=limits.nodes - 1, max_depth=limits.depth)
        self._ready = _Ready(kept, current.steps_with(rows))
        # Rows were counted from where the cache ended before this pass was committed.
        self.context.kv.move_scratch([row - len(result.token_ids) for row in rows])
