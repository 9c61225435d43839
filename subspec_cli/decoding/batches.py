"""Forward batches of prompts and trees, made on the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec_cli.decoding.tree import TokenTree
from subspec_cli.modeling.layers import RowRules, TokenBatch


def prompt_batch(token_ids: Sequence[int], start: int, rules: RowRules) -> TokenBatch:
    """Return causal rows for prompt tokens at positions and cache rows `[start, start + len)`."""
    n = len(token_ids)
    positions = torch.arange(start, start + n)
    key_positions = torch.arange(start + n)
    allowed = key_positions[None, :] <= positions[:, None]
    return _batch(token_ids, positions, start, allowed, key_positions, rules.padded(n))


def tree_batch(tree: TokenTree, committed: int, rules: RowRules) -> TokenBatch:
    """Return a tree in scratch rows from `committed` on; a node attends to the prefix, its ancestors and itself."""
    positions = torch.tensor(tree.depths) + committed
    allowed = _after_prefix(tree.ancestor_mask(), committed)
    key_positions = torch.cat((torch.arange(committed), positions))
    return _batch(tree.token_ids, positions, committed, allowed, key_positions, rules.padded(len(tree)))


def _after_prefix(mask: Tensor, committed: int) -> Tensor:
    return F.pad(mask, (committed, 0), value=True)


def _batch(
    token_ids: Sequence[int],
    positions: Tensor,
    start: int,
    allowed: Tensor,
    key_positions: Tensor,
    padded: int,
) -> TokenBatch:
    n = len(token_ids)
    # Padding repeats the last token: its values are finite and nothing reads them.
    ids = torch.tensor([*token_ids, *[token_ids[-1]] * (padded - n)])
    return TokenBatch(
        token_ids=ids,
        positions=F.pad(positions, (0, padded - n)),
        rows=n,
        start=start,
        allowed=allowed,
        key_positions=key_positions,
    )
