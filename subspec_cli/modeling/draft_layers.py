"""The arithmetic of the draft's layers: that of `layers`, with its own roundings.

A step of a few rows takes as long as the number of its operations, whatever their size. So the library's fused norms
serve here, products and sums are in place, and what all layers read is made once a step. Only guesses feel how the
draft rounds. Shapes: `N` rows, `H` heads, `K` kv heads, `D` head dim, `C` cache rows in view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec_cli.checkpoint.layer_description import Arithmetic, AttentionShape, NormKind
from subspec_cli.checkpoint.layer_tensors import (
    KEY_NORM,
    LAYER_FACTOR,
    QUERY_NORM,
    head_norm_names,
    norm_name,
)
from subspec_cli.modeling.draft_rows import DraftRows, places_of
from subspec_cli.modeling.fast_attention import FastAttention
from subspec_cli.modeling.kv_cache import StepRows
from subspec_cli.modeling.layers import LayerMath
from subspec_cli.modeling.rope import Rotation

RowMap = Callable[[Tensor], Tensor]


class Turn(NamedTuple):
    """How the rows of a step are turned, in the type of the states."""

    cos: Tensor
    """`[N, 1, turned]`."""
    signed_sin: Tensor
    """`[N, 1, turned]`, negative for the first of each pair."""
    is_interleaved: bool
    query_factor: Tensor | None

    def apply_(self, states: Tensor) -> None:
        """Turn `[N, H, D]` states in place."""
        turned = self.cos.shape[-1]
        part = states if turned == states.shape[-1] else states.narrow(-1, 0, turned)
        if self.is_interleaved:
            swapped = part.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            swapped = part.roll(turned // 2, -1)
        part.mul_(self.cos).addcmul_(swapped, self.signed_sin)


def turn_of(rotation: Rotation, dtype: torch.dtype) -> Turn:
    """Return how rows are turned in place: the sign of each half is in the table."""
    sin = rotation.sin
    if rotation.is_interleaved:
        signed = torch.stack((-sin[..., ::2], sin[..., 1::2]), dim=-1).flatten(-2)
    else:
        first, second = sin.chunk(2, dim=-1)
        signed = torch.cat((-first, second), dim=-1)
    return Turn(rotation.cos.to(dtype), signed.to(dtype), rotation.is_interleaved, rotation.query_factor)


class _SequenceView(NamedTuple):
    """What all layers read for one sequence's rows of a step: its masks, and its rows of the cache."""

    place: slice
    attention: FastAttention
    rows: Mapping[int, StepRows]


class StepView:
    """What all layers of a step read: its rotations, and the views of its sequences."""

    def __init__(self, math: LayerMath, rows: Sequence[DraftRows], like: Tensor) -> None:
        """`like` has the type and the device of the hidden states."""
        positions, prompt_tokens = rows[0].batch.positions, rows[0].kv.prompt_tokens
        if len(rows) > 1:
            positions = torch.cat([part.batch.positions for part in rows])
            prompt_tokens = torch.cat([part.kv.prompt_tokens.expand(part.batch.rows) for part in rows])
        self.turns = [turn_of(rotation, like.dtype) for rotation in math.ropes.rows(positions, prompt_tokens)]
        self._views = [
            _SequenceView(
                place,
                FastAttention(math.geometry, batch, like),
                part.kv.step_rows(batch.start, batch.rows, batch.allowed.shape[1]),
            )
            for place, part, batch in zip(places_of(rows), rows, (part.batch for part in rows), strict=True)
        ]

    def attend(self, layer: int, query: Tensor, key_values: Tensor, shape: AttentionShape) -> Tensor:
        """Write `[2, K, N, D]` keys and values, and attend with `[N, H, D]` queries; returns `[N, H * D]`."""
        if len(self._views) == 1:
            return _attended(self._views[0], layer, query, key_values, shape)
        return torch.cat(
            [
                _attended(view, layer, query[view.place], key_values[:, :, view.place], shape)
                for view in self._views
            ]
        )


def _attended(
    view: _SequenceView, layer: int, query: Tensor, key_values: Tensor, shape: AttentionShape
) -> Tensor:
    rows = view.rows[layer]
    rows.write(key_values)
    return view.attention.attend(query, rows.keys, rows.values, shape)


@dataclass(frozen=True, slots=True)
class DraftHeads:
    """One layer's queries, keys and values from the rows that its projections give."""

    shape: AttentionShape
    normalize: Callable[[Tensor], None] | None
    """Normalizes `[N, H + K, D]` queries and keys in place."""
    normalizes_rotated: bool
    normalize_projection: Callable[[Tensor], None] | None
    """Normalizes queries and keys of the projected rows in place."""
    normalize_values: RowMap | None

    def attend(self, layer: int, projected: Tensor, step: StepView) -> Tensor:
        """Attend with projected rows `[N, (H + 2 K) * D]`, which are overwritten; returns `[N, H * D]`."""
        shape, count = self.shape, len(projected)
        states, gate = self._states(projected)
        query, key_values = states.split((shape.heads, 2 * shape.kv_heads), dim=1)
        qk = states.narrow(1, 0, shape.heads + shape.kv_heads)
        if self.normalize_values is not None:
            value = key_values.narrow(1, shape.kv_heads, shape.kv_heads)
            value.copy_(self.normalize_values(value))
        if self.normalize is not None and not self.normalizes_rotated:
            self.normalize(qk)
        if shape.rope is not None:
            turn = step.turns[shape.rope]
            turn.apply_(qk)
        if self.normalize is not None and self.normalizes_rotated:
            self.normalize(qk)
        if shape.rope is not None and turn.query_factor is not None:
            query.mul_(turn.query_factor)
        key_values = key_values.view(count, 2, shape.kv_heads, shape.head_dim).permute(1, 2, 0, 3)
        attended = step.attend(layer, query, key_values, shape)
        return attended if gate is None else attended.mul_(gate.sigmoid().flatten(1))

    def _states(self, projected: Tensor) -> tuple[Tensor, Tensor | None]:
        """Cut projected rows into heads `[N, H + 2 K, D]` and gates `[N, H, D]`."""
        shape, gate = self.shape, None
        if shape.is_gated:
            query, rest = projected.tensor_split((shape.query_rows,), -1)
            query, gate = query.view(len(projected), shape.heads, 2, -1).unbind(2)
            projected = torch.cat((query.flatten(1), rest), -1)
        if shape.value_is_key:
            projected = torch.cat((projected, projected.narrow(1, shape.query_width, shape.key_width)), -1)
        if self.normalize_projection is not None:
            self.normalize_projection(projected)
        return projected.view(len(projected), -1, shape.head_dim), gate


@dataclass(frozen=True, slots=True)
class DraftLayerMath:
    """What one layer does around its projections, bound to its small tensors."""

    attention_input: RowMap | None
    attention_output: RowMap | None
    mlp_input: RowMap | None
    mlp_output: RowMap | None
    """Norms; None where the model has none."""
    heads: DraftHeads | None
    """None in a recurrent layer."""
    residual_factor: float
    factor: Tensor | None
    """Of the layer's output."""

    def with_attention_(self, hidden: Tensor, output: Tensor) -> Tensor:
        """Add the output of attention to the hidden states, in place."""
        return hidden.add_(normed(self.attention_output, output), alpha=self.residual_factor)

    def with_mlp_(self, hidden: Tensor, output: Tensor) -> Tensor:
        """Add the output of the feed-forward to the hidden states, in place: those of the next layer."""
        hidden.add_(normed(self.mlp_output, output), alpha=self.residual_factor)
        return hidden if self.factor is None else hidden.mul_(self.factor)


def draft_layer_math(math: LayerMath, layer: int) -> DraftLayerMath:
    """Bind a layer's arithmetic to its small tensors, once at load."""
    small, arithmetic = math.small[layer], math.geometry.arithmetic
    places = {
        place: _named_norm(arithmetic, small, norm_name(place))
        for place in ("attention_input", "attention_output", "mlp_input", "mlp_output")
    }
    mixer = math.geometry.mixers[layer]
    heads = _draft_heads(arithmetic, mixer, small) if isinstance(mixer, AttentionShape) else None
    return DraftLayerMath(
        **places,
        heads=heads,
        residual_factor=arithmetic.residual_factor,
        factor=small.get(LAYER_FACTOR),
    )


def normed(norm: RowMap | None, rows: Tensor) -> Tensor:
    """Normalize rows if there is a norm."""
    return rows if norm is None else norm(rows)


def draft_norm(kind: NormKind, weight: Tensor, bias: Tensor | None, eps: float) -> RowMap:
    """Return a norm over the last dimension of `[..., width]` rows; the weight is `[width]` or `[H, width]`."""
    if kind == "scaled_from_one":
        weight = (1.0 + weight.float()).to(weight.dtype)
    width, is_layer = weight.shape[-1:], kind in ("layer", "fused_layer")
    if not is_layer and weight.is_cpu and weight.dtype is not torch.float16:
        return _added(_by_length(weight, eps), bias)
    fused = F.layer_norm if is_layer else F.rms_norm
    if weight.dim() > 1:  # no fused norm has a weight for each head
        return _added(lambda rows: fused(rows, width, eps=eps).mul_(weight), bias)
    if is_layer:
        return lambda rows: F.layer_norm(rows, width, weight, bias, eps)
    return _added(lambda rows: F.rms_norm(rows, width, weight, eps), bias)


def _by_length(weight: Tensor, eps: float) -> RowMap:
    """Return a norm that divides rows by their length; the root of the width is a factor of the weight.

    The library's own is eight operations on a CPU. In float16 lengths would overflow.
    """
    width = weight.shape[-1]
    factor = (weight.float() * width**0.5).to(weight.dtype)
    least = torch.tensor((width * eps) ** 0.5, dtype=weight.dtype)

    def norm(rows: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(rows, 2, -1, True).hypot_(least)
        return torch.div(rows, length).mul_(factor)

    return norm


def _added(norm: RowMap, bias: Tensor | None) -> RowMap:
    return norm if bias is None else lambda rows: norm(rows).add_(bias)


def _named_norm(arithmetic: Arithmetic, small: Mapping[str, Tensor], name: str) -> RowMap | None:
    if name not in small:
        return None
    return draft_norm(arithmetic.norm, small[name], small.get(_bias_name(name)), arithmetic.eps)


def _bias_name(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def _draft_heads(arithmetic: Arithmetic, shape: AttentionShape, small: Mapping[str, Tensor]) -> DraftHeads:
    whole = each = None
    if arithmetic.qk_norm == "projection":
        query_norm, key_norm = (_named_norm(arithmetic, small, name) for name in (QUERY_NORM, KEY_NORM))
        whole = _projection_norm(query_norm, key_norm, shape)
    elif arithmetic.qk_norm is not None:
        each = _heads_norm(arithmetic, shape, small)
    bare = None
    if arithmetic.normalizes_values:
        ones = small[norm_name("attention_input")].new_ones(shape.head_dim)
        kind: NormKind = "scaled" if arithmetic.norm == "scaled_from_one" else arithmetic.norm
        bare = draft_norm(kind, ones, None, arithmetic.eps)
    return DraftHeads(shape, each, arithmetic.qk_norm == "rotated_heads", whole, bare)


def _heads_norm(
    arithmetic: Arithmetic, shape: AttentionShape, small: Mapping[str, Tensor]
) -> Callable[[Tensor], None]:
    """Return a norm of queries and keys in one: their weights are those of each head, one below the other."""
    if arithmetic.qk_norm == "own_heads":
        names = head_norm_names(QUERY_NORM, shape.heads) + head_norm_names(KEY_NORM, shape.kv_heads)
    else:
        names = (QUERY_NORM,) * shape.heads + (KEY_NORM,) * shape.kv_heads
    weight = torch.stack([small[name] for name in names])
    biases = [small[_bias_name(name)] for name in names if _bias_name(name) in small]
    bias = torch.stack(biases) if biases else None
    norm = draft_norm(arithmetic.norm, weight, bias, arithmetic.eps)

    def normalize(qk: Tensor) -> None:
        qk.copy_(norm(qk))

    return normalize


def _projection_norm(
    query_norm: RowMap | None, key_norm: RowMap | None, shape: AttentionShape
) -> Callable[[Tensor], None]:
    def normalize(projected: Tensor) -> None:
        query = projected.narrow(1, 0, shape.query_width)
        key = projected.narrow(1, shape.query_width, shape.key_width)
        query.copy_(normed(query_norm, query))
        key.copy_(normed(key_norm, key))

    return normalize
