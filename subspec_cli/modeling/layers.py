"""The arithmetic of one decoder layer, in parts: the target runs them block by block, the draft a layer at a time.

All supported families use this layer; rounding follows transformers' own order of casts. Attention itself is
elsewhere: exact for the target, fast for the draft. Shapes: `N` rows, `P` rows with padding, `H` heads, `K` kv heads,
`D` head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.modeling.rope import RopeTable, Rotation


class HeadRows(NamedTuple):
    """Rotated queries, keys and values of some rows."""

    query: Tensor
    """`[N, H, D]`."""
    keys: Tensor
    """`[K, N, D]`."""
    values: Tensor
    """`[K, N, D]`."""


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32, rounded as transformers rounds it."""
    wide = hidden.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(hidden.dtype)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to `[N, H, D]` states with `[N, 1, D]` tables."""
    half = states.shape[-1] // 2
    rotated = torch.cat((-states[..., half:], states[..., :half]), dim=-1)
    return states * cos + rotated * sin


@dataclass(frozen=True, slots=True)
class LayerMath:
    """Layer functions bound to a model's sizes and its small tensors. Target and draft share one."""

    geometry: ModelGeometry
    small: tuple[Mapping[str, Tensor], ...]
    """Norms and biases of each layer, by the name inside the layer."""
    rope: RopeTable

    def attention_input(self, layer: int, hidden: Tensor) -> Tensor:
        """Normed input of the attention block, `[P, hidden]`."""
        return rms_norm(hidden, self.small[layer]["input_layernorm.weight"], self.geometry.rms_norm_eps)

    def mlp_input(self, layer: int, hidden: Tensor) -> Tensor:
        """Normed input of the feed-forward block, `[P, hidden]`."""
        return rms_norm(
            hidden, self.small[layer]["post_attention_layernorm.weight"], self.geometry.rms_norm_eps
        )

    def heads(self, layer: int, projected: Tensor, rotation: Rotation) -> HeadRows:
        """Cut query, key and value rows `[N, (H + 2 K) * D]` into heads, normed (in some families) and rotated."""
        sizes = self.geometry
        qk_heads = sizes.heads + sizes.kv_heads
        states = projected.view(len(projected), qk_heads + sizes.kv_heads, sizes.head_dim)
        qk, value = states[:, :qk_heads], states[:, qk_heads:]
        if sizes.qk_norm:
            small = self.small[layer]
            query = rms_norm(qk[:, : sizes.heads], small["self_attn.q_norm.weight"], sizes.rms_norm_eps)
            key = rms_norm(qk[:, sizes.heads :], small["self_attn.k_norm.weight"], sizes.rms_norm_eps)
            qk = torch.cat((query, key), dim=1)
        qk = rotate(qk, *rotation)
        return HeadRows(qk[:, : sizes.heads], qk[:, sizes.heads :].transpose(0, 1), value.transpose(0, 1))

    def bias(self, layer: int, name: str) -> Tensor | None:
        """The bias of a projection such as `self_attn.q_proj`; None if the family has none."""
        return self.small[layer].get(f"{name}.bias")
