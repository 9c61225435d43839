"""Token trees as flat arrays of `N` nodes: node 0 is the root, the newest emitted token; parents precede children.

Nodes that the draft has expanded come first, in the order of their draft steps. So a node's index is the scratch row
of its keys and values, for the draft and for the target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenTree:
    """A drafted tree. Node i > 0 is a child of node `parents[i] < i`; the root's parent is -1."""

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
        """Return each node's children by token id."""
        found: list[dict[int, int]] = [{} for _ in self.token_ids]
        for node, parent in enumerate(self.parents[1:], start=1):
            found[parent][self.token_ids[node]] = node
        return found

    def ancestor_mask(self) -> Tensor:
        """Return `[N, N]` bool: each row attends to its ancestors and itself."""
        mask = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], start=1):
            mask[node] |= mask[parent]
        return mask
