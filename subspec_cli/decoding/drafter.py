"""Growing token trees with the draft model, in scratch rows of the shared cache.

Every draft step expands the likeliest open nodes, at whatever depth they lie. Serial steps come before a pass
and make its tree; shadow steps come during it, while weights arrive, and look beyond the tree: what follows if
its best leaf is taken, what if the target leaves it for a runner-up. When the pass ends in a token that was
foreseen, what was found out below it is the beginning of the next tree.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from subspec_cli.decoding.batches import draft_batch
from subspec_cli.decoding.choose import Chooser, Row
from subspec_cli.decoding.lookup import LONGEST, ContinuationLookup, Guess
from subspec_cli.decoding.ranking import SHARPENING, Ids, likeliest, rank
from subspec_cli.decoding.schedule import LEAST_CHANCE, MOST_ROWS, Schedule, TreeLimits
from subspec_cli.decoding.tree import GrowingTree, TokenTree
from subspec_cli.decoding.verify import VerifyResult
from subspec_cli.modeling.decoder import DraftLogits
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.layers import TokenBatch

_GUESSES: Final = 4
"""Most guesses of the lookup that are tried in one draft step."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A tree to verify, and what it took."""

    tree: TokenTree
    draft_steps: int = 0
    """Serial draft steps."""
    ready_nodes: int = 0
    """Nodes that the shadow of the last pass had expanded already."""
    cost_s: float = 0.0
    """What the serial steps cost by the schedule's prices."""


class Draft(Protocol):
    """The model that guesses."""

    def forward(self, batch: TokenBatch, kv: KVCache) -> DraftLogits:
        """One draft step over unpadded rows; what it returns lasts until the next."""
        ...


class TreeGrower(Protocol):
    """What the engine asks for trees."""

    def grow(self, root_token: int, chooser: Chooser, tokens_wanted: int) -> Proposal:
        """A tree under `root_token`, the newest emitted token, with `tokens_wanted` more tokens to come."""
        ...

    def work_in_shadow(self, layer: int) -> int:
        """Draft steps planned for after this layer of the pass; returns how many there were."""
        ...

    def follow(self, result: VerifyResult) -> None:
        """Take what was found out below the pass's outcome, once its rows are committed, for the next tree."""
        ...

    def forget(self) -> None:
        """Drop what was found out: another answer begins."""
        ...


class RootOnly:
    """Plain decoding: a tree of one node, so one token a pass."""

    def grow(self, root_token: int, chooser: Chooser, tokens_wanted: int) -> Proposal:  # noqa: ARG002
        """The root alone."""
        return Proposal(TokenTree((root_token,), (-1,), (0,), (0.0,)))

    def work_in_shadow(self, layer: int) -> int:  # noqa: ARG002
        """Nothing."""
        return 0

    def follow(self, result: VerifyResult) -> None:
        """Nothing was found out."""

    def forget(self) -> None:
        """Nothing was found out."""


class Drafter:
    """Grows trees with the draft model under a schedule."""

    def __init__(
        self,
        draft: Draft,
        kv: KVCache,
        schedule: Schedule,
        *,
        eos_ids: Collection[int],
        sharpening: float = SHARPENING,
    ) -> None:
        self._draft = draft
        self._kv = kv
        self._schedule = schedule
        self._eos_ids = frozenset(eos_ids)
        self._sharpening = sharpening
        self._lookup = ContinuationLookup()
        self._ready: GrowingTree | None = None
        self._pass: _Pass | None = None

    def grow(self, root_token: int, chooser: Chooser, tokens_wanted: int) -> Proposal:
        """A tree under the root; rows `[committed, committed + nodes)` of the cache are scratch to it."""
        limits = self._schedule.limits(tokens_wanted)
        tree = self._ready or GrowingTree(root_token, limits.nodes + self._schedule.most_shadow_rows)
        assert tree.nodes[0].token_id == root_token
        self._ready = None
        ready, steps, cost_s = tree.rows, 0, 0.0
        self._lookup.learn([*self._kv.token_ids, root_token])
        while step := self._next_serial(tree, limits, cost_s):
            steps += 1
            cost_s += self._schedule.step_s(step.rows)
            if not self._expand(tree, step, chooser):
                break
        proposed = tree.freeze(self._leaves(tree, limits, cost_s))
        self._pass = _Pass(tree, chooser, max_depth=max(0, tokens_wanted - 1), nodes=len(proposed))
        return Proposal(proposed, steps, ready, cost_s)

    def work_in_shadow(self, layer: int) -> int:
        """Expand what lies beyond the tree being verified, as far as this layer's share of idle time goes."""
        now, steps = self._pass, 0
        if now is None or not self._schedule.most_shadow_rows:
            return 0
        while True:
            room = now.nodes + self._schedule.most_shadow_rows - now.tree.rows
            room = min(MOST_ROWS, room)
            able = now.tree.best_open(room, max_depth=now.max_depth, eos_ids=self._eos_ids)
            rows = self._rows(now.tree, able, room, now.max_depth)
            count = self._schedule.shadow_step(
                [row.chance for row in rows], layer=layer, nodes=now.nodes, spent_s=now.spent_s
            )
            if not count:
                return steps
            now.spent_s += self._schedule.step_s(count)
            self._expand(now.tree, _step_of(rows[:count]), now.chooser)
            steps += 1

    def follow(self, result: VerifyResult) -> None:
        """Keep the part of the tree below the bonus token, its rows moved to the new scratch."""
        now = self._pass
        self._pass = None
        if now is None:
            return
        outcome = now.tree.outcome(result.accepted_nodes[-1], result.token_ids[-1])
        if outcome is None:
            return
        wanted = now.max_depth + 1 - len(result.token_ids)
        limits = self._schedule.limits(wanted)
        self._ready, rows = now.tree.subtree(outcome, most_rows=limits.nodes - 1, max_depth=limits.depth)
        # Rows were counted from where the cache ended before this pass was committed.
        self._kv.move_scratch([row - len(result.token_ids) for row in rows])

    def forget(self) -> None:
        """Drop tree and findings: their rows belong to another answer."""
        self._ready = self._pass = None
        self._lookup.forget()

    def _next_serial(self, tree: GrowingTree, limits: TreeLimits, cost_s: float) -> _Step | None:
        """What to expand next; None when the tree is as large as it pays."""
        fixed = self._schedule.fixed
        free = room = limits.nodes - tree.rows - 1
        if fixed.depth is not None:
            tip = tree.tip()
            # The chain goes to its depth; others share its steps, as far as the rest of the chain leaves room.
            if not self._may_expand(tree, tip, limits.depth):
                return None
            room = max(1, room - (limits.depth - tree.nodes[tip].depth - 1))
        room = min(room, limits.width)
        if room < 1:
            return None
        able = tree.best_open(room, max_depth=limits.depth, eos_ids=self._eos_ids)
        if fixed.depth is not None:
            able = [tip, *(number for number in able if number != tip)][:room]
        rows = self._rows(tree, able, min(free, limits.width), limits.depth)
        nodes, expected = tree.likely(LEAST_CHANCE)
        count = self._schedule.serial_rows(
            [row.chance for row in rows],
            expected_tokens=expected,
            nodes=min(nodes, limits.nodes),
            spent_s=cost_s,
        )
        return _step_of(rows[:count]) if count else None

    def _rows(self, tree: GrowingTree, able: Sequence[int], room: int, max_depth: int) -> list[_Row]:
        """Up to `room` open nodes and guesses below the first, likeliest first: what a draft step may take."""
        rows = [_Row(number, None, tree.nodes[number].chance) for number in able]
        if not able or self._schedule.fixed.width is not None:
            return rows
        first = tree.nodes[able[0]]
        most = min(_GUESSES, room - 1, max_depth - first.depth - 1)
        context = tree.path_tokens(able[0], LONGEST)
        if len(context) < LONGEST:
            context = [*self._kv.token_ids[len(context) - LONGEST :], *context]
        agreed = 1.0
        for guess in self._lookup.guesses(context, most):
            agreed *= guess.chance
            if guess.token_id in self._eos_ids or not self._schedule.guess_pays(agreed, len(rows)):
                break
            rows.append(_Row(able[0], guess, first.chance * agreed))
        # The first stays the first, and guesses stay in their order: none is likelier than the one before.
        return [rows[0], *sorted(rows[1:], key=lambda row: -row.chance)][:room]

    def _may_expand(self, tree: GrowingTree, number: int, max_depth: int) -> bool:
        node = tree.nodes[number]
        is_end = number > 0 and node.token_id in self._eos_ids
        return node.row < 0 and node.depth < max_depth and not is_end

    def _expand(self, tree: GrowingTree, step: _Step, chooser: Chooser) -> bool:
        """One draft forward over open nodes and guesses, which finds their children; whether it found any."""
        first, below = tree.rows, tree.nodes[step.numbers[-1]]
        tree.expand(step.numbers)
        committed = self._kv.committed
        tokens = [tree.nodes[number].token_id for number in step.numbers]
        depths = [tree.nodes[number].depth for number in step.numbers]
        for place, guess in enumerate(step.guesses):
            tree.try_row(tree.rows + place, tree.rows + place - 1)
            tokens.append(guess.token_id)
            depths.append(below.depth + place + 1)
        batch = draft_batch(tree, tokens, depths, first, committed)
        found = self._draft.forward(batch, self._kv)
        ranked = rank(found, chooser, [committed + depth + 1 for depth in depths])
        numbers, guesses = list(step.numbers), iter(step.guesses)
        expanded = gained = 0.0
        for row, (token_ids, scores) in enumerate(ranked):
            if row == len(numbers):
                child = self._agreed(tree, numbers[-1], next(guesses))
                if child is None:
                    break
                tree.expand([child])
                numbers.append(child)
            expanded += tree.nodes[numbers[row]].chance
            gained += self._add_children(tree, numbers[row], token_ids, scores)
        if expanded > 0:
            self._schedule.learn_yield(gained / expanded)
        return any(tree.nodes[number].children for number in numbers)

    def _agreed(self, tree: GrowingTree, number: int, guess: Guess) -> int | None:
        """The child that a guess foresaw, if it is the one that the draft finds likeliest too."""
        best = next(iter(tree.nodes[number].children or ()), None)
        is_right = best is not None and tree.nodes[best].token_id == guess.token_id
        self._lookup.observe(guess, right=is_right)
        return best if is_right else None

    def _add_children(self, tree: GrowingTree, number: int, token_ids: Ids, scores: Row) -> float:
        """The likeliest children of a node just expanded; returns the chance they add."""
        node, gained = tree.nodes[number], 0.0
        for token_id, log_prob in likeliest(token_ids, scores, self._sharpening):
            chance = node.chance * self._schedule.calibration.probability(math.exp(log_prob))
            gained += chance if chance >= LEAST_CHANCE else 0.0
            tree.add(number, token_id, node.log_prob + log_prob, chance)
        return gained

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


@dataclass(frozen=True, slots=True)
class _Row:
    """A candidate for a draft step: an open node, or a guess below one."""

    number: int
    guess: Guess | None
    chance: float


@dataclass(frozen=True, slots=True)
class _Step:
    """One draft forward: open nodes, and a chain of guesses below the last of them."""

    numbers: tuple[int, ...]
    guesses: tuple[Guess, ...]

    @property
    def rows(self) -> int:
        """Rows in all."""
        return len(self.numbers) + len(self.guesses)


def _step_of(rows: Sequence[_Row]) -> _Step:
    """The likeliest node comes last, so that the rows of guesses that prove right go on from its own."""
    numbers = [row.number for row in rows if row.guess is None]
    return _Step((*numbers[1:], numbers[0]), tuple(row.guess for row in rows if row.guess is not None))


@dataclass(slots=True)
class _Pass:
    """The tree under verification, and what its shadow has done."""

    tree: GrowingTree
    chooser: Chooser
    max_depth: int
    """Depth of the last token that is still wanted, less the bonus token."""
    nodes: int
    """Rows of the pass; the shadow's come after."""
    spent_s: float = 0.0
