"""Token trees as flat arrays: node 0 is the root, the newest emitted token; parents come before children.

`N` nodes. Nodes whose children the draft has looked for come first, in the order of their draft steps, so that a
node's number is the scratch row its keys and values lie in, for the draft as for the target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenTree:
    """A drafted tree. Node i > 0 hangs on `parents[i] < i`; the root's parent is -1."""

    token_ids: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    log_probs: tuple[float, ...]
    """Cumulative log-probability of the path to each node, by the draft's own sharpened guess."""

    def __post_init__(self) -> None:
        assert self.parents[0] == -1
        assert all(0 <= parent < node for node, parent in enumerate(self.parents[1:], start=1))

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def depth(self) -> int:
        """Depth of the deepest node."""
        return max(self.depths)

    def children(self) -> list[dict[int, int]]:
        """For each node, its children by token id."""
        found: list[dict[int, int]] = [{} for _ in self.token_ids]
        for node, parent in enumerate(self.parents[1:], start=1):
            found[parent][self.token_ids[node]] = node
        return found

    def ancestor_mask(self) -> Tensor:
        """`[N, N]` bool: row attends to column, ancestors and self."""
        mask = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], start=1):
            mask[node] |= mask[parent]
        return mask
