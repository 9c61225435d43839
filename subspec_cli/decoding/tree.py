"""Token trees as flat arrays, level-major: node 0 is the root, the newest emitted token.

`N` nodes. Within a level, nodes whose children the draft will look for come first, so that the rows of each
draft step are neighbours in the cache.
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

    def children(self) -> list[dict[int, int]]:
        """For each node, its children by token id."""
        found: list[dict[int, int]] = [{} for _ in self.token_ids]
        for node, parent in enumerate(self.parents[1:], start=1):
            found[parent][self.token_ids[node]] = node
        return found

    def path(self, node: int) -> list[int]:
        """Nodes from the root to `node`, both included."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def ancestor_mask(self) -> Tensor:
        """`[N, N]` bool: row attends to column, ancestors and self."""
        mask = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], start=1):
            mask[node] |= mask[parent]
        return mask


class TreeBuilder:
    """A tree under construction: append children level by level, then `finish`."""

    def __init__(self, root_token: int, capacity: int) -> None:
        self._token_ids = [root_token]
        self._parents = [-1]
        self._depths = [0]
        self._log_probs = [0.0]
        self.mask = torch.zeros((capacity, capacity), dtype=torch.bool)
        """`[capacity, capacity]` ancestor mask; rows of nodes already added are valid."""
        self.mask[0, 0] = True

    def __len__(self) -> int:
        return len(self._token_ids)

    def token(self, node: int) -> int:
        """Token id of a node."""
        return self._token_ids[node]

    def depth(self, node: int) -> int:
        """Distance from the root."""
        return self._depths[node]

    def log_prob(self, node: int) -> float:
        """Cumulative log-probability."""
        return self._log_probs[node]

    def add(self, parent: int, token_id: int, log_prob: float) -> int:
        """Append a child with its cumulative log-probability; returns its node number."""
        node = len(self)
        self._token_ids.append(token_id)
        self._parents.append(parent)
        self._depths.append(self._depths[parent] + 1)
        self._log_probs.append(log_prob)
        self.mask[node] = self.mask[parent]
        self.mask[node, node] = True
        return node

    def finish(self) -> TokenTree:
        """The tree as it stands."""
        return TokenTree(
            tuple(self._token_ids), tuple(self._parents), tuple(self._depths), tuple(self._log_probs)
        )
