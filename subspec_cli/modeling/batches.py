"""Forward batches, made on the host. `N` rows, `P` rows with padding, `C` cache rows in view."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec_cli.modeling.layers import TokenBatch


def causal_batch(token_ids: Sequence[int], start: int, padded: int) -> TokenBatch:
    """Make a batch of tokens at positions and cache rows `[start, start + N)`; each attends up to its own row."""
    positions = torch.arange(start, start + len(token_ids))
    key_positions = torch.arange(start + len(token_ids))
    allowed = key_positions[None, :] <= positions[:, None]
    return batch_of(token_ids, positions, start, allowed, key_positions, padded)


def batch_of(
    token_ids: Sequence[int],
    positions: Tensor,
    start: int,
    allowed: Tensor,
    key_positions: Tensor,
    padded: int,
) -> TokenBatch:
    """Make a batch of `N` tokens at `positions` `[N]`, padded to `padded` rows; see `TokenBatch` for the rest."""
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
