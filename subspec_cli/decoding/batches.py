"""Forward batches of prompts and trees, made on the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec_cli.decoding.tree import TokenTree
from subspec_cli.modeling.row_rules import RowRules
from subspec_cli.modeling.token_batch import TokenBatch, batch_of, causal_batch


def prompt_batch(token_ids: Sequence[int], start: int, rules: RowRules) -> TokenBatch:
    """Return causal rows for prompt tokens at positions and cache rows `[start, start + len)`."""
    return causal_batch(token_ids, start, rules.padded(len(token_ids)))


def tree_batch(tree: TokenTree, committed: int, rules: RowRules) -> TokenBatch:
    """Return a tree in scratch rows from `committed` on; a node attends to the prefix, its ancestors and itself."""
    positions = torch.tensor(tree.depths) + committed
    allowed = _after_prefix(tree.ancestor_mask(), committed)
    key_positions = torch.cat((torch.arange(committed), positions))
    return batch_of(tree.token_ids, positions, committed, allowed, key_positions, rules.padded(len(tree)))


def _after_prefix(mask: Tensor, committed: int) -> Tensor:
    return F.pad(mask, (committed, 0), value=True)
