"""Attention of the target: each row reduces its keys in order of position, in blocks that positions alone decide.

Every block goes through a kernel that returns its output and log-sum-exp. The blocks of a row are summed in order in
float32 and rounded once. So a row has the same bits in a chunk of a prompt, alone, and in a draft tree, wherever its
keys lie in the cache. Two conditions are left to the kernel, and the self-check tests them: a row's result is
independent of the rows beside it, and of the kernel's batch. See ARCHITECTURE.md, "Why tokens are identical".

Shapes: `N` rows, `H` heads, `K` kv heads, `G = H / K`, `C` cache rows, `D` head dim, `R` rows of all heads of a group
and their padding, `B` blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.limits import ATTENTION_WORK_BYTES, LARGE_BLOCK, SMALL_BLOCK
from subspec_cli.modeling.block_kernels import BlockKernel, KernelName, block_kernel, padded_rows
from subspec_cli.modeling.key_blocks import Span, TreeSpan, Window, WindowMasks, spans, tree_spans


@dataclass(frozen=True, slots=True)
class AttentionRules:
    """The rules under which a row's bits are independent of its company; the self-check finds them."""

    kernel: KernelName
    row_multiple: int
    """Query rows of a kernel call are padded to a multiple of this."""


@dataclass(frozen=True, slots=True)
class ChainRows:
    """Rows at consecutive positions from `first` on, each in the cache row of its position."""

    first: int


@dataclass(frozen=True, slots=True)
class TreeCall:
    """A kernel call for nodes of a tree: consecutive blocks in place, or blocks gathered for each node."""

    first_key: int
    """First cache row of the blocks that are read in place."""
    blocks: int
    size: int
    """Keys of a block."""
    mask: Tensor | None
    """`[B, 1, R, size]` in place, `[n * B, 1, 1, size]` gathered."""
    unseen: Tensor | None
    """`[B, n * G, 1]` where a node sees nothing of a block; None if each sees each block."""
    slots: Tensor | None = None
    """`[n * B * size]` cache rows of gathered blocks."""


@dataclass(frozen=True, slots=True)
class TreeTile:
    """Nodes whose calls are computed together."""

    nodes: Tensor
    """`[n]` indices into the tree."""
    calls: tuple[TreeCall, ...]
    """In the order of positions."""


TreeRows = Mapping[Window, Sequence[TreeTile]]
"""The calls of a tree's nodes in layers with each window, made once per pass."""


class _Part(NamedTuple):
    """Results of consecutive blocks for the folded query rows `[first, first + R)`."""

    first: int
    output: Tensor
    """`[B, R, K, D]`."""
    log_sum: Tensor
    """`[B, R, K]` float32; -inf where a row sees nothing of a block."""


class ExactAttention:
    """Attends over the KV cache of one model under given rules."""

    def __init__(
        self,
        geometry: ModelGeometry,
        rules: AttentionRules,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernel: BlockKernel | None = None,
    ) -> None:
        self.rules = rules
        self._K, self._D = geometry.kv_heads, geometry.head_dim
        self._G = geometry.heads // geometry.kv_heads
        self._element_bytes = dtype.itemsize
        self._device = device
        self._kernel = kernel or block_kernel(rules.kernel, device)
        self._masks: Mapping[Window, WindowMasks] = {
            window: WindowMasks(window, self._G, dtype, device) for window in set(geometry.windows)
        }

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self._K * self._G

    @property
    def windows(self) -> Sequence[Window]:
        """The distinct windows of the model's layers."""
        return tuple(self._masks)

    def tree_rows(self, positions: Tensor, path: Tensor, committed: int) -> TreeRows:
        """Return the calls of a tree in cache rows from `committed` on; arguments as in `tree_spans`, on the host."""
        found = tree_spans(positions, path, committed)
        return {
            window: [
                self._tree_tile(tile, masks)
                for span in found
                for tile in span.tiles(self._tile_rows(span.span.large, len(span.gathered) * SMALL_BLOCK))
            ]
            for window, masks in self._masks.items()
        }

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, rows: ChainRows | TreeRows, window: Window
    ) -> Tensor:
        """Attend with `[N, H, D]` queries to cache rows `[K, C, D]`, which hold the rows' own keys and values.

        Returns `[N, H * D]`. C is a multiple of `SMALL_BLOCK`.
        """
        output = query.new_empty((len(query), self._K * self._G * self._D))
        if isinstance(rows, ChainRows):
            masks = self._masks[window]
            for span in spans(rows.first, rows.first + len(query)):
                for tile in span.tiles(self._tile_rows(span.large)):
                    at = slice(tile.first - rows.first, tile.end - rows.first)
                    folded = self._fold(query[at])
                    output[at] = self._sum(
                        list(self._chain_parts(folded, keys, values, tile, masks)), query[at]
                    )
            return output
        for nodes in rows[window]:
            chosen = query[nodes.nodes]
            folded = self._fold(chosen)
            parts = [self._tree_part(call, chosen, folded, keys, values) for call in nodes.calls]
            output[nodes.nodes] = self._sum(parts, chosen)
        return output

    def _chain_parts(
        self, folded: Tensor, keys: Tensor, values: Tensor, span: Span, masks: WindowMasks
    ) -> Iterator[_Part]:
        """Yield the blocks of rows at consecutive positions, in order."""
        first, cut, end = masks.large_range(span)
        for block in range(first, cut):
            distance = span.first - block * LARGE_BLOCK
            rows = masks.rows_that_see(distance, len(span), LARGE_BLOCK)
            mask = masks.large_rows(distance, rows)[None, None]
            yield self._in_place(
                folded[:, : rows * self._G], keys, values, _Blocks(block * LARGE_BLOCK, 1, LARGE_BLOCK), mask
            )
        if cut < end:
            yield self._in_place(
                folded, keys, values, _Blocks(cut * LARGE_BLOCK, end - cut, LARGE_BLOCK), None
            )
        for block in range(masks.first_small(span), span.small.stop):
            start = block * SMALL_BLOCK
            above = max(0, start - span.first)
            """Rows of the span below the block."""
            distance = span.first + above - start
            rows = masks.rows_that_see(distance, len(span) - above, SMALL_BLOCK)
            mask = masks.small_rows(distance, rows)[None, None]
            at = slice(above * self._G, (above + rows) * self._G)
            part = self._in_place(folded[:, at], keys, values, _Blocks(start, 1, SMALL_BLOCK), mask)
            yield part._replace(first=at.start)

    def _tree_tile(self, tree: TreeSpan, masks: WindowMasks) -> TreeTile:
        """Make the calls of some nodes of a tree."""
        first, cut, end = masks.large_range(tree.span)
        small = range(max(tree.in_place.start, masks.first_small(tree.span)), tree.in_place.stop)
        calls = []
        if first < cut:
            calls.append(self._placed(tree, range(first, cut), LARGE_BLOCK, masks))
        if cut < end:
            calls.append(TreeCall(cut * LARGE_BLOCK, end - cut, LARGE_BLOCK, None, None))
        if small:
            calls.append(self._placed(tree, small, SMALL_BLOCK, masks))
        distances = tree.positions[:, None] - torch.tensor(tree.gathered) * SMALL_BLOCK
        calls.append(
            TreeCall(
                0,
                len(tree.gathered),
                SMALL_BLOCK,
                masks.small_masks(distances.to(self._device)).view(-1, 1, 1, SMALL_BLOCK),
                self._unseen(masks.unseen(distances.T, SMALL_BLOCK)),
                tree.slots.reshape(-1).to(self._device),
            )
        )
        return TreeTile(tree.nodes.to(self._device), tuple(calls))

    def _placed(self, tree: TreeSpan, blocks: range, size: int, masks: WindowMasks) -> TreeCall:
        """Make the call for masked blocks that are read in place."""
        distances = tree.positions - torch.tensor(blocks)[:, None] * size
        table = masks.large_masks if size == LARGE_BLOCK else masks.small_masks
        mask = table(distances.to(self._device)).repeat_interleave(self._G, 1)
        return TreeCall(
            blocks.start * size, len(blocks), size, mask[:, None], self._unseen(masks.unseen(distances, size))
        )

    def _unseen(self, unseen: Tensor) -> Tensor | None:
        """Return which folded rows `[B, n * G, 1]` see nothing of a block; None if there are none."""
        if not unseen.any():
            return None
        return unseen.repeat_interleave(self._G, 1)[..., None].to(self._device)

    def _tree_part(
        self, call: TreeCall, query: Tensor, folded: Tensor, keys: Tensor, values: Tensor
    ) -> _Part:
        if call.slots is None:
            part = self._in_place(
                folded, keys, values, _Blocks(call.first_key, call.blocks, call.size), call.mask
            )
        else:
            part = self._gathered(call, query, keys, values)
        if call.unseen is not None:
            part.log_sum.masked_fill_(call.unseen, -torch.inf)
        return part

    def _in_place(
        self, folded: Tensor, keys: Tensor, values: Tensor, blocks: _Blocks, mask: Tensor | None
    ) -> _Part:
        """Attend with `[K, R, D]` query rows to consecutive blocks; each block is an item of the kernel's batch."""
        rows = folded.shape[1]
        query = padded_rows(folded, self.rules.row_multiple)
        if mask is not None:
            mask = padded_rows(mask, self.rules.row_multiple)
        output, log_sum = self._kernel(
            query[None].expand(blocks.number, -1, -1, -1), blocks.of(keys), blocks.of(values), mask
        )
        return _Part(0, output[:, :rows], log_sum[:, :rows])

    def _gathered(self, call: TreeCall, query: Tensor, keys: Tensor, values: Tensor) -> _Part:
        """Attend with each node to blocks of its own; nodes and their blocks are items of the kernel's batch."""
        n, B, K, G, D = len(query), call.blocks, self._K, self._G, self._D
        assert call.slots is not None
        heads = padded_rows(query.view(n, 1, K, G, D), self.rules.row_multiple)
        heads = heads.expand(n, B, *heads.shape[2:]).reshape(n * B, *heads.shape[2:])
        own_keys = keys.index_select(1, call.slots).view(K, n * B, call.size, D).transpose(0, 1)
        own_values = values.index_select(1, call.slots).view(K, n * B, call.size, D).transpose(0, 1)
        output, log_sum = self._kernel(heads, own_keys, own_values, call.mask)
        output = output[:, :G].reshape(n, B, G, K, D).transpose(0, 1).reshape(B, n * G, K, D)
        return _Part(0, output, log_sum[:, :G].reshape(n, B, G, K).transpose(0, 1).reshape(B, n * G, K))

    def _sum(self, parts: Sequence[_Part], query: Tensor) -> Tensor:
        """Sum the blocks of `[n, H, D]` queries in order, weighted by their log-sum-exp; returns `[n, H * D]`.

        Multiplications and additions are separate, each of them rounded: a fused one may or may not be taken at the
        end of a vector, and a row's bits would depend on where it stands.
        """
        rows, K, D = len(query) * self._G, self._K, self._D
        log_sums = query.new_full(
            (sum(len(part.output) for part in parts), rows, K), -torch.inf, dtype=torch.float32
        )
        block = 0
        for part in parts:
            count, width = part.log_sum.shape[:2]
            log_sums[block : block + count, part.first : part.first + width] = part.log_sum
            block += count
        weights = log_sums.sub_(log_sums.amax(0)).exp_()[..., None]
        total, summed = torch.zeros_like(weights[0]), query.new_zeros((rows, K, D), dtype=torch.float32)
        weighted = torch.empty_like(summed)
        outputs = ((part.first, output) for part in parts for output in part.output)
        for weight, (first, output) in zip(weights, outputs, strict=True):
            at = slice(first, first + len(output))
            summed[at].add_(weighted[at].copy_(output).mul_(weight[at]))
            total.add_(weight)
        mixed = summed.div_(total).to(query.dtype)
        return mixed.view(len(query), self._G, K, D).transpose(1, 2).reshape(len(query), -1)

    def _fold(self, query: Tensor) -> Tensor:
        """Return `[n, H, D]` queries as `[K, n * G, D]`: the heads of a group are rows beside each other."""
        n = len(query)
        return query.view(n, self._K, self._G, self._D).transpose(0, 1).reshape(self._K, n * self._G, self._D)

    def _tile_rows(self, large: int, gathered_keys: int = 0) -> int:
        """Return how many rows with so many large blocks may be computed at once, by the memory for their results."""
        blocks = large + LARGE_BLOCK // SMALL_BLOCK + 1
        row_bytes = self._K * self._G * self._D * (blocks * self._element_bytes + 12)
        row_bytes += 2 * gathered_keys * self._K * self._D * self._element_bytes
        rows = ATTENTION_WORK_BYTES // row_bytes
        return rows // SMALL_BLOCK * SMALL_BLOCK if rows >= SMALL_BLOCK else max(1, rows)


class _Blocks(NamedTuple):
    """Consecutive blocks of the cache."""

    first_key: int
    number: int
    size: int

    def of(self, cached: Tensor) -> Tensor:
        """Return the blocks of `[K, C, D]` keys or values as a view `[B, K, size, D]`."""
        K, _, D = cached.shape
        end = self.first_key + self.number * self.size
        return cached[:, self.first_key : end].view(K, self.number, self.size, D).transpose(0, 1)
