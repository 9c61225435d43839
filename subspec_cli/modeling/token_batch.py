"""The input of one draft step: token ids, positions, cache rows and the attention mask, made on the host.

Shapes: `N` rows, `C` cache rows in view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The rows of one draft step, and the cache rows for their keys and values.

    A batch is made on the host. Token ids stay there: the embedding gathers by them.
    """

    token_ids: Tensor
    """`[N]`."""
    positions: Tensor
    """`[N]`."""
    start: int | Tensor
    """The first cache row to write. In a captured draft step, all `[N]` of them as a tensor on the GPU."""
    allowed: Tensor
    """`[N, C]` bool: which of the first C cache rows each row attends to."""
    key_positions: Tensor
    """`[C]` position of each cache row, for sliding windows."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.positions)

    def to(self, device: torch.device) -> TokenBatch:
        """Return the batch on `device`, except its token ids."""
        if device.type == self.positions.device.type:
            return self
        return replace(
            self,
            positions=self.positions.to(device),
            allowed=self.allowed.to(device),
            key_positions=self.key_positions.to(device),
        )

    def allowed_in(self, window: int | None) -> Tensor:
        """Return the mask `[N, C]` bool in layers with this sliding window."""
        if window is None:
            return self.allowed
        return self.allowed & (self.positions[:, None] - self.key_positions[None, :] < window)


def causal_batch(token_ids: Sequence[int], start: int) -> TokenBatch:
    """Make a batch of tokens at positions and cache rows `[start, start + N)`; each attends up to its own row."""
    positions = torch.arange(start, start + len(token_ids))
    key_positions = torch.arange(start + len(token_ids))
    allowed = key_positions[None, :] <= positions[:, None]
    return TokenBatch(torch.tensor(token_ids), positions, start, allowed, key_positions)
