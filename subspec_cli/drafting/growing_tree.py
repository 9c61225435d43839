"""A token tree while it is drafted: its nodes, the scratch rows they have taken, and the mask between rows."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NewType, Self

import torch
import torch.nn.functional as F

from subspec_cli.decoding.tree import TokenTree
from subspec_cli.drafting.history import Ranking
from subspec_cli.modeling.token_batch import TokenBatch

NodeId = NewType("NodeId", int)
"""Index of a node in `GrowingTree.nodes`."""
ScratchRow = NewType("ScratchRow", int)
"""Row of the KV cache, counted from where the committed rows end."""
ROOT = NodeId(0)


@dataclass(slots=True)
class DraftNode:
    """A token that the draft has proposed."""

    token_id: int
    parent: NodeId | None
    """None for the root."""
    depth: int
    log_prob: float
    """Cumulative, by the draft's own sharpened guess."""
    chance: float
    """Calibrated probability that the target's path goes through the node."""
    row: ScratchRow | None = None
    """Row of its draft-made keys and values; None until the node is expanded."""
    children: list[NodeId] = field(default_factory=list)
    """Likeliest first; none until the draft has found them."""


class GrowingTree:
    """All that the draft has proposed under a root: the tree to be verified, and what lies beyond it.

    A node is *expanded* when the draft computes its row and so finds its children, else it is *open*. Rows are
    taken in the order of draft steps, before it is known which nodes some of them will hold. A row that turns out to
    hold no node is unused. `freeze` turns the likely part into a `TokenTree`. Nodes that are expanded later take rows
    behind the tree's, so the pass over the tree and the draft do not write the same rows.
    """

    def __init__(self, root_token: int, capacity: int) -> None:
        self.nodes = [DraftNode(root_token, None, 0, 0.0, 1.0)]
        self.mask = torch.zeros((capacity, capacity), dtype=torch.bool)
        """`[capacity, capacity]`: rows that the node of a row attends to: its ancestors' and its own."""
        self.row_depths: list[int] = []
        """Depth of the node in each row taken so far."""
        self._in_rows: list[NodeId | None] = []
        """The node in each row; None if there is none, or none yet."""
        self._open = {ROOT}
        self._frozen: list[NodeId] = []
        self._leaves: frozenset[NodeId] = frozenset()

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
        return sum(node is not None for node in self._in_rows)

    def likely(self, least: float) -> tuple[int, float]:
        """Return the number of nodes of at least this chance, and the tokens expected of a pass over them."""
        chances = [node.chance for node in self.nodes if node.chance >= least]
        return len(chances), sum(chances)

    @property
    def levels(self) -> int:
        """Levels of the draft's own greedy chain that are expanded."""
        tip = self.nodes[self.tip()]
        return tip.depth if tip.row is None else tip.depth + 1

    def tip(self) -> NodeId:
        """Return the open end of the draft's own greedy chain."""
        node = ROOT
        while children := self.nodes[node].children:
            node = children[0]
        return node

    def best_open(self, count: int, *, max_depth: int, eos_ids: frozenset[int]) -> list[NodeId]:
        """Return up to `count` open nodes above `max_depth`, likeliest first; ties go to the older one.

        Nodes whose token ends the answer are left out, except the root.
        """
        nodes = self.nodes
        # Pairs compare by themselves, without a call of a function for each of hundreds of nodes.
        able = [
            (-found.chance, node)
            for node in self._open
            if (found := nodes[node]).depth < max_depth and (found.token_id not in eos_ids or node == ROOT)
        ]
        return [node for _, node in heapq.nsmallest(count, able)]

    def expand(self, node: NodeId) -> None:
        """Give an open node the next row; its children are added afterwards."""
        found = self.nodes[node]
        parent_row = None if found.parent is None else self.nodes[found.parent].row
        self.assign(node, self.take_row(parent_row, found.depth))

    def take_row(self, parent_row: ScratchRow | None, depth: int) -> ScratchRow:
        """Take the next row for a node at `depth` whose parent is in `parent_row`; the root has no parent."""
        row = ScratchRow(self.rows)
        self.mask[row] = False if parent_row is None else self.mask[parent_row]
        self.mask[row, row] = True
        self.row_depths.append(depth)
        self._in_rows.append(None)
        return row

    def assign(self, node: NodeId, row: ScratchRow) -> None:
        """Assign an open node to a row that was taken for it."""
        found = self.nodes[node]
        assert found.row is None
        assert self._in_rows[row] is None
        assert found.depth == self.row_depths[row]
        found.row = row
        self._in_rows[row] = node
        self._open.remove(node)

    def release_unused(self) -> None:
        """Release the unused rows at the end. No step may be in flight that could still fill them."""
        while self.rows > len(self._frozen) and self._in_rows[-1] is None:
            self._in_rows.pop()
            self.row_depths.pop()

    def compact(self) -> list[ScratchRow]:
        """Close the gaps of unused rows; return the rows to move to the front, none if they are there already."""
        kept = [ScratchRow(row) for row, node in enumerate(self._in_rows) if node is not None]
        if len(kept) == self.rows:
            return []
        self.mask[: len(kept), : len(kept)] = self.mask[kept][:, kept]
        self.row_depths = [self.row_depths[row] for row in kept]
        self._in_rows = [self._in_rows[row] for row in kept]
        for row, node in enumerate(self._in_rows):
            if node is not None:
                self.nodes[node].row = ScratchRow(row)
        return kept

    @property
    def is_frozen(self) -> bool:
        """Whether the tree is under verification: what it grows now is beyond what is verified."""
        return bool(self._frozen)

    @property
    def leaves(self) -> frozenset[NodeId]:
        """The nodes under verification that were not expanded for it; none before the tree is frozen."""
        return self._leaves

    def path_tokens(self, node: NodeId, count: int) -> list[int]:
        """Return the last `count` tokens, or fewer, of the path from the root to a node, including the node's."""
        tokens: list[int] = []
        above: NodeId | None = node
        while above is not None and len(tokens) < count:
            tokens.append(self.nodes[above].token_id)
            above = self.nodes[above].parent
        return tokens[::-1]

    def add(self, parent: NodeId, token_id: int, log_prob: float, chance: float) -> NodeId:
        """Append a child of an expanded node, with cumulative figures."""
        above = self.nodes[parent]
        assert above.row is not None
        node = NodeId(len(self.nodes))
        self.nodes.append(DraftNode(token_id, parent, above.depth + 1, log_prob, chance))
        above.children.append(node)
        self._open.add(node)
        return node

    def child(self, node: NodeId, token_id: int) -> NodeId | None:
        """Return the child of a node that has this token, if the draft has found one."""
        children = self.nodes[node].children
        return next((child for child in children if self.nodes[child].token_id == token_id), None)

    def freeze(self, leaves: Sequence[NodeId]) -> TokenTree:
        """Return the expanded nodes and the given open ones as a tree to verify.

        Rows from its length on are free. There must be no unused rows.
        """
        inner = [node for node in self._in_rows if node is not None]
        assert len(inner) == self.rows
        self._frozen = [*inner, *leaves]
        self._leaves = frozenset(leaves)
        index = {node: place for place, node in enumerate(self._frozen)}
        chosen = [self.nodes[node] for node in self._frozen]
        # The leaves' rows are the target's alone: if the draft expands a leaf, it takes another row.
        self.row_depths.extend(self.nodes[node].depth for node in leaves)
        self._in_rows.extend(None for _ in leaves)
        return TokenTree(
            tuple(node.token_id for node in chosen),
            tuple(-1 if node.parent is None else index[node.parent] for node in chosen),
            tuple(node.depth for node in chosen),
            tuple(node.log_prob for node in chosen),
        )

    def rankings(self, path: Sequence[int], token_ids: Sequence[int]) -> list[Ranking]:
        """Return what the draft found below the nodes of a verified path, and which of it the target chose.

        `path` is of nodes of the frozen tree, each with the token that the target chose below it.
        """
        found = []
        for node, token in zip((self._frozen[place] for place in path), token_ids, strict=True):
            above = self.nodes[node].log_prob
            children = [self.nodes[child] for child in self.nodes[node].children]
            chosen = next((place for place, child in enumerate(children) if child.token_id == token), None)
            if children:
                found.append(Ranking(tuple(child.log_prob - above for child in children), chosen))
        return found

    def outcome(self, last_node: int, bonus_token: int) -> NodeId | None:
        """Return the node that a verified path ends with: child `bonus_token` of the frozen tree's `last_node`."""
        return self.child(self._frozen[last_node], bonus_token)

    def subtree(self, node: NodeId, *, most_rows: int, max_depth: int) -> tuple[Self, list[ScratchRow]]:
        """Return what was drafted below a node as a new tree, and the old rows of its expanded nodes.

        It keeps at most `most_rows` of them, the likeliest, and none at `max_depth` or deeper.
        The rest is open again.
        """
        root = self.nodes[node]
        kept = self._kept_below(node, most_rows, max_depth)
        tree = type(self)(root.token_id, self.capacity)
        moved = {node: ROOT}
        for child in kept:
            tree.expand(moved[child])
            for below in self.nodes[child].children:
                found = self.nodes[below]
                moved[below] = tree.add(
                    moved[child],
                    found.token_id,
                    found.log_prob - root.log_prob,
                    found.chance / root.chance if root.chance > 0 else 0.0,
                )
        return tree, [row for child in kept if (row := self.nodes[child].row) is not None]

    def _kept_below(self, node: NodeId, most_rows: int, max_depth: int) -> list[NodeId]:
        """Return the likeliest expanded nodes at and below a node, in the order of their rows."""
        top = self.nodes[node].depth
        inside = {node}
        for index, found in enumerate(self.nodes[node + 1 :], start=node + 1):
            if found.parent in inside:
                inside.add(NodeId(index))
        expanded = [
            (row, child)
            for child in inside
            if (row := self.nodes[child].row) is not None and self.nodes[child].depth - top < max_depth
        ]
        expanded.sort(key=lambda item: (-self.nodes[item[1]].chance, item[1]))
        return [child for _, child in sorted(expanded[:most_rows])]

    def check_integrity(self) -> None:
        """Assert that nodes, rows, the mask and the set of open nodes agree. For tests, after every change."""
        assert self.rows == len(self._in_rows) <= self.capacity
        placed = {node: row for row, node in enumerate(self._in_rows) if node is not None}
        assert len(placed) == self.expanded, "a node is in two rows"
        for index, node in enumerate(self.nodes):
            assert node.row == placed.get(NodeId(index))
            assert (NodeId(index) in self._open) == (node.row is None)
            assert node.row is not None or not node.children
            assert (node.parent is None) == (index == ROOT)
            if node.parent is not None:
                above = self.nodes[node.parent]
                assert node.parent < index
                assert index in above.children
                assert node.depth == above.depth + 1
            if node.row is not None:
                seen = {node.row}
                while node.parent is not None:
                    node = self.nodes[node.parent]
                    assert node.row is not None
                    seen.add(node.row)
                assert set(self.mask[placed[NodeId(index)]].nonzero().flatten().tolist()) == seen


def draft_batch(tree: GrowingTree, token_ids: Sequence[int], committed: int) -> TokenBatch:
    """Return the tokens of the last rows that a tree has taken, as one draft step."""
    first = tree.rows - len(token_ids)
    depths = torch.tensor(tree.row_depths) + committed
    return TokenBatch(
        token_ids=torch.tensor(list(token_ids)),
        positions=depths[first:],
        start=committed + first,
        allowed=F.pad(tree.mask[first : tree.rows, : tree.rows], (committed, 0), value=True),
        key_positions=torch.cat((torch.arange(committed), depths)),
    )
