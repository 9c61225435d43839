"""The input of one forward: token ids, positions, cache rows and the attention mask, made on the host.

Shapes: `N` rows, `P` rows with padding, `C` cache rows in view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The rows of one forward, and the cache rows for their keys and values.

    `token_ids` and `positions` are `[P]` with `P >= rows`; the rows behind `rows` are padding. A batch is made on
    the host. Token ids stay there: the embedding gathers by them.
    """

    token_ids: Tensor
    positions: Tensor
    rows: int
    start: int | Tensor
    """The first cache row to write. In a captured draft step, all `[rows]` of them as a tensor on the GPU."""
    allowed: Tensor
    """`[rows, C]` bool: which of the first C cache rows each row attends to."""
    key_positions: Tensor
    """`[C]` position of each cache row, for sliding windows."""

    def to(self, device: torch.device) -> TokenBatch:
        """The batch on `device`, except its token ids."""
        if device.type == self.positions.device.type:
            return self
        return replace(
            self,
            positions=self.positions.to(device),
            allowed=self.allowed.to(device),
            key_positions=self.key_positions.to(device),
        )


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
