"""The frontier of a growing tree: candidates for the next draft step, steps in flight, and their results.

Draft steps are pipelined up to one deep. While step k is in flight, its tokens are unknown to the host. So step k+1
may contain placeholder rows, "child of rank r of row i of step k", whose tokens it takes on the device. The host
learns which nodes they were when it reads step k.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from subspec_cli.decoding.constraint import Constraint
from subspec_cli.decoding.sampler import Row
from subspec_cli.drafting.draft_steps import Feed, Found, Ids, SequenceSteps, StepPart, StepRow, likeliest
from subspec_cli.drafting.growing_tree import ROOT, GrowingTree, NodeId, ScratchRow, draft_batch
from subspec_cli.drafting.history import Calibration, History
from subspec_cli.drafting.ngram import LONGEST, Guess, NGramLookup
from subspec_cli.drafting.policy import LEAST_CHANCE, DraftPolicy
from subspec_cli.modeling.kv_cache import KVCache

_GUESSES: Final = 4
"""Most n-gram guesses that are tried in one draft step."""


@dataclass(frozen=True, slots=True)
class OpenNode:
    """A candidate for an open node."""

    chance: float
    """Chance that the target's path goes through it."""
    depth: int
    node: NodeId


@dataclass(frozen=True, slots=True)
class Placeholder:
    """A candidate for a child that the step in flight will find."""

    chance: float
    depth: int
    feed: Feed


@dataclass(frozen=True, slots=True)
class NGram:
    """A candidate for an n-gram guess below the row before it."""

    chance: float
    depth: int
    guess: Guess
    after: int
    """The token that the guess continues."""


Candidate = OpenNode | Placeholder | NGram


class Offer(NamedTuple):
    """Candidates for the next draft step, and the value of the tree without that step."""

    rows: list[Candidate]
    """Likeliest first."""
    nodes: int
    """Nodes worth a row of the pass, once all steps in flight are read."""
    expected_tokens: float
    """Tokens expected of a pass over these nodes."""


@dataclass(frozen=True, slots=True)
class DraftRules:
    """Policy, history and constants that all trees of a drafter share."""

    policy: DraftPolicy
    history: History
    eos_ids: frozenset[int]
    sharpening: float


@dataclass(frozen=True, slots=True)
class DraftContext:
    """What the trees of one answer share."""

    rules: DraftRules
    steps: SequenceSteps
    kv: KVCache
    ngrams: NGramLookup
    calibration: Calibration
    """The answer's own: what holds for prose is wrong for the code beside it."""


@dataclass(slots=True)
class _StepInFlight:
    """A draft step that was started and not read."""

    rows: tuple[Candidate, ...]
    first: ScratchRow
    """Scratch row of the first candidate."""
    nodes: list[NodeId | None]
    """Node of each row; None if the node is not known yet or does not exist."""


class Frontier:
    """A growing tree, and the draft steps that grow it."""

    def __init__(self, tree: GrowingTree, shared: DraftContext, constraint: Constraint | None = None) -> None:
        """`constraint` is what a grammar knows behind the root."""
        self.tree = tree
        self._shared = shared
        self._constraints = {} if constraint is None else {ROOT: constraint}
        self._policy, self._history = shared.rules.policy, shared.rules.history
        self._in_flight: deque[_StepInFlight] = deque()

    @property
    def nodes_at_most(self) -> int:
        """Number of nodes with a row, and of rows that may still get a node."""
        undecided = sum(step.nodes.count(None) for step in self._in_flight)
        return self.tree.expanded + undecided

    def tip(self, max_depth: int) -> OpenNode | Placeholder | None:
        """Return the end of the draft's own greedy chain, if it may be expanded."""
        tip = self.tree.tip()
        node = self.tree.nodes[tip]
        if self._is_end(tip):
            return None
        if node.row is None:
            return OpenNode(node.chance, node.depth, tip) if node.depth < max_depth else None
        for step in self._in_flight:
            if tip in step.nodes and node.depth + 1 < max_depth:
                chance = node.chance * self._history.child_shares[0]
                return Placeholder(chance, node.depth + 1, Feed(StepRow(step.nodes.index(tip)), 0))
        return None

    def offer(
        self, most_nodes: int, most_rows: int, max_depth: int, *, first: Candidate | None = None
    ) -> Offer:
        """Return the candidates for the next step.

        Up to `most_nodes` nodes and placeholders, `first` before all others, and n-gram guesses below the first of
        them: at most `most_rows` in all.
        """
        nodes, expected = self.tree.likely(LEAST_CHANCE)
        chances = [chance for step in self._in_flight for _, chance in self._parents(step)]
        rows = self._candidates(most_nodes, most_rows, max_depth, first)
        return Offer(rows, nodes + len(chances), expected + self._history.gain(sum(chances)))

    def worth(self, candidate: Candidate) -> float:
        """Return the levels that a row for a candidate is likely to save the draft.

        If the path ends above a node and its token comes next, the node's row saves a level. A leaf under
        verification saves none: what comes next is below it, so its own row is only half of what that takes.
        """
        if isinstance(candidate, OpenNode) and candidate.node in self.tree.leaves:
            return candidate.chance * self._history.child_shares[0] / 2
        return candidate.chance

    def prepare(self, rows: Sequence[Candidate]) -> StepPart:
        """Take rows for candidates, with the n-grams below the first one, and return the tree's part of a step."""
        nodes = [row for row in rows if not isinstance(row, NGram)]
        ngrams = [row for row in rows if isinstance(row, NGram)]
        # The likeliest node comes just before the n-grams, so that the rows of right guesses continue its own row.
        ordered = (*nodes[1:], nodes[0], *ngrams)
        first = ScratchRow(self.tree.rows)
        tokens = [self._take_row(candidate) for candidate in ordered]
        batch = draft_batch(self.tree, tokens, self._shared.kv.committed)
        known = [row.node if isinstance(row, OpenNode) else None for row in ordered]
        self._in_flight.append(_StepInFlight(ordered, first, known))
        feeds = [row.feed if isinstance(row, Placeholder) else None for row in ordered]
        return StepPart(self._shared.steps, batch, feeds, self._allowed(ordered))

    def take(self, found: Found) -> None:
        """Add to the tree what the oldest step in flight has found."""
        step = self._in_flight.popleft()
        expanded = gained = 0.0
        for row, candidate in enumerate(step.rows):
            if isinstance(candidate, NGram):
                step.nodes[row] = self._confirm_guess(step, row, candidate)
            node = step.nodes[row]
            if node is None or self._is_end(node):
                continue
            expanded += self.tree.nodes[node].chance
            gained += self._add_children(node, found.token_ids[row], found.scores[row])
        # Steps in the shadow of a pass expand what is unlikely; they say nothing of steps before one.
        if expanded > 0 and not self.tree.is_frozen:
            self._history.learn_yield(gained / expanded)
        if self._in_flight:
            self._resolve_placeholders(self._in_flight[0], step, found.token_ids)
        else:
            self.tree.release_unused()

    def _allowed(self, rows: Sequence[Candidate]) -> NDArray[np.bool_] | None:
        """Return what a grammar lets follow each row; anything where the host does not know the row's token yet."""
        if not self._constraints or not self._shared.steps.takes_masks:
            return None
        masks: list[NDArray[np.bool_]] = []
        state: Constraint | None = None
        for row in rows:
            match row:
                case OpenNode(node=node):
                    state = self._constraint_of(node)
                case NGram(guess=guess) if state is not None:
                    state = state.after(guess.token_id)  # it continues the row before it
                case _:
                    state = None
            masks.append(
                np.ones_like(self._constraints[ROOT].allowed()) if state is None else state.allowed()
            )
        return np.stack(masks)

    def _constraint_of(self, node: NodeId) -> Constraint:
        """Return what the grammar knows behind a node."""
        if node not in self._constraints:
            found = self.tree.nodes[node]
            assert found.parent is not None
            self._constraints[node] = self._constraint_of(found.parent).after(found.token_id)
        return self._constraints[node]

    def _candidates(
        self, most_nodes: int, most_rows: int, max_depth: int, first: Candidate | None
    ) -> list[Candidate]:
        # A leaf is worth less than its chance, so it must not crowd out what is worth more.
        count = most_nodes + len(self.tree.leaves)
        opened = self.tree.best_open(count, max_depth=max_depth, eos_ids=self._shared.rules.eos_ids)
        found: list[Candidate] = [
            *(OpenNode(self.tree.nodes[node].chance, self.tree.nodes[node].depth, node) for node in opened),
            *self._placeholders(max_depth),
        ]
        found.sort(key=lambda candidate: -self.worth(candidate))
        if first is not None:
            found = [first, *(other for other in found if other != first)]
        found = found[:most_nodes]
        if not found or self._policy.fixed.width is not None:
            return found
        # The first candidate stays first. Guesses stay in their order, since none is likelier than the one before.
        others = [*found[1:], *self._ngrams(found[0], len(found), most_rows, max_depth)]
        return [found[0], *sorted(others, key=lambda candidate: -self.worth(candidate))][:most_rows]

    def _take_row(self, candidate: Candidate) -> int:
        """Take a scratch row for a candidate; return its token, or the root's in place of a placeholder's."""
        match candidate:
            case OpenNode(node=node):
                self.tree.expand(node)
                return self.tree.nodes[node].token_id
            case Placeholder(feed=feed):
                self.tree.take_row(ScratchRow(self._in_flight[-1].first + feed.row), candidate.depth)
                return self.tree.nodes[ROOT].token_id
            case NGram(guess=guess):
                self.tree.take_row(ScratchRow(self.tree.rows - 1), candidate.depth)
                return guess.token_id

    def _is_end(self, node: NodeId) -> bool:
        return node != ROOT and self.tree.nodes[node].token_id in self._shared.rules.eos_ids

    def _parents(self, step: _StepInFlight) -> Iterator[tuple[StepRow, float]]:
        """Yield the rows of a step in flight that may have children, and the chance of their nodes."""
        for row, (candidate, node) in enumerate(zip(step.rows, step.nodes, strict=True)):
            if node is not None and not self._is_end(node):
                yield StepRow(row), self.tree.nodes[node].chance
            elif isinstance(candidate, NGram):
                yield StepRow(row), candidate.chance

    def _placeholders(self, max_depth: int) -> Iterator[Placeholder]:
        """Yield the children that the step in flight will find, at their mean chances."""
        for step in self._in_flight:
            for row, chance in self._parents(step):
                depth, below = step.rows[row].depth + 1, step.rows[row + 1 : row + 2]
                # The child of a right n-gram guess has a row already.
                taken = sum(other.chance for other in below if isinstance(other, NGram))
                for rank, share in enumerate(self._history.child_shares):
                    if depth < max_depth:
                        left = chance * share - (taken if rank == 0 else 0.0)
                        yield Placeholder(max(0.0, left), depth, Feed(row, rank))

    def _ngrams(self, first: Candidate, rows: int, most_rows: int, max_depth: int) -> Iterator[NGram]:
        """Yield n-gram guesses below a candidate, while one more row pays."""
        node, unknown = self._known_above(first)
        most = min(_GUESSES, most_rows - 1, max_depth - first.depth - 1)
        if node is None or most < 1:
            return
        agreed, after = 1.0, self.tree.nodes[node].token_id
        for place, guess in enumerate(self._shared.ngrams.guesses(self._context(node), unknown + most)):
            agreed *= guess.chance
            if guess.token_id in self._shared.rules.eos_ids:
                return
            if place >= unknown:
                cached_rows = self._shared.kv.committed
                if not self._policy.ngram_pays(agreed, rows + place - unknown, cached_rows):
                    return
                depth = first.depth + 1 + place - unknown
                yield NGram(first.chance * agreed, depth, guess, after)
            after = guess.token_id

    def _known_above(self, first: Candidate) -> tuple[NodeId | None, int]:
        """Return the node from which to look up n-grams, and how many guessed tokens lead to `first`."""
        match first:
            case OpenNode(node=node):
                return node, 0
            case Placeholder(feed=feed):
                # The placeholder's own token is not known, so the lookup guesses it first.
                return self._in_flight[-1].nodes[feed.row], 1
            case NGram():
                return None, 0

    def _context(self, node: NodeId) -> list[int]:
        """Return the last tokens that lead to a node."""
        tokens = self.tree.path_tokens(node, LONGEST)
        missing = LONGEST - len(tokens)
        return [*self._shared.kv.token_ids[-missing:], *tokens] if missing else tokens

    def _confirm_guess(self, step: _StepInFlight, row: int, ngram: NGram) -> NodeId | None:
        """Assign the child that an n-gram guessed to its row and return it, if the draft finds it likeliest too."""
        above = step.nodes[row - 1]
        if above is None:
            return None
        best = next(iter(self.tree.nodes[above].children), None)
        is_right = best is not None and self.tree.nodes[best].token_id == ngram.guess.token_id
        if self.tree.nodes[above].token_id == ngram.after:
            self._shared.ngrams.observe(ngram.guess, right=is_right)
        if best is None or not is_right:
            return None
        self.tree.assign(best, ScratchRow(step.first + row))
        return best

    def _resolve_placeholders(self, step: _StepInFlight, before: _StepInFlight, token_ids: Ids) -> None:
        """Assign nodes to a step's placeholders, from what the step before it found."""
        for row, candidate in enumerate(step.rows):
            if not isinstance(candidate, Placeholder):
                continue
            parent = before.nodes[candidate.feed.row]
            child = None if parent is None else self.tree.child(parent, int(token_ids[candidate.feed]))
            # A right n-gram guess may already have given the child a row.
            if child is not None and self.tree.nodes[child].row is None:
                self.tree.assign(child, ScratchRow(step.first + row))
                step.nodes[row] = child

    def _add_children(self, node: NodeId, token_ids: Ids, scores: Row) -> float:
        """Add the likeliest children of a node that was just expanded; return the chance that they add."""
        above = self.tree.nodes[node]
        guesses = likeliest(token_ids, scores, self._shared.rules.sharpening)
        if not guesses:
            return 0.0
        shares = self._shared.calibration.shares([log_prob for _, log_prob in guesses])
        for (token_id, log_prob), share in zip(guesses, shares, strict=True):
            self.tree.add(node, token_id, above.log_prob + log_prob, above.chance * share)
        if not self.tree.is_frozen:
            self._history.learn_child_shares(shares)
        gained = (above.chance * share for share in shares)
        return sum(chance for chance in gained if chance >= LEAST_CHANCE)
