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
from typing import Final, NamedTuple

import torch
from torch import Tensor

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.layer_description import AttentionShape
from subspec_cli.limits import ATTENTION_WORK_BYTES, LARGE_BLOCK, SMALL_BLOCK
from subspec_cli.modeling.block_kernels import BlockKernel, KernelName, block_kernel, padded_rows
from subspec_cli.modeling.key_blocks import Span, TreeSpan, Window, WindowMasks, spans, tree_spans

_MANY_NODES: Final = 4
"""Nodes of one path that get a kernel call of their own."""


@dataclass(frozen=True, slots=True)
class AttentionRules:
    """The rules under which a row's bits are independent of its company; the self-check finds them."""

    kernel: KernelName
    row_multiple: int
    """Query rows of a kernel call are padded to a multiple of this."""


FIRST_RULES: Final = AttentionRules("fused", 4)
"""The rules that the self-check tries first, and that hold on most machines."""


@dataclass(frozen=True, slots=True)
class ChainRows:
    """Rows at consecutive positions from `first` on, each in the cache row of its position."""

    first: int


class Blocks(NamedTuple):
    """Consecutive blocks of the cache."""

    first_key: int
    number: int
    size: int

    def of(self, cached: Tensor) -> Tensor:
        """Return the blocks of `[K, C, D]` keys or values as a view `[B, K, size, D]`."""
        K, _, D = cached.shape
        end = self.first_key + self.number * self.size
        return cached[:, self.first_key : end].view(K, self.number, self.size, D).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class PlacedCall:
    """A kernel call for nodes of a tree over consecutive blocks in place."""

    blocks: Blocks
    mask: Tensor | None
    """`[B, 1, R, size]`."""
    unseen: Tensor | None
    """`[B, n * G, 1]` where a node sees nothing of a block; None if each sees each block."""


@dataclass(frozen=True, slots=True)
class GatheredCall:
    """A kernel call for nodes of a tree over one block, gathered for each of `I` paths of the tree."""

    slots: Tensor
    """`[I * SMALL_BLOCK]` cache rows."""
    rows: Tensor
    """`[I * R]` folded query rows that read each path; some stand twice, to fill up."""
    paths: int
    mask: Tensor
    """`[I, 1, R, SMALL_BLOCK]`."""


@dataclass(frozen=True, slots=True)
class TreeTile:
    """Nodes whose blocks are computed together."""

    nodes: Tensor
    """`[n]` indices into the tree."""
    placed: tuple[PlacedCall, ...]
    gathered: tuple[tuple[GatheredCall, ...], ...]
    """The calls for each block after those in place."""


MaskKey = tuple[Window, int]
"""Layers with the same window and the same number of query heads per kv head have the same masks."""
TreeRows = Mapping[MaskKey, Sequence[TreeTile]]
"""The calls of a tree's nodes in layers with each kind of masks, made once per pass."""


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
        self.checked: Mapping[AttentionShape, int] = geometry.distinct_attention
        """The different attentions of layers, and the first layer of each."""
        self._query_width = max(shape.query_width for shape in self.checked)
        self._key_width = max(shape.key_width for shape in self.checked)
        self._element_bytes = dtype.itemsize
        self._device = device
        self._kernel = kernel or block_kernel(rules.kernel, geometry.arithmetic, device)
        self._masks: Mapping[MaskKey, WindowMasks] = {
            (shape.window, shape.group): WindowMasks(shape.window, shape.group, dtype, device)
            for shape in self.checked
        }

    def tree_rows(self, positions: Tensor, path: Tensor, committed: int) -> TreeRows:
        """Return the calls of a tree in cache rows from `committed` on; arguments as in `tree_spans`, on the host."""
        found = tree_spans(positions, path, committed)
        return {
            key: [
                self._tree_tile(tile, masks)
                for span in found
                for tile in span.tiles(self._tile_rows(span.span.large, SMALL_BLOCK))
            ]
            for key, masks in self._masks.items()
        }

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, rows: ChainRows | TreeRows, shape: AttentionShape
    ) -> Tensor:
        """Attend with `[N, H, D]` queries to cache rows `[K, C, D]`, which hold the rows' own keys and values.

        Returns `[N, H * D]`. C is a multiple of `SMALL_BLOCK`.
        """
        output = query.new_empty((len(query), shape.query_width))
        key = shape.window, shape.group
        if isinstance(rows, ChainRows):
            masks = self._masks[key]
            for span in spans(rows.first, rows.first + len(query)):
                for tile in span.tiles(self._tile_rows(span.large)):
                    at = slice(tile.first - rows.first, tile.end - rows.first)
                    folded = _folded(query[at], shape)
                    parts = list(self._chain_parts(folded, keys, values, tile, masks))
                    output[at] = _summed(parts, query[at], shape)
            return output
        for tree in rows[key]:
            chosen = query[tree.nodes]
            folded = _folded(chosen, shape)
            parts = [self._placed_part(call, folded, keys, values) for call in tree.placed]
            parts += [self._gathered_part(calls, folded, keys, values) for calls in tree.gathered]
            output[tree.nodes] = _summed(parts, chosen, shape)
        return output

    def _chain_parts(
        self, folded: Tensor, keys: Tensor, values: Tensor, span: Span, masks: WindowMasks
    ) -> Iterator[_Part]:
        """Yield the blocks of rows at consecutive positions, in order."""
        begin, cut, end = masks.large_range(span)
        group = masks.group
        for block in range(begin, cut):
            distance = span.first - block * LARGE_BLOCK
            rows = masks.rows_that_see(distance, len(span), LARGE_BLOCK)
            mask = masks.large_rows(distance, rows)[None, None]
            yield self._in_place(
                folded[:, : rows * group], keys, values, Blocks(block * LARGE_BLOCK, 1, LARGE_BLOCK), mask
            )
        if cut < end:
            yield self._in_place(
                folded, keys, values, Blocks(cut * LARGE_BLOCK, end - cut, LARGE_BLOCK), None
            )
        for block in range(masks.first_small(span), span.small.stop):
            start = block * SMALL_BLOCK
            first = max(span.first, start)  # rows before the block do not see it
            rows = masks.rows_that_see(first - start, span.end - first, SMALL_BLOCK)
            mask = masks.small_rows(first - start, rows)[None, None]
            at = slice((first - span.first) * group, (first - span.first + rows) * group)
            part = self._in_place(folded[:, at], keys, values, Blocks(start, 1, SMALL_BLOCK), mask)
            yield part._replace(first=at.start)

    def _tree_tile(self, tree: TreeSpan, masks: WindowMasks) -> TreeTile:
        """Make the calls of some nodes of a tree."""
        begin, cut, end = masks.large_range(tree.span)
        small = range(max(tree.in_place.start, masks.first_small(tree.span)), tree.in_place.stop)
        placed = []
        if begin < cut:
            placed.append(self._placed_call(tree, range(begin, cut), LARGE_BLOCK, masks))
        if cut < end:
            placed.append(PlacedCall(Blocks(cut * LARGE_BLOCK, end - cut, LARGE_BLOCK), None, None))
        if small:
            placed.append(self._placed_call(tree, small, SMALL_BLOCK, masks))
        gathered = tuple(self._gathered_calls(tree, block, masks) for block in tree.gathered)
        return TreeTile(tree.nodes.to(self._device), tuple(placed), gathered)

    def _placed_call(self, tree: TreeSpan, blocks: range, size: int, masks: WindowMasks) -> PlacedCall:
        """Make the call for masked blocks that are read in place."""
        distances = tree.positions - torch.tensor(blocks)[:, None] * size
        table = masks.large_masks if size == LARGE_BLOCK else masks.small_masks
        mask = table(distances.to(self._device)).repeat_interleave(masks.group, 1)[:, None]
        unseen = masks.unseen(distances, size).repeat_interleave(masks.group, 1)[..., None]
        return PlacedCall(
            Blocks(blocks.start * size, len(blocks), size),
            mask,
            unseen.to(self._device) if unseen.any() else None,
        )

    def _gathered_calls(self, tree: TreeSpan, block: int, masks: WindowMasks) -> tuple[GatheredCall, ...]:
        """Make the calls for one gathered block: one for each path of many nodes, one for all the others."""
        distances = tree.positions - block * SMALL_BLOCK
        hidden = masks.unseen(distances, SMALL_BLOCK).tolist()
        carriers = [
            (slots, seeing)
            for slots, nodes in tree.carriers(block)
            if (seeing := [node for node in nodes if not hidden[node]])
        ]
        few = [carrier for carrier in carriers if len(carrier[1]) < _MANY_NODES]
        groups = [[carrier] for carrier in carriers if len(carrier[1]) >= _MANY_NODES] + (
            [few] if few else []
        )
        return tuple(self._gathered_call(group, distances, masks) for group in groups)

    def _gathered_call(
        self, carriers: Sequence[tuple[Tensor, list[int]]], distances: Tensor, masks: WindowMasks
    ) -> GatheredCall:
        width = max(len(nodes) for _, nodes in carriers)
        nodes = torch.tensor([[*nodes, *[nodes[-1]] * (width - len(nodes))] for _, nodes in carriers])
        rows = (nodes[..., None] * masks.group + torch.arange(masks.group)).flatten()
        mask = masks.small_masks(distances[nodes].to(self._device)).repeat_interleave(masks.group, 1)[:, None]
        slots = torch.cat([slots for slots, _ in carriers])
        return GatheredCall(slots.to(self._device), rows.to(self._device), len(carriers), mask)

    def _placed_part(self, call: PlacedCall, folded: Tensor, keys: Tensor, values: Tensor) -> _Part:
        part = self._in_place(folded, keys, values, call.blocks, call.mask)
        if call.unseen is not None:
            part.log_sum.masked_fill_(call.unseen, -torch.inf)
        return part

    def _in_place(
        self, folded: Tensor, keys: Tensor, values: Tensor, blocks: Blocks, mask: Tensor | None
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

    def _gathered_part(
        self, calls: Sequence[GatheredCall], folded: Tensor, keys: Tensor, values: Tensor
    ) -> _Part:
        """Attend with each node to the block as its path has it; paths are items of the kernel's batch."""
        K, rows, D = folded.shape
        whole = folded.new_zeros((rows, K, D), dtype=torch.float32)
        log_sum = folded.new_full((rows, K), -torch.inf, dtype=torch.float32)
        for call in calls:
            width = len(call.rows) // call.paths
            query = folded.index_select(1, call.rows).view(K, call.paths, width, D).transpose(0, 1)
            own_keys, own_values = (
                cached.index_select(1, call.slots).view(K, call.paths, SMALL_BLOCK, D).transpose(0, 1)
                for cached in (keys, values)
            )
            output, found = self._kernel(
                padded_rows(query, self.rules.row_multiple),
                own_keys,
                own_values,
                padded_rows(call.mask, self.rules.row_multiple),
            )
            whole.index_copy_(0, call.rows, output[:, :width].reshape(-1, K, D).float())
            log_sum.index_copy_(0, call.rows, found[:, :width].reshape(-1, K))
        return _Part(0, whole[None], log_sum[None])

    def _tile_rows(self, large: int, gathered_keys: int = 0) -> int:
        """Return how many rows with so many large blocks may be computed at once, by the memory for their results."""
        blocks = large + LARGE_BLOCK // SMALL_BLOCK + 1
        row_bytes = self._query_width * (blocks * self._element_bytes + 12)
        row_bytes += 2 * gathered_keys * self._key_width * self._element_bytes
        rows = ATTENTION_WORK_BYTES // row_bytes
        return rows // SMALL_BLOCK * SMALL_BLOCK if rows >= SMALL_BLOCK else max(1, rows)


def _summed(parts: Sequence[_Part], query: Tensor, shape: AttentionShape) -> Tensor:
    """Sum the blocks of `[n, H, D]` queries in order, weighted by their log-sum-exp; returns `[n, H * D]`.

    Multiplications and additions are separate, each of them rounded: a fused one may or may not be taken at the
    end of a vector, and a row's bits would depend on where it stands.
    """
    rows, K, D = len(query) * shape.group, shape.kv_heads, shape.head_dim
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
    return mixed.view(len(query), shape.group, K, D).transpose(1, 2).reshape(len(query), -1)


def _folded(query: Tensor, shape: AttentionShape) -> Tensor:
    """Return `[n, H, D]` queries as `[K, n * G, D]`: the heads of a group are rows beside each other."""
    n, K, G, D = len(query), shape.kv_heads, shape.group, shape.head_dim
    return query.view(n, K, G, D).transpose(0, 1).reshape(K, n * G, D)
