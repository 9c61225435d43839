"""The part of the self-check for attention over the cache: does a row keep its bits in every company?

Rows of a long chain are the reference. The same rows are computed alone, in pieces of many sizes, and as nodes of
draft trees beside rejected siblings, from other cache rows. The places are chosen where blocks and windows begin and
end. Kernels that feel their company were seen to differ in 1 of 150 lone rows, so hundreds of rows are tried. The
session's own empty cache holds the keys, so the check needs no memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from subspec_cli.checkpoint.layer_description import AttentionShape
from subspec_cli.limits import GUARD, LARGE_BLOCK, SMALL_BLOCK
from subspec_cli.modeling.block_kernels import KernelName
from subspec_cli.modeling.exact_attention import AttentionRules, ChainRows, ExactAttention
from subspec_cli.modeling.kv_cache import KVCache

_KERNELS: Final[tuple[KernelName, ...]] = ("fused", "products")
_ROW_MULTIPLES: Final = (4, 8, 16, 32)
_PIECES: Final = (2, 3, 5, 8, 17, 33, 64)
_NODES: Final = (5, 8, 13, 16, 21, 24, 33, 48, 64, 128)
_SMALL_TREE_STRIDE: Final = 5
_DEEPEST: Final = 40
_CHUNK_ROWS: Final = LARGE_BLOCK + 2 * GUARD + SMALL_BLOCK
_FEW_ROWS: Final = 2 * SMALL_BLOCK
_PERIOD: Final = 577
"""Random keys repeat after so many rows, which is no multiple of a block: long caches fill quickly."""


def find_attention_rules(
    attention_for: Callable[[AttentionRules], ExactAttention], kv: KVCache, *, most_nodes: int
) -> tuple[AttentionRules, str]:
    """Return the first rules under which rows keep their bits, and nothing or the name of what fails.

    The first rules are returned if none hold. The cache must be empty; it is zero again afterwards.
    """
    rules = [AttentionRules(kernel, multiple) for kernel in _KERNELS for multiple in _ROW_MULTIPLES]
    generator = torch.Generator().manual_seed(0)
    for candidate in rules:
        attention = attention_for(candidate)
        if all(
            _rows_keep_bits(attention, kv, layer, shape, generator, most_nodes)
            for shape, layer in attention.checked.items()
        ):
            return candidate, ""
    return rules[0], "attention over the cache"


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Random rows in the cache's shape and type."""

    generator: torch.Generator
    like: Tensor

    def rows(self, heads: int, count: int) -> Tensor:
        """Return `[heads, count, D]`."""
        drawn = torch.randn((heads, count, self.like.shape[-1]), generator=self.generator)
        return drawn.to(self.like.device, self.like.dtype)

    def fill(self, memory: Tensor) -> None:
        """Fill `[K, C, D]` with rows that repeat after `_PERIOD`."""
        rows = self.rows(memory.shape[0], min(_PERIOD, memory.shape[1]))
        for first in range(0, memory.shape[1], _PERIOD):
            part = memory[:, first : first + _PERIOD]
            part.copy_(rows[:, : part.shape[1]])


def _rows_keep_bits(
    attention: ExactAttention,
    kv: KVCache,
    layer: int,
    shape: AttentionShape,
    generator: torch.Generator,
    most_nodes: int,
) -> bool:
    """Check one layer's attention, on random rows in its part of the cache."""
    keys, values = kv.read(layer, kv.rows)
    drawn = _Drawn(generator, keys)
    try:
        for memory in (keys, values):
            drawn.fill(memory)
        return all(
            _interval_keeps_bits(attention, keys, values, interval, shape, drawn, most_nodes)
            for interval in _intervals(keys.shape[1], shape.window)
        )
    finally:
        keys.zero_()
        values.zero_()


def _intervals(capacity: int, window: int | None) -> Iterator[range]:
    """Yield the positions to check: the beginning, where blocks and the window cut, and the end of the cache."""
    yield range(min(_CHUNK_ROWS, capacity))
    borders = [2 * LARGE_BLOCK + GUARD]
    if window is not None:
        borders += [window, window + LARGE_BLOCK, window + LARGE_BLOCK + GUARD]
    starts = {border - SMALL_BLOCK // 2 for border in borders} | {capacity - _FEW_ROWS}
    for start in sorted(starts):
        if start >= _CHUNK_ROWS and start + _FEW_ROWS <= capacity:
            yield range(start, start + _FEW_ROWS)


def _interval_keeps_bits(
    attention: ExactAttention,
    keys: Tensor,
    values: Tensor,
    interval: range,
    shape: AttentionShape,
    drawn: _Drawn,
    most_nodes: int,
) -> bool:
    query = drawn.rows(shape.heads, len(interval)).transpose(0, 1).contiguous()
    whole = attention.attend(query, keys, values, ChainRows(interval.start), shape)
    if not whole.isfinite().all():
        return False
    for first, size in _pieces(len(interval)):
        piece = slice(first, first + size)
        rows = ChainRows(interval.start + first)
        if not torch.equal(attention.attend(query[piece], keys, values, rows, shape), whole[piece]):
            return False
    for first, size in _trees(len(interval), most_nodes):
        tree = _Tree(interval.start + first, size, drawn)
        found = tree.attend(attention, query[first:], keys, values, shape)
        if not torch.equal(found, whole[first : first + len(found)]):
            return False
    return True


def _pieces(rows: int) -> Iterator[tuple[int, int]]:
    """Yield the first row and the size of pieces of a chain: every row alone, and some of each other size."""
    yield from ((first, 1) for first in range(rows))
    for number, size in enumerate(_PIECES):
        if size <= rows:
            yield number * 79 % (rows - size + 1), size


def _trees(rows: int, most_nodes: int) -> Iterator[tuple[int, int]]:
    """Yield the root's row and the number of nodes of trees: small ones in many places, since they are common."""
    for number in range(rows // _SMALL_TREE_STRIDE):
        yield number * _SMALL_TREE_STRIDE, min(1 + number % 4, most_nodes, rows - number * _SMALL_TREE_STRIDE)
    sizes = sorted(size for size in {*_NODES, most_nodes} if size <= min(most_nodes, rows))
    yield from ((number * 83 % (rows - size + 1), size) for number, size in enumerate(sizes))


class _Tree:
    """A tree whose longest path is a piece of the chain; all other nodes are siblings that do not exist in it."""

    def __init__(self, committed: int, nodes: int, drawn: _Drawn) -> None:
        self._committed, self._nodes, self._drawn = committed, nodes, drawn
        depth = max(1, min(_DEEPEST, (2 * nodes + 2) // 3))
        order = torch.randperm(nodes, generator=drawn.generator)
        self._on_path = order[:depth].sort().values
        """Nodes of the path, root first."""
        self._depths = torch.zeros(nodes, dtype=torch.long)
        self._path = torch.eye(nodes, dtype=torch.bool)
        self._depths[self._on_path] = torch.arange(depth)
        for level, node in enumerate(self._on_path.tolist()):
            self._path[node, self._on_path[: level + 1]] = True
        for node in order[depth:].tolist():
            level = node % depth
            self._depths[node] = level
            self._path[node, self._on_path[:level]] = True

    def attend(
        self, attention: ExactAttention, query: Tensor, keys: Tensor, values: Tensor, shape: AttentionShape
    ) -> Tensor:
        """Return the rows of the path, root first; the cache is as before afterwards."""
        at = slice(self._committed, self._committed + self._nodes)
        path = self._on_path.to(keys.device)
        queries = self._drawn.rows(query.shape[1], self._nodes).transpose(0, 1).contiguous()
        queries[path] = query[: len(path)]
        saved = keys[:, at].clone(), values[:, at].clone()
        for memory, rows in zip((keys, values), saved, strict=True):
            memory[:, at] = self._drawn.rows(len(memory), self._nodes)
            memory[:, at][:, path] = rows[:, : len(path)]
        tree = attention.tree_rows(self._depths + self._committed, self._path, self._committed)
        found = attention.attend(queries, keys, values, tree, shape)[path]
        for memory, rows in zip((keys, values), saved, strict=True):
            memory[:, at] = rows
        return found
