"""Verification: the target's own tokens lead through the drafted tree. The result is exact for any draft."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from subspec_cli.decoding.logprobs import TokenLogprobs, token_logprobs
from subspec_cli.decoding.penalties import PathState
from subspec_cli.decoding.sampler import Row, Sampler, sample_token
from subspec_cli.decoding.tree import TokenTree
from subspec_cli.errors import IntegrityError


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """Outcome of one target pass."""

    accepted_nodes: tuple[int, ...]
    """Nodes on the target's path, root first. Their rows are committed."""
    token_ids: tuple[int, ...]
    """New tokens, one for each accepted node; the bonus token is the last."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each new token, if they are wanted."""

    @property
    def accepted(self) -> int:
        """Drafted tokens that were accepted."""
        return len(self.accepted_nodes) - 1


def verify(
    tree: TokenTree,
    logits: Tensor,
    sampler: Sampler,
    root_position: int,
    state: PathState | None = None,
    logprobs: int | None = None,
) -> VerifyResult:
    """Follow the tokens that the target picks from the root until one is not in the tree.

    `logits` is `[N, V]` for the tree's `N` nodes; only rows on the path are copied to the host. `root_position` is
    the root's absolute position, and `state` what penalties know behind the root. With `logprobs`, each new token has
    its log-probability and those of so many likeliest ones. Raises IntegrityError if a row on the path is not finite.
    """
    children = tree.children()
    node, nodes, token_ids = 0, [0], list[int]()
    found: list[TokenLogprobs] = []
    while True:
        position = root_position + tree.depths[node]
        row = host_row(logits[node], position)
        token = sample_token(sampler, row, position + 1, state)
        token_ids.append(token)
        if logprobs is not None:
            found.append(token_logprobs(row, token, logprobs))
        state = None if state is None else state.after(token)
        if token not in children[node]:
            return VerifyResult(tuple(nodes), tuple(token_ids), tuple(found))
        node = children[node][token]
        nodes.append(node)


def host_row(logits: Tensor, position: int) -> Row:
    """Return one row of logits `[V]` as float64 on the host; raise IntegrityError if it holds NaN or infinity."""
    row: Row = logits.double().cpu().numpy()
    if not np.isfinite(row).all():
        raise IntegrityError(
            f"the model's logits at position {position} are not finite: weights or cache are damaged"
        )
    return row
