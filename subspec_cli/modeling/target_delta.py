"""A recurrent layer of the target: chunks of a prompt and trees go through the same operations, row after row.

Shapes: `N` rows, `C` features of the convolution, `H` value heads, `V` value features, `T` tokens that it sees.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subspec_cli.modeling.delta import DeltaLayer, Gates
from subspec_cli.modeling.delta_kernel import Visits, chain_visits, run_rule, tree_visits
from subspec_cli.modeling.recurrent_state import RecurrentState


class DeltaInputs(NamedTuple):
    """What some rows put into the layer."""

    qkv: Tensor
    """`[N, C]`, before the convolution."""
    gate: Tensor
    """`[N, H * V]`, of the output."""
    gates: Gates

    def of(self, rows: slice) -> DeltaInputs:
        """What some of the rows put in."""
        gates = Gates(self.gates.log_decay[rows], self.gates.beta[rows])
        return DeltaInputs(self.qkv[rows], self.gate[rows], gates)


class TreeLinks(NamedTuple):
    """How the rows of a tree follow each other; made once per pass."""

    visits: Visits
    seen: Tensor
    """`[N, T]` the inputs that each row's convolution sees, the committed ones first."""


def tree_links(path: Tensor, kernel: int, device: torch.device) -> TreeLinks:
    """Return the links of a tree, by the mask `[N, N]` bool of ancestors and self, on the host."""
    before = kernel - 1
    seen = []
    parents = []
    for node, marks in enumerate(path.tolist()):
        ancestors = [other for other, mark in enumerate(marks) if mark and other != node]
        # An ancestor's own ancestors are fewer than those of nodes below it.
        ancestors.sort(key=lambda other: int(path[other].sum()))
        parents.append(ancestors[-1] if ancestors else -1)
        line = [*range(before), *(before + other for other in ancestors), before + node]
        seen.append(line[-kernel:])
    return TreeLinks(tree_visits(parents), torch.tensor(seen, device=device))


def run_delta(
    delta: DeltaLayer,
    state: RecurrentState,
    layer: int,
    inputs: DeltaInputs,
    start: int,
    links: TreeLinks | None,
) -> Tensor:
    """Run rows from position `start` on: a tree with links, or the next chunk of a prompt; returns `[N, H * V]`.

    What commits the rows is kept in `state`.
    """
    base, tail = state.before(layer, start)
    known = torch.cat((tail, inputs.qkv))
    if links is None:
        state.begin_chunk(layer, start)
        visits, slots = chain_visits(len(inputs.qkv)), state.behind_chunk(layer)
        kernel = delta.shape.kernel
        seen = torch.arange(len(inputs.qkv))[:, None] + torch.arange(kernel)
        seen = seen.to(base.device)
    else:
        visits, seen = links
        slots = base.new_empty((visits.slots, *base.shape))
    rows = delta.rows(delta.mixed(known, seen), inputs.gates)
    output = torch.empty_like(rows.value)
    run_rule(rows, visits, base, slots, output)
    if links is None:
        state.end_chunk(layer, start + len(inputs.qkv), known[len(inputs.qkv) :])
    else:
        state.keep_tree(layer, inputs.qkv, inputs.gates)
    return delta.gated(output, inputs.gate)
