"""Forward batches from prompts, tree levels and whole trees. `C` = cache columns in view."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec_cli.decoding.tree import TokenTree, TreeBuilder
from subspec_cli.modeling.layers import RowRules, TokenBatch


def prompt_batch(token_ids: Sequence[int], start: int, rules: RowRules, device: torch.device) -> TokenBatch:
    """Causal rows for prompt tokens at positions and cache rows `[start, start + len)`."""
    n = len(token_ids)
    positions = torch.arange(start, start + n)
    key_positions = torch.arange(start + n)
    allowed = key_positions[None, :] <= positions[:, None]
    return _batch(token_ids, positions, start, allowed, key_positions, rules.padded(n), device)


def tree_batch(tree: TokenTree, committed: int, rules: RowRules, device: torch.device) -> TokenBatch:
    """All nodes of a tree in scratch rows from `committed` on: each sees the prefix, its ancestors, itself."""
    positions = torch.tensor(tree.depths) + committed
    allowed = _after_prefix(tree.ancestor_mask(), committed)
    key_positions = torch.cat((torch.arange(committed), positions))
    return _batch(
        tree.token_ids, positions, committed, allowed, key_positions, rules.padded(len(tree)), device
    )


def level_batch(
    builder: TreeBuilder, first: int, count: int, committed: int, device: torch.device
) -> TokenBatch:
    """Nodes `[first, first + count)` of a growing tree, for one unpadded draft step."""
    nodes = range(first, first + count)
    depths = torch.tensor([builder.depth(node) for node in range(first + count)])
    allowed = _after_prefix(builder.mask[first : first + count, : first + count], committed)
    key_positions = torch.cat((torch.arange(committed), depths + committed))
    token_ids = [builder.token(node) for node in nodes]
    return _batch(
        token_ids, depths[first:] + committed, committed + first, allowed, key_positions, count, device
    )


def _after_prefix(mask: Tensor, committed: int) -> Tensor:
    return F.pad(mask, (committed, 0), value=True)


def _batch(
    token_ids: Sequence[int],
    positions: Tensor,
    start: int,
    allowed: Tensor,
    key_positions: Tensor,
    padded: int,
    device: torch.device,
) -> TokenBatch:
    n = len(token_ids)
    # Padding repeats the last token: finite values that nothing reads.
    ids = torch.tensor([*token_ids, *[token_ids[-1]] * (padded - n)])
    return TokenBatch(
        token_ids=ids.to(device),
        positions=F.pad(positions, (0, padded - n)).to(device),
        rows=n,
        start=start,
        allowed=allowed.to(device),
        key_positions=key_positions.to(device),
    )
