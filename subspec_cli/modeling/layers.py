"""The arithmetic of one decoder layer, in parts: the target runs them block by block, the draft a layer at a time.

All supported families use this layer; rounding follows transformers' own order of casts. Shapes: `N` rows, `P` rows
with padding, `H` heads, `K` kv heads, `D` head dim. The caller pads rows; `batch.rows` of them are real.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.rope import RopeTable, Rotation
from subspec_cli.modeling.token_batch import TokenBatch

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Maps query `[H, N, D]`, keys and values `[K, C, D]` and a mask to `[N, H * D]`."""


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
    """Layer functions bound to a model's sizes, its small tensors and one attention function.

    Target and draft each have one, over the same small tensors, so no state is switched between them.
    """

    geometry: ModelGeometry
    small: tuple[Mapping[str, Tensor], ...]
    """Norms and biases of each layer, by the name inside the layer."""
    rope: RopeTable
    attend: Attention

    def attention_input(self, layer: int, hidden: Tensor) -> Tensor:
        """Normed input of the attention block, `[P, hidden]`."""
        return rms_norm(hidden, self.small[layer]["input_layernorm.weight"], self.geometry.rms_norm_eps)

    def mlp_input(self, layer: int, hidden: Tensor) -> Tensor:
        """Normed input of the feed-forward block, `[P, hidden]`."""
        return rms_norm(
            hidden, self.small[layer]["post_attention_layernorm.weight"], self.geometry.rms_norm_eps
        )

    def rotate_and_attend(
        self,
        layer: int,
        projected: Tensor,
        rotation: Rotation,
        batch: TokenBatch,
        kv: KVCache,
        allowed: Tensor,
    ) -> Tensor:
        """Rotate, write to the cache and attend: query, key, value rows `[P, (H + 2 K) * D]` to `[P, H * D]`.

        `allowed` is the mask of `allowed_in`, in the form that `attend` takes. Padding rows of the result are
        zero.
        """
        sizes, n = self.geometry, batch.rows
        qk_heads = sizes.heads + sizes.kv_heads
        states = projected[:n].view(n, qk_heads + sizes.kv_heads, sizes.head_dim)
        qk, value = states[:, :qk_heads], states[:, qk_heads:]
        if sizes.qk_norm:
            small = self.small[layer]
            query = rms_norm(qk[:, : sizes.heads], small["self_attn.q_norm.weight"], sizes.rms_norm_eps)
            key = rms_norm(qk[:, sizes.heads :], small["self_attn.k_norm.weight"], sizes.rms_norm_eps)
            qk = torch.cat((query, key), dim=1)
        qk = rotate(qk, *rotation).transpose(0, 1)
        kv.write(layer, batch.start, qk[sizes.heads :], value.transpose(0, 1))
        keys, values = kv.read(layer, batch.allowed.shape[1])
        attended = self.attend(qk[: sizes.heads], keys, values, allowed)
        if len(batch.positions) == n:
            return attended
        return F.pad(attended, (0, 0, 0, len(batch.positions) - n))

    def allowed_in(self, window: int | None, batch: TokenBatch) -> Tensor:
        """The mask `[N, C]` bool of the batch's rows in layers with this sliding window."""
        if window is None:
            return batch.allowed
        distance = batch.positions[: batch.rows, None] - batch.key_positions[None, :]
        return batch.allowed & (distance < window)

    def bias(self, layer: int, name: str) -> Tensor | None:
        """The bias of a projection such as `self_attn.q_proj`; None if the family has none."""
        return self.small[layer].get(f"{name}.bias")
