"""Rows of the target that go through a layer together: a chunk of a prompt, or a tree. Made on the host.

Shapes: `N` rows, `P` rows with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec_cli.modeling.row_rules import RowRules


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Some rows of a pass, and the cache rows `[start, start + rows)` for their keys and values.

    The rows behind `rows` are padding. Token ids stay on the host: the embedding gathers by them.
    """

    token_ids: Tensor
    """`[P]`."""
    positions: Tensor
    """`[N]`."""
    start: int
    path: Tensor | None = None
    """`[N, N]` bool, which rows of a tree are a node's ancestors or the node itself; None for a chunk of a prompt.
    A chunk's rows are in the cache rows of their positions, and so are all rows before it."""

    @property
    def rows(self) -> int:
        """Number of rows without padding."""
        return len(self.positions)

    @property
    def padded(self) -> int:
        """Number of rows with padding."""
        return len(self.token_ids)

    def with_positions_on(self, device: torch.device) -> RowGroup:
        """Return the group with its positions on `device`."""
        if device.type == self.positions.device.type:
            return self
        return replace(self, positions=self.positions.to(device))


def chunk_group(token_ids: Sequence[int], start: int, rules: RowRules) -> RowGroup:
    """Make the group of prompt tokens at positions and cache rows `[start, start + N)`."""
    return RowGroup(padded_ids(token_ids, rules), torch.arange(start, start + len(token_ids)), start)


def padded_ids(token_ids: Sequence[int], rules: RowRules) -> Tensor:
    """Return ids `[P]`. Padding repeats the last token: its values are finite and nothing reads them."""
    ids = torch.tensor(token_ids)
    return F.pad(ids, (0, rules.padded(len(ids)) - len(ids)), value=int(ids[-1]))
