"""A token tree that is being drafted: nodes, the scratch rows they have taken, and the mask between rows."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Self

import torch

from subspec_cli.decoding.batches import after_prefix, batch_of
from subspec_cli.decoding.tree import DraftNode, TokenTree
from subspec_cli.modeling.layers import TokenBatch


class GrowingTree:
    """All that the draft has proposed under a root: the tree to be verified, and what lies beyond it.

    A node is *expanded* when the draft computes its row and so finds its children, else it is *open*. Rows are
    taken in the order of draft steps, before it is known which node some of them will hold: a row that proves to
    hold none is void. `freeze` turns the likely part into a `TokenTree`; nodes expanded after that take rows
    behind the tree's, so that a pass over the tree and the draft do not meet.
    """

    def __init__(self, root_token: int, capacity: int) -> None:
        self.nodes = [DraftNode(root_token, -1, 0, 0.0, 1.0)]
        self.mask = torch.zeros((capacity, capacity), dtype=torch.bool)
        """`[capacity, capacity]`: rows that the node of a row attends to, its ancestors' and its own."""
        self.row_depths: list[int] = []
        """Depth of the node in each row taken so far."""
        self._in_rows: list[int] = []
        """Number of the node in each row; -1 where there is none, or none yet."""
        self._open = {0}
        self._frozen: list[int] = []

    @property
    def capacity(self) -> int:
        """Most rows."""
        return len(self.mask)

    @property
    def rows(self) -> int:
        """Rows taken so far."""
        return len(self.row_depths)

    @property
    def expanded(self) -> int:
        """Nodes that have a row."""
        return sum(number >= 0 for number in self._in_rows)

    def likely(self, least: float) -> tuple[int, float]:
        """Number of nodes of at least this chance, and the tokens expected of a pass over them."""
        chances = [node.chance for node in self.nodes if node.chance >= least]
        return len(chances), sum(chances)

    def tip(self) -> int:
        """The open end of the draft's own greedy chain."""
        number = 0
        while children := self.nodes[number].children:
            number = children[0]
        return number

    def best_open(self, count: int, *, max_depth: int, eos_ids: frozenset[int]) -> list[int]:
        """Up to `count` open nodes that may be expanded, likeliest first; ties go to the older one."""
        able = (
            number
            for number in self._open
            if self.nodes[number].depth < max_depth
            and (self.nodes[number].token_id not in eos_ids or number == 0)
        )
        return heapq.nsmallest(count, able, key=lambda number: (-self.nodes[number].chance, number))

    def expand(self, number: int) -> None:
        """Give an open node the next row; its children are added after."""
        node = self.nodes[number]
        parent_row = self.nodes[node.parent].row if node.parent >= 0 else -1
        self.seat(number, self.take_row(parent_row, node.depth))

    def take_row(self, parent_row: int, depth: int) -> int:
        """The next row, for a node at `depth` whose parent's row is `parent_row`; -1 for the root."""
        row = self.rows
        self.mask[row] = self.mask[parent_row] if parent_row >= 0 else False
        self.mask[row, row] = True
        self.row_depths.append(depth)
        self._in_rows.append(-1)
        return row

    def seat(self, number: int, row: int) -> None:
        """Let an open node have a row that was taken for it."""
        node = self.nodes[number]
        assert node.row < 0 > self._in_rows[row]
        assert node.depth == self.row_depths[row]
        node.row = row
        self._in_rows[row] = number
        self._open.remove(number)

    def give_back(self) -> None:
        """Return the void rows at the end, when no step is under way that may still fill them."""
        while self.rows > len(self._frozen) and self._in_rows[-1] < 0:
            self._in_rows.pop()
            self.row_depths.pop()

    def compact(self) -> list[int]:
        """Close the gaps that void rows leave; returns the rows to move to the front, none if they are there."""
        kept = [row for row, number in enumerate(self._in_rows) if number >= 0]
        if len(kept) == self.rows:
            return []
        self.mask[: len(kept), : len(kept)] = self.mask[kept][:, kept]
        self.row_depths = [self.row_depths[row] for row in kept]
        self._in_rows = [self._in_rows[row] for row in kept]
        for row, number in enumerate(self._in_rows):
            self.nodes[number].row = row
        return kept

    def path_tokens(self, number: int, count: int) -> list[int]:
        """The last `count` tokens, or fewer, on the way from the root to a node, itself included."""
        tokens: list[int] = []
        while number >= 0 and len(tokens) < count:
            tokens.append(self.nodes[number].token_id)
            number = self.nodes[number].parent
        return tokens[::-1]

    def add(self, parent: int, token_id: int, log_prob: float, chance: float) -> int:
        """Append a child of an expanded node, with cumulative figures; returns its number."""
        above = self.nodes[parent]
        assert above.row >= 0
        number = len(self.nodes)
        self.nodes.append(DraftNode(token_id, parent, above.depth + 1, log_prob, chance))
        above.children.append(number)
        self._open.add(number)
        return number

    def child(self, number: int, token_id: int) -> int | None:
        """The child of a node that has this token, if one was found."""
        children = self.nodes[number].children
        return next((child for child in children if self.nodes[child].token_id == token_id), None)

    def freeze(self, leaves: Sequence[int]) -> TokenTree:
        """The expanded nodes and the given open ones as a tree to verify; rows from its length on are free.

        There must be no gaps.
        """
        assert self.expanded == self.rows
        self._frozen = [*self._in_rows, *leaves]
        index = {number: place for place, number in enumerate(self._frozen)}
        chosen = [self.nodes[number] for number in self._frozen]
        # The leaves' rows are the target's alone: if the draft expands one, it takes another row.
        self.row_depths.extend(self.nodes[number].depth for number in leaves)
        self._in_rows.extend(-1 for _ in leaves)
        return TokenTree(
            tuple(node.token_id for node in chosen),
            tuple(index[node.parent] if node.parent >= 0 else -1 for node in chosen),
            tuple(node.depth for node in chosen),
            tuple(node.log_prob for node in chosen),
        )

    def outcome(self, last_node: int, bonus_token: int) -> int | None:
        """The proposal that a verified path ends with: child `bonus_token` of the frozen tree's `last_node`."""
        return self.child(self._frozen[last_node], bonus_token)

    def subtree(self, number: int, *, most_rows: int, max_depth: int) -> tuple[Self, list[int]]:
        """What was found out below a node, as a tree of its own, and the old rows of its expanded nodes.

        At most `most_rows` of them, the likeliest, and none at `max_depth` or deeper; the rest is open again.
        """
        root = self.nodes[number]
        inside = {number}
        for child, node in enumerate(self.nodes[number + 1 :], start=number + 1):
            if node.parent in inside:
                inside.add(child)
        expanded = [
            child
            for child in inside
            if self.nodes[child].row >= 0 and self.nodes[child].depth - root.depth < max_depth
        ]
        expanded.sort(key=lambda child: (-self.nodes[child].chance, child))
        kept = sorted(expanded[:most_rows], key=lambda child: self.nodes[child].row)
        tree = type(self)(root.token_id, self.capacity)
        moved = {number: 0}
        for child in kept:
            tree.expand(moved[child])
            for below in self.nodes[child].children:
                node = self.nodes[below]
                moved[below] = tree.add(
                    moved[child],
                    node.token_id,
                    node.log_prob - root.log_prob,
                    node.chance / root.chance if root.chance > 0 else 0.0,
                )
        return tree, [self.nodes[child].row for child in kept]


def draft_batch(
    tree: GrowingTree,
    token_ids: Sequence[int],
    committed: int,
) -> TokenBatch:
    """Tokens in the last rows that a tree has taken, for one unpadded draft step."""
    first = tree.rows - len(token_ids)
    allowed = after_prefix(tree.mask[first : tree.rows, : tree.rows], committed)
    depths = torch.tensor(tree.row_depths) + committed
    key_positions = torch.cat((torch.arange(committed), depths))
    return batch_of(token_ids, depths[first:], committed + first, allowed, key_positions, len(token_ids))
