"""The gated delta rule over some rows: always the same float32 operations in the same order for every row.

A row's state is made from its parent's: decayed, read by the key, corrected by the difference from the value, and
read by the query. Sums over the key's features are taken in order, each product rounded and each addition rounded, so
that the compiled loop and the loop of torch operations give the same bits, and so do a prompt's chain, a draft tree
and a replay. Shapes: `N` rows, `H` value heads, `G` key heads, `K` key features, `V` value features, `S` slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subspec_cli.compiled import compiled

BASE: Final = -1
"""Source of rows whose parent is the committed state."""
NOWHERE: Final = -1
"""Target of rows without children: their state is not kept."""


class DeltaRows(NamedTuple):
    """What the rule reads of each row, in float32."""

    query: Tensor
    """`[N, G, K]`, normalized and scaled."""
    key: Tensor
    """`[N, G, K]`, normalized."""
    value: Tensor
    """`[N, H, V]`."""
    decay: Tensor
    """`[N, H]`, the factor of the state."""
    beta: Tensor
    """`[N, H]`, the share of the difference that is written."""


@dataclass(frozen=True, slots=True)
class Visits:
    """The order in which rows are computed, and where states are kept meanwhile."""

    order: NDArray[np.int64]
    """`[N]`, parents before children."""
    source: NDArray[np.int64]
    """`[N]` slot of the parent's state, by row; `BASE` for the committed state."""
    target: NDArray[np.int64]
    """`[N]` slot of the row's own state, by row; `NOWHERE` if no row needs it."""
    slots: int
    """Number of slots."""


def chain_visits(rows: int) -> Visits:
    """Visit rows of which each is the child of the one before; the last state stays in slot 0."""
    source = np.zeros(rows, dtype=np.int64)
    source[:1] = BASE
    return Visits(np.arange(rows), source, np.zeros(rows, dtype=np.int64), 1)


def tree_visits(parents: Sequence[int]) -> Visits:
    """Visit the nodes of a tree, depth first, in about log2(N) slots; `parents` is -1 for a root.

    Of a node's children the one that needs the most slots comes last, so that it takes its parent's slot.
    """
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(node)
    needs = [0] * len(parents)
    """Slots that a node's subtree needs, its own state included."""
    for node in reversed(range(len(parents))):
        below = sorted((needs[child] for child in children[node]), reverse=True)
        needs[node] = max([below[0], *(1 + need for need in below[1:2]), 1]) if below else 0
        children[node].sort(key=needs.__getitem__)
    order, most = [], 0
    source, target = np.full(len(parents), BASE), np.full(len(parents), NOWHERE)
    waiting = [(node, BASE, 0) for node, parent in reversed(list(enumerate(parents))) if parent < 0]
    while waiting:
        node, slot, free = waiting.pop()
        order.append(node)
        source[node] = slot
        if not children[node]:
            continue
        # A node that is the last to read its parent's state replaces it; others take the next free slot.
        own = target[node] = free
        most = max(most, own + 1)
        *others, last = children[node]
        waiting.append((last, own, own))
        waiting.extend((child, own, own + 1) for child in reversed(others))
    return Visits(np.array(order), source, target, max(1, most))


def run_rule(rows: DeltaRows, visits: Visits, base: Tensor, slots: Tensor, output: Tensor | None) -> None:
    """Apply the rule to rows.

    Args:
        rows: the rows.
        visits: their order and the slots of their states.
        base: `[H, K, V]` the committed state, which stays as it is.
        slots: `[S, H, K, V]` work space; afterwards, slots that no later row replaced hold states.
        output: `[N, H, V]` receives what the queries read; None if nothing is read.
    """
    kernel = _compiled_rule() if base.device.type == "cpu" else None
    if kernel is None:
        _torch_rule(rows, visits, base, slots, output)
        return
    out = np.empty((0, 1, 1), dtype=np.float32) if output is None else output.numpy()
    arrays = tuple(part.contiguous().numpy() for part in rows)
    kernel(arrays, (visits.order, visits.source, visits.target), base.numpy(), slots.numpy(), out)


def _torch_rule(rows: DeltaRows, visits: Visits, base: Tensor, slots: Tensor, output: Tensor | None) -> None:
    """The rule in torch operations; sums over the key's features are loops, as in the compiled rule."""
    share = rows.value.shape[1] // rows.key.shape[1]
    for node in visits.order.tolist():
        source, target = int(visits.source[node]), int(visits.target[node])
        state = (base if source == BASE else slots[source]) * rows.decay[node][:, None, None]
        key, query = (part[node].repeat_interleave(share, 0) for part in (rows.key, rows.query))
        read = torch.zeros_like(rows.value[node])
        for feature in range(key.shape[1]):
            read += state[:, feature] * key[:, feature, None]
        delta = (rows.value[node] - read) * rows.beta[node][:, None]
        state += key[:, :, None] * delta[:, None]
        if target != NOWHERE:
            slots[target] = state
        if output is not None:
            found = torch.zeros_like(read)
            for feature in range(query.shape[1]):
                found += state[:, feature] * query[:, feature, None]
            output[node] = found


def compile_rule() -> bool:
    """Compile the rule, which takes two seconds the first time on a machine; return whether numba is installed."""
    kernel = _compiled_rule()
    if kernel is None:
        return False
    one = torch.zeros((1, 1, 1))
    run_rule(DeltaRows(one, one, one, one[0], one[0]), chain_visits(1), one, one[None], one.clone())
    return True


@cache
def _compiled_rule() -> Callable[..., None] | None:
    return compiled(_rule)


def _rule(  # noqa: C901 - one loop nest, which numba compiles as a whole
    rows: tuple[Any, ...],
    visits: tuple[Any, ...],
    base: Any,  # noqa: ANN401 - numba compiles it for arrays
    slots: Any,  # noqa: ANN401
    output: Any,  # noqa: ANN401
) -> None:
    query, key, value, decay, beta = rows
    order, source, target = visits
    heads, features, width = base.shape
    share = heads // key.shape[1]
    read = np.empty(width, dtype=np.float32)
    unread = len(output) == 0
    unkept = np.empty((features, width), dtype=np.float32)
    for visit in range(len(order)):
        node = order[visit]
        for head in range(heads):
            before = base[head] if source[node] < 0 else slots[source[node], head]
            after = unkept if target[node] < 0 else slots[target[node], head]
            k, factor = key[node, head // share], decay[node, head]
            read[:] = np.float32(0.0)
            for i in range(features):
                for j in range(width):
                    decayed = before[i, j] * factor
                    after[i, j] = decayed
                    read[j] += decayed * k[i]
            for j in range(width):
                read[j] = (value[node, head, j] - read[j]) * beta[node, head]
            for i in range(features):
                for j in range(width):
                    after[i, j] += k[i] * read[j]
            if unread:
                continue
            q, found = query[node, head // share], output[node, head]
            found[:] = np.float32(0.0)
            for i in range(features):
                for j in range(width):
                    found[j] += after[i, j] * q[i]
