"""Rows of one sequence in a pass of the target: a chunk of a prompt, or a tree. Made on the host.

Shapes: `N` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Some rows of a sequence, and the rows `[start, start + rows)` of its cache for their keys and values.

    Token ids stay on the host: the embedding gathers by them.
    """

    token_ids: Tensor
    """`[N]`."""
    positions: Tensor
    """`[N]`."""
    start: int
    path: Tensor | None = None
    """`[N, N]` bool, which rows of a tree are a node's ancestors or the node itself; None for a chunk of a prompt.
    A chunk's rows are in the cache rows of their positions, and so are all rows before it."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.positions)


def chunk_group(token_ids: Sequence[int], start: int) -> RowGroup:
    """Make the group of prompt tokens at positions and cache rows `[start, start + N)`."""
    return RowGroup(torch.tensor(token_ids), torch.arange(start, start + len(token_ids)), start)
