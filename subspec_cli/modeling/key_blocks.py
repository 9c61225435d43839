"""Key blocks: how the keys of a row are cut, by the row's position alone.

A row at position p reduces its keys in order of absolute position. Blocks of `LARGE_BLOCK` keys reach up to the
border `LARGE_BLOCK * large_blocks(p)`, blocks of `SMALL_BLOCK` keys from there up to p. The border lies at least
`GUARD` positions below p, so a large block never holds a row of a draft tree. Nothing here depends on the cache rows
in which keys lie, on trees or on chunks.

Shapes: `N` rows, `G` query heads per kv head, `B` blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec_cli.limits import GUARD, LARGE_BLOCK, SMALL_BLOCK

Window = int | None
"""Sliding window of a layer in tokens; None sees every earlier position."""
_SMALL_PER_LARGE = LARGE_BLOCK // SMALL_BLOCK
_SMALL_REACH = LARGE_BLOCK + GUARD + SMALL_BLOCK
"""Exclusive bound on how far a row lies beyond the first key of one of its small blocks."""


def large_blocks(position: int) -> int:
    """Return the number of large blocks below a row."""
    return max(0, (position - GUARD) // LARGE_BLOCK)


def first_small_block(position: int) -> int:
    """Return the number of the first small block of a row; small blocks are counted from position 0."""
    return large_blocks(position) * _SMALL_PER_LARGE


@dataclass(frozen=True, slots=True)
class Span:
    """Rows at the consecutive positions `[first, end)` that have the same large blocks."""

    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first

    @property
    def large(self) -> int:
        """Number of large blocks below the rows."""
        return large_blocks(self.first)

    @property
    def small(self) -> range:
        """Small blocks that at least one row has."""
        return range(first_small_block(self.first), (self.end - 1) // SMALL_BLOCK + 1)

    def tiles(self, rows: int) -> Iterator[Span]:
        """Cut into spans of at most `rows` rows."""
        for first in range(self.first, self.end, rows):
            yield Span(first, min(self.end, first + rows))


def spans(first: int, end: int) -> Iterator[Span]:
    """Cut the positions `[first, end)` where the number of large blocks changes."""
    while first < end:
        border = (large_blocks(first) + 1) * LARGE_BLOCK + GUARD
        yield Span(first, min(end, border))
        first = min(end, border)


class WindowMasks:
    """Additive masks of the blocks of all rows in layers with one window, by a row's distance from the first key.

    The distance of a row at position p from a block whose first key is at position k is `p - k`. Key i of the block
    is seen if `i <= p - k` and `i > p - k - window`. Blocks that a row does not see at all are left open here: the
    sum gives them no weight, and the kernel stays free of NaN. Every row of a table stands G times, for the heads of
    its group. Small blocks always have a mask. A large block has one only if the
    window may cut it for some position with the same number of large blocks.
    """

    def __init__(self, window: Window, group: int, dtype: torch.dtype, device: torch.device) -> None:
        self.window = window
        self.group = group
        """Query heads per kv head."""
        small = _distance_mask(range(_SMALL_REACH), SMALL_BLOCK, window)
        self._small = small.to(device, dtype).repeat_interleave(group, 0)
        self.first_distance = 0
        """Least distance of a row from a large block with a mask."""
        cut = range(0)
        if window is not None:
            self.first_distance = LARGE_BLOCK * self._blocks_before_cut(window) + GUARD
            # One row beyond those that see something stands for all that see nothing.
            cut = range(self.first_distance, max(self.first_distance, window + LARGE_BLOCK - 1) + 1)
        large = _distance_mask(cut, LARGE_BLOCK, window)
        self._large = large.to(device, dtype).repeat_interleave(group, 0)

    @property
    def size_bytes(self) -> int:
        """Memory of the tables."""
        return self._small.nbytes + self._large.nbytes

    @staticmethod
    def _blocks_before_cut(window: int) -> int:
        """Return the distance in large blocks, from a row's border, of the nearest block that may be cut."""
        # The farthest row from block k among those with r large blocks is at (r - k) * LARGE_BLOCK + LARGE_BLOCK +
        # GUARD - 1 from its first key; the window cuts the block if that is at least the window.
        return max(1, -(-(window + 1 - LARGE_BLOCK - GUARD) // LARGE_BLOCK))

    def large_range(self, span: Span) -> tuple[int, int, int]:
        """Return the large blocks `[first, cut)` with a mask and `[cut, end)` without one that a span sees."""
        end = span.large
        if self.window is None:
            return 0, 0, end
        first = min(end, max(0, span.first - self.window + 1) // LARGE_BLOCK)
        cut = min(end, max(first, end - self._blocks_before_cut(self.window) + 1))
        return first, cut, end

    def first_small(self, span: Span) -> int:
        """Return the first small block that a row of the span sees."""
        if self.window is None:
            return span.small.start
        return max(span.small.start, max(0, span.first - self.window + 1) // SMALL_BLOCK)

    def large_rows(self, distance: int, rows: int) -> Tensor:
        """Return the mask `[rows * G, LARGE_BLOCK]` of rows at consecutive distances from `distance` on."""
        assert distance >= self.first_distance
        return _rows(self._large, (distance - self.first_distance) * self.group, rows * self.group)

    def small_rows(self, distance: int, rows: int) -> Tensor:
        """Return the mask `[rows * G, SMALL_BLOCK]` of rows at consecutive distances from `distance` on."""
        return _rows(self._small, distance * self.group, rows * self.group)

    def large_masks(self, distances: Tensor) -> Tensor:
        """Return the masks `[..., LARGE_BLOCK]` of rows at any distances; open where a row sees nothing."""
        places = (distances - self.first_distance).clamp(0, len(self._large) // self.group - 1)
        return self._large[places * self.group]

    def small_masks(self, distances: Tensor) -> Tensor:
        """Return the masks `[..., SMALL_BLOCK]` of rows at any distances; open where a row sees nothing."""
        return self._small[distances.clamp(0, _SMALL_REACH - 1) * self.group]

    def unseen(self, distances: Tensor, size: int) -> Tensor:
        """Return which rows see no key of a block of `size` keys, by their distances."""
        if self.window is None:
            return distances < 0
        return (distances < 0) | (distances >= self.window + size - 1)

    def rows_that_see(self, distance: int, rows: int, size: int) -> int:
        """Return how many of the rows at consecutive distances from `distance` on see a block; none before others."""
        if self.window is None:
            return rows
        return max(0, min(rows, self.window + size - 1 - distance))


def _distance_mask(distances: range, size: int, window: Window) -> Tensor:
    distance, key = torch.arange(distances.start, distances.stop)[:, None], torch.arange(size)[None]
    seen = key <= distance
    if window is not None:
        seen &= key > distance - window
    seen |= ~seen.any(1, keepdim=True)
    return torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)


def _rows(table: Tensor, begin: int, count: int) -> Tensor:
    found = table[begin : begin + count]
    return found if len(found) == count else F.pad(found, (0, 0, 0, count - len(found)))


@dataclass(frozen=True, slots=True)
class TreeSpan:
    """Nodes of a tree that have the same large blocks. Their blocks below the committed end are read in place."""

    nodes: Tensor
    """`[n]` the nodes, as indices into the tree."""
    positions: Tensor
    """`[n]`."""
    span: Span
    """All positions of the nodes."""
    in_place: range
    """Small blocks that lie wholly below the committed end."""
    gathered: range
    """Small blocks from the committed end on."""
    slots: Tensor
    """`[n, len(gathered) * SMALL_BLOCK]` cache rows of the gathered blocks; row 0 where a node has no key."""

    def carriers(self, block: int) -> list[tuple[Tensor, list[int]]]:
        """Return the gathered block of keys as each path of the tree has it, and the nodes that read it there.

        Cache rows `[SMALL_BLOCK]`, and indices into `nodes`. Nodes on one path read the same cache rows, masked above
        each node; so a path is gathered once. Nodes above the block are left out.
        """
        first = (block - self.gathered.start) * SMALL_BLOCK
        slots = self.slots[:, first : first + SMALL_BLOCK]
        seen = (self.positions - block * SMALL_BLOCK + 1).clamp(0, SMALL_BLOCK)
        found: list[tuple[Tensor, list[int]]] = []
        carrier_of: dict[int, int] = {}
        for node in seen.argsort(descending=True, stable=True).tolist():
            count = int(seen[node])
            if not count:
                continue
            own = slots[node, :count].tolist()
            # The last cache row is that of a tree's node, and tells all rows before it.
            if own[-1] not in carrier_of:
                carrier_of.update((slot, len(found)) for slot in own)
                found.append((slots[node], []))
            found[carrier_of[own[-1]]][1].append(node)
        return found

    def tiles(self, rows: int) -> Iterator[TreeSpan]:
        """Cut into parts of at most `rows` nodes."""
        for first in range(0, len(self.nodes), rows):
            at = slice(first, first + rows)
            yield replace(self, nodes=self.nodes[at], positions=self.positions[at], slots=self.slots[at])


def tree_spans(positions: Tensor, path: Tensor, committed: int) -> tuple[TreeSpan, ...]:
    """Return the spans of a tree whose node n is in cache row `committed + n`.

    positions `[N]`; path `[N, N]` bool marks a node's ancestors and itself. All on the host.
    """
    first_block = committed // SMALL_BLOCK
    end_block = int(positions.max()) // SMALL_BLOCK + 1
    first = first_block * SMALL_BLOCK
    slots = torch.zeros((len(positions), (end_block - first_block) * SMALL_BLOCK), dtype=torch.long)
    slots[:, : committed - first] = torch.arange(first, committed)
    nodes, ancestors = path.nonzero(as_tuple=True)
    slots[nodes, positions[ancestors] - first] = committed + ancestors
    found = []
    borders: Sequence[int] = (
        torch.div(positions - GUARD, LARGE_BLOCK, rounding_mode="floor").clamp(0).tolist()
    )
    for border in sorted(set(borders)):
        chosen = torch.tensor([node for node, value in enumerate(borders) if value == border])
        at = positions[chosen]
        span = Span(int(at.min()), int(at.max()) + 1)
        found.append(
            TreeSpan(
                chosen,
                at,
                span,
                in_place=range(span.small.start, max(span.small.start, first_block)),
                gathered=range(first_block, end_block),
                slots=slots[chosen],
            )
        )
    return tuple(found)
