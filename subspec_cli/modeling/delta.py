"""The arithmetic of a gated delta network around its rule: convolution, decay, and the gated norm.

The order of casts is the library's. Softplus, sigmoid and SiLU are written out in float32: the library's own calls
feel the number of rows. Shapes: `N` rows, `R` rows of earlier tokens and of these, `C` features of queries, keys and
values together, `H` value heads, `V` value features, `T` tokens that the convolution sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec_cli.checkpoint.layer_description import DeltaShape
from subspec_cli.checkpoint.layer_tensors import (
    DELTA_A,
    DELTA_B,
    DELTA_CONV,
    DELTA_DECAY,
    DELTA_NORM,
    DELTA_STEP,
)
from subspec_cli.limits import GATE_ROWS
from subspec_cli.modeling.delta_kernel import DeltaRows
from subspec_cli.modeling.row_rules import RowRules, sigmoid, silu

_NORM_EPS = 1e-6
"""Added to the squared length of queries and keys."""
_LARGE = 20.0
"""Softplus of a larger number is the number."""


@dataclass(frozen=True, slots=True)
class Gates:
    """Decay and share of some rows, in float32."""

    log_decay: Tensor
    """`[N, H]`, at most 0."""
    beta: Tensor
    """`[N, H]`."""


@dataclass(frozen=True, slots=True)
class DeltaLayer:
    """One layer's small tensors and functions."""

    shape: DeltaShape
    small: Mapping[str, Tensor]
    """By the name inside the layer."""
    gate_weight: Tensor
    """`[rows, hidden]`: projections of step and share, and zeros up to a multiple of `GATE_ROWS`.

    Products of fewer features feel the row count in some of their results.
    """
    eps: float
    """Added to the variance in the norm of the output."""

    def gates(self, normed: Tensor, rules: RowRules | None) -> Gates:
        """Decay and share of `[P, hidden]` rows, by the target's row rules or, for the draft, without."""
        project = F.linear if rules is None else rules.linear
        heads = self.shape.value_heads
        both = project(normed, self.gate_weight, None)
        step, share = both[:, :heads], both[:, heads : 2 * heads]
        wide = step.float() + self.small[DELTA_STEP].float()
        soft = torch.where(wide > _LARGE, wide, wide.clamp_max(_LARGE).exp().log1p_())
        beta = sigmoid(share.float()).to(share.dtype)
        return Gates(-self.small[DELTA_DECAY].float().exp() * soft, beta.float())

    def mixed(self, inputs: Tensor, seen: Tensor) -> Tensor:
        """Convolve the projected rows: `[N, C]` from inputs `[R, C]`, of which row n sees those at `seen` `[N, T]`.

        The oldest comes first; the products are summed in this order.
        """
        weight = self.small[DELTA_CONV][:, 0].float()
        found = inputs[seen[:, 0]].float() * weight[:, 0]
        for place in range(1, self.shape.kernel):
            found += inputs[seen[:, place]].float() * weight[:, place]
        found = found.to(inputs.dtype).float()
        return silu(found).to(inputs.dtype)

    def rows(self, mixed: Tensor, gates: Gates) -> DeltaRows:
        """What the rule reads, from the convolved rows `[N, C]` and their gates."""
        shape, keys_width = self.shape, self.shape.key_heads * self.shape.key_dim
        query, key, value = mixed.float().split((keys_width, keys_width, shape.value_width), -1)
        query, key = (part.view(-1, shape.key_heads, shape.key_dim).contiguous() for part in (query, key))
        return DeltaRows(
            _unit(query) / shape.key_dim**0.5,
            _unit(key),
            value.view(-1, shape.value_heads, shape.value_dim).contiguous(),
            gates.log_decay.exp(),
            gates.beta,
        )

    def gated(self, output: Tensor, gate: Tensor) -> Tensor:
        """Normalize what the queries read `[N, H, V]`, and apply the gate `[N, H * V]`; returns `[N, H * V]`."""
        rounded = output.to(gate.dtype).float()
        normed = rounded * torch.rsqrt(rounded.pow(2).mean(-1, keepdim=True) + self.eps)
        weighted = self.small[DELTA_NORM] * normed.to(gate.dtype)
        opened = silu(gate.float()).view(output.shape)
        return (weighted.float() * opened).to(gate.dtype).flatten(1)


def delta_layer(shape: DeltaShape, small: Mapping[str, Tensor], eps: float) -> DeltaLayer:
    """Make a layer's functions from its small tensors."""
    both = torch.cat((small[DELTA_A], small[DELTA_B]))
    padded = F.pad(both, (0, 0, 0, -len(both) % GATE_ROWS))
    return DeltaLayer(shape, small, padded, eps)


def _unit(rows: Tensor) -> Tensor:
    return rows * torch.rsqrt((rows * rows).sum(-1, keepdim=True) + _NORM_EPS)
