"""The arithmetic of one decoder layer, in parts, which the target runs block by block.

`checkpoint.layer_description` says what a model computes; rounding follows the library's own order of casts. The
draft has its own form in `draft_layers`. Attention itself is elsewhere: exact for the target, fast for the draft.
Shapes: `N` rows, `P` rows with padding, `H` heads, `K` kv heads, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.layer_description import (
    Arithmetic,
    AttentionShape,
    DeltaShape,
    NormKind,
    NormPlace,
)
from subspec_cli.checkpoint.layer_tensors import (
    KEY_NORM,
    LAYER_FACTOR,
    QUERY_NORM,
    head_norm_names,
    norm_name,
)
from subspec_cli.modeling.delta import DeltaLayer, delta_layer
from subspec_cli.modeling.rope import RopeTables, Rotations, rotate
from subspec_cli.modeling.row_rules import sigmoid


class HeadRows(NamedTuple):
    """Rotated queries, keys and values of some rows."""

    query: Tensor
    """`[N, H, D]`."""
    keys: Tensor
    """`[K, N, D]`."""
    values: Tensor
    """`[K, N, D]`."""
    gate: Tensor | None = None
    """`[N, H, D]`, before the sigmoid."""

    def gated(self, attended: Tensor) -> Tensor:
        """Apply the gate to the attended rows `[N, H * D]`."""
        if self.gate is None:
            return attended
        return attended * sigmoid(self.gate.flatten(1).float()).to(attended.dtype)


def normalized(
    kind: NormKind, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalize over the last dimension, in float32, rounded as the library rounds it; `[..., width]`."""
    if kind == "fused_layer":
        return F.layer_norm(hidden, hidden.shape[-1:], weight, bias, eps)
    wide = hidden.float()
    if kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    variance = wide.pow(2).mean(-1, keepdim=True) + eps
    wide = wide * (variance.pow(-0.5) if kind == "powered" else torch.rsqrt(variance))
    if weight is None:
        return wide.to(hidden.dtype)
    match kind:
        case "rounded_then_scaled":
            return weight * wide.to(hidden.dtype)
        case "scaled_from_one":
            wide = wide * (1.0 + weight.float())
        case _:
            wide = wide * weight.float()
    return (wide if bias is None else wide + bias.float()).to(hidden.dtype)


@dataclass(frozen=True)
class LayerMath:
    """Layer functions bound to a model's description and its small tensors. The draft reads them from here."""

    geometry: ModelGeometry
    small: tuple[Mapping[str, Tensor], ...]
    """Norms, biases and factors of each layer, by the name inside the layer."""
    ropes: RopeTables

    def shape(self, layer: int) -> AttentionShape:
        """The attention of a layer that has it."""
        mixer = self.geometry.mixers[layer]
        assert isinstance(mixer, AttentionShape)
        return mixer

    def attention_input(self, layer: int, hidden: Tensor) -> Tensor:
        """Input of the attention block, `[P, hidden]`."""
        return self._normed(layer, "attention_input", hidden)

    def with_attention(self, layer: int, hidden: Tensor, output: Tensor) -> Tensor:
        """Hidden states after the output of attention is added, `[P, hidden]`."""
        return self._joined(hidden, self._normed(layer, "attention_output", output))

    def mlp_input(self, layer: int, hidden: Tensor) -> Tensor:
        """Input of the feed-forward, `[P, hidden]`, if it is not that of attention."""
        return self._normed(layer, "mlp_input", hidden)

    @cached_property
    def delta_layers(self) -> Mapping[int, DeltaLayer]:
        """Recurrent layers by their number."""
        return {
            layer: delta_layer(mixer, self.small[layer], self.geometry.arithmetic.eps)
            for layer, mixer in enumerate(self.geometry.mixers)
            if isinstance(mixer, DeltaShape)
        }

    @property
    def is_parallel(self) -> bool:
        """Whether the feed-forward has the input of attention."""
        return self.geometry.arithmetic.is_parallel

    def with_mlp(self, layer: int, hidden: Tensor, output: Tensor) -> Tensor:
        """Hidden states after the output of the feed-forward is added, `[P, hidden]`: those of the next layer."""
        hidden = self._joined(hidden, self._normed(layer, "mlp_output", output))
        factor = self.small[layer].get(LAYER_FACTOR)
        return hidden if factor is None else hidden * factor

    def heads(self, layer: int, projected: Tensor, rotations: Rotations) -> HeadRows:
        """Cut query, key and value rows `[N, (H + 2 K) * D]` into heads, normed and rotated as the model does."""
        shape, arithmetic = self.shape(layer), self.geometry.arithmetic
        gate = None
        if shape.is_gated:
            query, gate = projected[:, : shape.query_rows].view(len(projected), shape.heads, 2, -1).unbind(2)
            projected = torch.cat((query.flatten(1), projected[:, shape.query_rows :]), -1)
        if arithmetic.qk_norm == "projection":
            query, key, rest = projected.tensor_split(
                (shape.query_width, shape.query_width + shape.key_width), -1
            )
            query, key = self._weighted(layer, QUERY_NORM, query), self._weighted(layer, KEY_NORM, key)
            projected = torch.cat((query, key, rest), -1)
        states = projected.view(len(projected), -1, shape.head_dim)
        qk_heads = shape.heads + shape.kv_heads
        qk = states[:, :qk_heads]
        value = states[:, shape.heads : qk_heads] if shape.value_is_key else states[:, qk_heads:]
        if arithmetic.normalizes_values:
            value = normalized(arithmetic.norm, value, None, None, arithmetic.eps)
        if arithmetic.qk_norm in ("heads", "own_heads"):
            qk = self._normed_heads(layer, qk)
        rotation = None if shape.rope is None else rotations[shape.rope]
        if rotation is not None:
            qk = rotate(qk, rotation)
        if arithmetic.qk_norm == "rotated_heads":
            qk = self._normed_heads(layer, qk)
        query, key = qk[:, : shape.heads], qk[:, shape.heads :]
        if rotation is not None and rotation.query_factor is not None:
            query = query * rotation.query_factor
        return HeadRows(query, key.transpose(0, 1), value.transpose(0, 1), gate)

    def bias(self, layer: int, name: str) -> Tensor | None:
        """The bias of a projection such as `self_attn.q_proj`; None if the family has none."""
        return self.small[layer].get(f"{name}.bias")

    def _joined(self, hidden: Tensor, output: Tensor) -> Tensor:
        factor = self.geometry.arithmetic.residual_factor
        return hidden + (output if factor == 1.0 else output * factor)

    def _normed(self, layer: int, place: NormPlace, rows: Tensor) -> Tensor:
        """Normalize rows if the model has a norm at this place."""
        name = norm_name(place)
        return self._weighted(layer, name, rows) if name in self.small[layer] else rows

    def _normed_heads(self, layer: int, qk: Tensor) -> Tensor:
        """Normalize each head of queries and keys, `[N, H + K, D]`."""
        heads = self.shape(layer).heads
        if self.geometry.arithmetic.qk_norm == "own_heads":
            names = head_norm_names(QUERY_NORM, heads) + head_norm_names(KEY_NORM, qk.shape[1] - heads)
            states = zip(names, qk.unbind(1), strict=True)
            return torch.stack([self._weighted(layer, name, head) for name, head in states], dim=1)
        query = self._weighted(layer, QUERY_NORM, qk[:, :heads])
        return torch.cat((query, self._weighted(layer, KEY_NORM, qk[:, heads:])), dim=1)

    def _weighted(self, layer: int, name: str, rows: Tensor) -> Tensor:
        small, arithmetic = self.small[layer], self.geometry.arithmetic
        bias = small.get(name.removesuffix("weight") + "bias")
        return normalized(arithmetic.norm, rows, small[name], bias, arithmetic.eps)


@dataclass(frozen=True, slots=True)
class OutputMath:
    """What a model does with the last hidden states and with the logits of its head."""

    arithmetic: Arithmetic
    norm_weight: Tensor
    norm_bias: Tensor | None = None

    def normed(self, hidden: Tensor) -> Tensor:
        """Input of the head, `[P, hidden]`."""
        arithmetic = self.arithmetic
        return normalized(arithmetic.norm, hidden, self.norm_weight, self.norm_bias, arithmetic.eps)

    def finished(self, logits: Tensor) -> Tensor:
        """Logits of the model from what the head's matrix gives, `[P, V]`; overwrites them."""
        arithmetic = self.arithmetic
        if arithmetic.logits_factor != 1.0:
            logits.mul_(arithmetic.logits_factor)
        if arithmetic.logits_divisor != 1.0:
            logits.div_(arithmetic.logits_divisor)
        if arithmetic.logits_cap is not None:
            logits.div_(arithmetic.logits_cap).tanh_().mul_(arithmetic.logits_cap)
        return logits
