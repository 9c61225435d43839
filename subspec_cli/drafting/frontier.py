"""A tree that is being grown: what the next draft step may take, the steps under way, and what they found.

A step that was started may still be under way when the next one is chosen. Its rows' children are not known by
then, but where they will lie is, and how likely the best of them are on average: so a row of the next step may be
a child *foreseen*, whose token the step takes from the one before. Which node it was is seen when that is read.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from subspec_cli.decoding.sampler import Row, Sampler
from subspec_cli.drafting.draft_steps import DraftSteps
from subspec_cli.drafting.growing_tree import GrowingTree, draft_batch
from subspec_cli.drafting.ngram import LONGEST, ContinuationLookup, Guess
from subspec_cli.drafting.ranking import Ids, likeliest
from subspec_cli.drafting.schedule import LEAST_CHANCE, Schedule
from subspec_cli.modeling.kv_cache import KVCache

_GUESSES: Final = 4
"""Most guesses of the lookup that are tried in one draft step."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a row of a draft step may hold: an open node, a child foreseen, or a guess."""

    chance: float
    """That the target's path goes through it."""
    depth: int
    number: int = -1
    """The open node; -1 for the others."""
    feed: tuple[int, int] | None = None
    """Row of the step under way, and the rank of the child there, for a child foreseen."""
    guess: Guess | None = None
    after: int = -1
    """The token that a guess continues."""


@dataclass(frozen=True, slots=True)
class Drafting:
    """What all trees of a drafter share."""

    steps: DraftSteps
    kv: KVCache
    schedule: Schedule
    lookup: ContinuationLookup
    eos_ids: frozenset[int]
    sharpening: float


@dataclass(slots=True)
class _Step:
    """A step under way."""

    rows: tuple[Candidate, ...]
    first: int
    """Scratch row of the first."""
    numbers: list[int]
    """Node of each row; -1 where it is not known, or there is none."""


class Frontier:
    """A growing tree, and the draft steps that grow it."""

    def __init__(self, tree: GrowingTree, shared: Drafting) -> None:
        self.tree = tree
        self._shared = shared
        self._under_way: deque[_Step] = deque()

    @property
    def is_settled(self) -> bool:
        """Whether all steps were read."""
        return not self._under_way

    @property
    def nodes_at_most(self) -> int:
        """Nodes with a row, and rows that may yet turn out to hold one."""
        undecided = sum(step.numbers.count(-1) for step in self._under_way)
        return self.tree.expanded + undecided

    def outlook(self) -> tuple[int, float]:
        """Nodes worth a row, and the tokens expected of a pass over them, once all steps are read."""
        nodes, expected = self.tree.likely(LEAST_CHANCE)
        chances = [chance for step in self._under_way for _, chance in self._parents(step)]
        return nodes + len(chances), expected + self._shared.schedule.gain(sum(chances))

    def tip(self, max_depth: int) -> Candidate | None:
        """The end of the draft's own greedy chain, if it may be expanded."""
        number = self.tree.tip()
        node = self.tree.nodes[number]
        if self._is_end(number):
            return None
        if node.row < 0:
            return Candidate(node.chance, node.depth, number) if node.depth < max_depth else None
        for step in self._under_way:
            if number in step.numbers and node.depth + 1 < max_depth:
                share = self._shared.schedule.child_shares[0]
                return Candidate(node.chance * share, node.depth + 1, feed=(step.numbers.index(number), 0))
        return None

    def candidates(
        self, most_nodes: int, most_rows: int, max_depth: int, *, first: Candidate | None = None
    ) -> list[Candidate]:
        """What the next step may take, likeliest first: up to `most_nodes`, and guesses below the first of them.

        `first` goes before all others.
        """
        opened = self.tree.best_open(most_nodes, max_depth=max_depth, eos_ids=self._shared.eos_ids)
        able = [
            *(Candidate(self.tree.nodes[n].chance, self.tree.nodes[n].depth, n) for n in opened),
            *self._foreseen(max_depth),
        ]
        able.sort(key=lambda candidate: -candidate.chance)
        if first is not None:
            able = [first, *(other for other in able if other != first)]
        able = able[:most_nodes]
        if not able or self._shared.schedule.fixed.width is not None:
            return able
        # The first stays the first, and guesses stay in their order: none is likelier than the one before.
        others = [*able[1:], *self._guesses(able[0], len(able), most_rows, max_depth)]
        return [able[0], *sorted(others, key=lambda candidate: -candidate.chance)][:most_rows]

    def start(self, rows: Sequence[Candidate], sampler: Sampler) -> None:
        """Start a draft step over candidates, the first of which guesses hang on, and read those before it."""
        nodes, guesses = [c for c in rows if c.guess is None], [c for c in rows if c.guess is not None]
        # The likeliest comes last of its kind, so that rows of guesses that prove right go on from its own.
        ordered = (*nodes[1:], nodes[0], *guesses)
        step = _Step(ordered, self.tree.rows, [candidate.number for candidate in ordered])
        for candidate in ordered:
            if candidate.number >= 0:
                self.tree.expand(candidate.number)
            else:
                self.tree.take_row(self._parent_row(candidate), candidate.depth)
        tokens = [self._token(candidate) for candidate in ordered]
        batch = draft_batch(self.tree, tokens, self._shared.kv.committed)
        self._shared.steps.start(batch, [candidate.feed for candidate in ordered], sampler)
        self._under_way.append(step)
        self._read_all_but(self._shared.steps.ahead)

    def settle(self) -> None:
        """Read all steps that are under way."""
        self._read_all_but(0)

    def _read_all_but(self, ahead: int) -> None:
        """Read steps, the oldest first, and add what they found to the tree."""
        while len(self._under_way) > ahead:
            step = self._under_way.popleft()
            found = self._shared.steps.read()
            expanded = gained = 0.0
            for row, candidate in enumerate(step.rows):
                number = self._agreed(step, row) if candidate.guess else step.numbers[row]
                step.numbers[row] = number
                if number < 0 or self._is_end(number):
                    continue
                expanded += self.tree.nodes[number].chance
                gained += self._add_children(number, found.token_ids[row], found.scores[row])
            if expanded > 0:
                self._shared.schedule.learn_yield(gained / expanded)
            if self._under_way:
                self._seat_foreseen(self._under_way[0], step, found.token_ids)
        if not self._under_way:
            self.tree.give_back()

    def _token(self, candidate: Candidate) -> int:
        """Its token; of a child foreseen any, for the step knows better."""
        if candidate.guess is not None:
            return candidate.guess.token_id
        return self.tree.nodes[max(candidate.number, 0)].token_id

    def _parent_row(self, candidate: Candidate) -> int:
        """Of a guess the row before its own, of a child foreseen a row of the step under way."""
        if candidate.feed is None:
            return self.tree.rows - 1
        return self._under_way[-1].first + candidate.feed[0]

    def _is_end(self, number: int) -> bool:
        return number > 0 and self.tree.nodes[number].token_id in self._shared.eos_ids

    def _parents(self, step: _Step) -> Iterator[tuple[int, float]]:
        """Rows of a step under way that may have children, and the chance of their nodes."""
        for row, (candidate, number) in enumerate(zip(step.rows, step.numbers, strict=True)):
            if number >= 0 and not self._is_end(number):
                yield row, self.tree.nodes[number].chance
            elif candidate.guess is not None:
                yield row, candidate.chance

    def _foreseen(self, max_depth: int) -> Iterator[Candidate]:
        """Children that the step under way will find."""
        for step in self._under_way:
            for row, chance in self._parents(step):
                depth, below = step.rows[row].depth + 1, step.rows[row + 1 : row + 2]
                # A guess that proves right has a row already.
                taken = sum(guess.chance for guess in below if guess.guess is not None)
                for rank, share in enumerate(self._shared.schedule.child_shares):
                    if depth < max_depth:
                        left = chance * share - (taken if rank == 0 else 0.0)
                        yield Candidate(max(0.0, left), depth, feed=(row, rank))

    def _guesses(self, first: Candidate, rows: int, most_rows: int, max_depth: int) -> Iterator[Candidate]:
        """What has followed the tokens that lead to a candidate, as far as it pays to try."""
        lookup, schedule = self._shared.lookup, self._shared.schedule
        number, unknown = first.number, 0
        if first.feed is not None:
            # Its own token is not known: the lookup's guess at it stands in.
            number, unknown = self._under_way[-1].numbers[first.feed[0]], 1
        most = min(_GUESSES, most_rows - 1, max_depth - first.depth - 1)
        if number < 0 or most < 1:
            return
        agreed, after = 1.0, self.tree.nodes[number].token_id
        for place, guess in enumerate(lookup.guesses(self._context(number), unknown + most)):
            agreed *= guess.chance
            if guess.token_id in self._shared.eos_ids:
                return
            if place >= unknown:
                if not schedule.guess_pays(agreed, rows + place - unknown):
                    return
                depth = first.depth + 1 + place - unknown
                yield Candidate(first.chance * agreed, depth, guess=guess, after=after)
            after = guess.token_id

    def _context(self, number: int) -> list[int]:
        """The last tokens that lead to a node."""
        tokens = self.tree.path_tokens(number, LONGEST)
        missing = LONGEST - len(tokens)
        return [*self._shared.kv.token_ids[-missing:], *tokens] if missing else tokens

    def _agreed(self, step: _Step, row: int) -> int:
        """The child that a guess foresaw, if it is the one that the draft finds likeliest too; else -1."""
        guess, above = step.rows[row].guess, step.numbers[row - 1]
        if guess is None or above < 0:
            return -1
        best = next(iter(self.tree.nodes[above].children), -1)
        is_right = best >= 0 and self.tree.nodes[best].token_id == guess.token_id
        if self.tree.nodes[above].token_id == step.rows[row].after:
            self._shared.lookup.observe(guess, right=is_right)
        if not is_right:
            return -1
        self.tree.seat(best, step.first + row)
        return best

    def _seat_foreseen(self, step: _Step, before: _Step, token_ids: Ids) -> None:
        """Find the nodes of a step whose tokens the one before it has found."""
        for row, candidate in enumerate(step.rows):
            parent = -1 if candidate.feed is None else before.numbers[candidate.feed[0]]
            if parent < 0:
                continue
            child = self.tree.child(parent, int(token_ids[candidate.feed]))
            # A guess that proved right may have given it a row already.
            if child is not None and self.tree.nodes[child].row < 0:
                self.tree.seat(child, step.first + row)
                step.numbers[row] = child

    def _add_children(self, number: int, token_ids: Ids, scores: Row) -> float:
        """The likeliest children of a node just expanded; returns the chance they add."""
        shared, node, gained = self._shared, self.tree.nodes[number], 0.0
        chances = []
        for token_id, log_prob in likeliest(token_ids, scores, shared.sharpening):
            share = shared.schedule.calibration.probability(math.exp(log_prob))
            chances.append(share)
            chance = node.chance * share
            gained += chance if chance >= LEAST_CHANCE else 0.0
            self.tree.add(number, token_id, node.log_prob + log_prob, chance)
        shared.schedule.learn_child_shares(chances)
        return gained
