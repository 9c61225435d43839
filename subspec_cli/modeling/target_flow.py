"""What a pass of the target carries from block to block: batches of rows, and whose rows they are.

Shapes: `N` rows, `P` rows with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from subspec_cli.modeling.exact_attention import ChainRows, TreeRows
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.rope import Rotations
from subspec_cli.modeling.row_group import RowGroup
from subspec_cli.modeling.target_delta import TreeLinks


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """Rows of one sequence, and the cache that holds what is before them."""

    group: RowGroup
    kv: KVCache


@dataclass(frozen=True, slots=True)
class SequencePart:
    """One sequence's rows among those that go through a layer together."""

    place: slice
    """Where they are among the rows."""
    start: int
    """Cache row of the first one."""
    kv: KVCache
    attended: ChainRows | TreeRows
    links: TreeLinks | None
    """How a tree's rows follow each other, for recurrent layers; None for a chunk of a prompt."""


@dataclass(slots=True)
class BatchFlow:
    """What rows that go through a layer together carry from block to block: a chunk of a prompt, or some trees."""

    parts: tuple[SequencePart, ...]
    rows: int
    """Number of rows; those behind them in `hidden` are padding."""
    hidden: Tensor
    """`[P, hidden]`."""
    rotations: Rotations
    normed: Tensor = field(init=False)
    """Input of the feed-forward, from the gate block, or from attention in a parallel layer, to the up block."""
    inner: Tensor = field(init=False)
    """Gate, then gated activations, from the gate block to the down block."""


@dataclass(frozen=True, slots=True)
class Flow:
    """A pass over some batches of rows. Rows see the keys of their sequence in all batches before theirs."""

    batches: tuple[BatchFlow, ...]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return rows one below the other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
