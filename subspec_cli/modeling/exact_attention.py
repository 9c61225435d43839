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
import torch.nn.functional as F
from torch import Tensor

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.layer_description import AttentionShape
from subspec_cli.limits import ATTENTION_WORK_BYTES, LARGE_BLOCK, SMALL_BLOCK
from subspec_cli.modeling.block_kernels import BlockKernel, KernelName, block_kernel, padded_rows
from subspec_cli.modeling.key_blocks import Span, TreeSpan, Window, WindowMasks, spans, tree_spans
from subspec_cli.modeling.row_rules import serial

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
    """`[B, R, 1]` where a node sees nothing of a block; None if each sees each block."""


@dataclass(frozen=True, slots=True)
class GatheredCall:
    """A kernel call for nodes of a tree over one block, gathered for each of `I` paths of the tree."""

    slots: Tensor
    """`[I * SMALL_BLOCK]` cache rows."""
    rows: Tensor
    """`[I * W]` folded query rows that read each path; some stand twice, to fill up."""
    paths: int
    mask: Tensor
    """`[I, 1, W, SMALL_BLOCK]`."""


@dataclass(frozen=True, slots=True)
class GatheredBlock:
    """A block after those in place: the calls that compute it, and where each row's result is among theirs."""

    calls: tuple[GatheredCall, ...]
    """At least one."""
    places: Tensor
    """`[R]` places in the results of all calls, one call after the other; 0 for a row that sees nothing."""
    unseen: Tensor | None
    """`[R, 1]` rows that see nothing of the block; None if each sees something."""


@dataclass(frozen=True, slots=True)
class TreeTile:
    """Nodes whose blocks are computed together. Their folded rows are padded to `R` once for all calls."""

    nodes: Tensor | None
    """`[n]` indices into the tree; None for all nodes in their order."""
    placed: tuple[PlacedCall, ...]
    gathered: tuple[GatheredBlock, ...]


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
                self._tree_tile(tile, masks, is_whole=len(tile.nodes) == len(positions))
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
                    output[at] = _summed(parts, query[at], folded.shape[1], shape)
            return output
        for tree in rows[key]:
            chosen = query if tree.nodes is None else query[tree.nodes]
            with serial(chosen.numel()):
                folded = padded_rows(_folded(chosen, shape), self.rules.row_multiple)
            parts = [self._placed_part(call, folded, keys, values) for call in tree.placed]
            parts += [self._gathered_part(block, folded, keys, values) for block in tree.gathered]
            with serial(folded.numel()):
                found = _summed(parts, chosen, folded.shape[1], shape)
            if tree.nodes is None:
                return found
            output[tree.nodes] = found
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

    def _tree_tile(self, tree: TreeSpan, masks: WindowMasks, *, is_whole: bool) -> TreeTile:
        """Make the calls of some nodes of a tree, or of all nodes in their order."""
        begin, cut, end = masks.large_range(tree.span)
        small = range(max(tree.in_place.start, masks.first_small(tree.span)), tree.in_place.stop)
        placed = []
        if begin < cut:
            placed.append(self._placed_call(tree, range(begin, cut), LARGE_BLOCK, masks))
        if cut < end:
            placed.append(PlacedCall(Blocks(cut * LARGE_BLOCK, end - cut, LARGE_BLOCK), None, None))
        if small:
            placed.append(self._placed_call(tree, small, SMALL_BLOCK, masks))
        gathered = (self._gathered_block(tree, block, masks) for block in tree.gathered)
        nodes = None if is_whole else tree.nodes.to(self._device)
        return TreeTile(nodes, tuple(placed), tuple(block for block in gathered if block is not None))

    def _placed_call(self, tree: TreeSpan, blocks: range, size: int, masks: WindowMasks) -> PlacedCall:
        """Make the call for masked blocks that are read in place."""
        distances = tree.positions - torch.tensor(blocks)[:, None] * size
        table = masks.large_masks if size == LARGE_BLOCK else masks.small_masks
        mask = table(distances.to(self._device)).repeat_interleave(masks.group, 1)[:, None]
        return PlacedCall(
            Blocks(blocks.start * size, len(blocks), size),
            padded_rows(mask, self.rules.row_multiple),
            self._unseen(masks.unseen(distances, size).repeat_interleave(masks.group, 1)),
        )

    def _unseen(self, rows: Tensor) -> Tensor | None:
        """Return which of `[..., R]` rows see nothing, as a padded column; None if all see some."""
        if not rows.any():
            return None
        return padded_rows(rows[..., None], self.rules.row_multiple).to(self._device)

    def _gathered_block(self, tree: TreeSpan, block: int, masks: WindowMasks) -> GatheredBlock | None:
        """Make the calls for one gathered block: one for each path of many nodes, one for all the others.

        Return None if no node sees the block.
        """
        distances = tree.positions - block * SMALL_BLOCK
        hidden = masks.unseen(distances, SMALL_BLOCK).tolist()
        carriers = [
            (slots, seeing)
            for slots, nodes in tree.carriers(block)
            if (seeing := [node for node in nodes if not hidden[node]])
        ]
        if not carriers:
            return None
        few = [carrier for carrier in carriers if len(carrier[1]) < _MANY_NODES]
        groups = [[carrier] for carrier in carriers if len(carrier[1]) >= _MANY_NODES] + (
            [few] if few else []
        )
        calls = [self._gathered_call(group, distances, masks) for group in groups]
        computed = torch.cat([rows for _, rows in calls])
        rows = len(distances) * masks.group
        places = torch.full((rows + -rows % self.rules.row_multiple,), -1)
        places[computed] = torch.arange(len(computed))
        unseen = self._unseen(places[:rows] < 0)
        return GatheredBlock(tuple(call for call, _ in calls), places.clamp_(0).to(self._device), unseen)

    def _gathered_call(
        self, carriers: Sequence[tuple[Tensor, list[int]]], distances: Tensor, masks: WindowMasks
    ) -> tuple[GatheredCall, Tensor]:
        """Make a call for some paths; return its rows on the host as well."""
        width = max(len(nodes) for _, nodes in carriers)
        nodes = torch.tensor([[*nodes, *[nodes[-1]] * (width - len(nodes))] for _, nodes in carriers])
        rows = (nodes[..., None] * masks.group + torch.arange(masks.group)).flatten(1)
        mask = masks.small_masks(distances[nodes].to(self._device)).repeat_interleave(masks.group, 1)
        # The last row fills up as well, so that queries are gathered with their padding.
        missing = -rows.shape[1] % self.rules.row_multiple
        rows = torch.cat((rows, rows[:, -1:].expand(-1, missing)), 1).flatten()
        mask = torch.cat((mask, mask[:, -1:].expand(-1, missing, -1)), 1)[:, None]
        slots = torch.cat([slots for slots, _ in carriers])
        return GatheredCall(slots.to(self._device), rows.to(self._device), len(carriers), mask), rows

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

    def _gathered_part(self, block: GatheredBlock, folded: Tensor, keys: Tensor, values: Tensor) -> _Part:
        """Attend with each node to the block as its path has it; paths are items of the kernel's batch."""
        K, _, D = folded.shape
        outputs, log_sums = [], []
        for call in block.calls:
            with serial(folded.numel()):
                query = folded.index_select(1, call.rows).view(K, call.paths, -1, D).transpose(0, 1)
                own_keys, own_values = (
                    cached.index_select(1, call.slots).view(K, call.paths, SMALL_BLOCK, D).transpose(0, 1)
                    for cached in (keys, values)
                )
            output, log_sum = self._kernel(query, own_keys, own_values, call.mask)
            outputs.append(output.reshape(-1, K, D))
            log_sums.append(log_sum.reshape(-1, K))
        with serial(folded.numel()):
            output, log_sum = (
                torch.cat(found).index_select(0, block.places) for found in (outputs, log_sums)
            )
        if block.unseen is not None:
            log_sum.masked_fill_(block.unseen, -torch.inf)
        return _Part(0, output[None], log_sum[None])

    def _tile_rows(self, large: int, gathered_keys: int = 0) -> int:
        """Return how many rows with so many large blocks may be computed at once, by the memory for their results."""
        blocks = large + LARGE_BLOCK // SMALL_BLOCK + 1
        row_bytes = self._query_width * (blocks * self._element_bytes + 12)
        row_bytes += 2 * gathered_keys * self._key_width * self._element_bytes
        rows = ATTENTION_WORK_BYTES // row_bytes
        return rows // SMALL_BLOCK * SMALL_BLOCK if rows >= SMALL_BLOCK else max(1, rows)


def _summed(parts: Sequence[_Part], query: Tensor, rows: int, shape: AttentionShape) -> Tensor:
    """Sum the blocks of `[n, H, D]` queries in order, weighted by their log-sum-exp; returns `[n, H * D]`.

    `rows` counts the folded rows, with padding if the parts have it. Multiplications and additions are separate,
    each of them rounded: a fused one may or may not be taken at the end of a vector, and a row's bits would depend on
    where it stands.
    """
    n, K, G, D = len(query), shape.kv_heads, shape.group, shape.head_dim
    weights = _whole_log_sums(parts, rows)
    weights = weights.sub_(weights.amax(0)).exp_()[..., None]
    total, summed = torch.zeros_like(weights[0]), query.new_zeros((rows, K, D), dtype=torch.float32)
    weighted = torch.empty_like(summed)
    outputs = ((part.first, output) for part in parts for output in part.output)
    for weight, (first, output) in zip(weights, outputs, strict=True):
        at = slice(first, first + len(output))
        summed[at].add_(weighted[at].copy_(output).mul_(weight[at]))
        total.add_(weight)
    mixed = summed.div_(total)[: n * G].view(n, G, K, D).transpose(1, 2)
    return mixed.to(query.dtype, memory_format=torch.contiguous_format).reshape(n, -1)


def _whole_log_sums(parts: Sequence[_Part], rows: int) -> Tensor:
    """Return the log-sum-exp of all blocks, `[B, rows, K]`, in fresh memory; -inf where a part has no row."""
    if all(part.log_sum.shape[1] == rows for part in parts):
        return torch.cat([part.log_sum for part in parts])
    blocks = [
        F.pad(part.log_sum, (0, 0, part.first, rows - part.first - part.log_sum.shape[1]), value=-torch.inf)
        for part in parts
    ]
    return torch.cat(blocks)


def _folded(query: Tensor, shape: AttentionShape) -> Tensor:
    """Return `[n, H, D]` queries as `[K, n * G, D]`: the heads of a group are rows beside each other."""
    n, K, G, D = len(query), shape.kv_heads, shape.group, shape.head_dim
    return query.view(n, K, G, D).transpose(0, 1).reshape(K, n * G, D)
