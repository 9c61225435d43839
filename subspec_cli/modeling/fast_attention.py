"""Attention of the draft: the library's fused kernel over all rows in view; its rounding affects only the guesses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.layer_description import AttentionShape
from subspec_cli.modeling.token_batch import TokenBatch


class FastAttention:
    """Attention of one draft step. Layers with the same window and groups of heads share one mask."""

    def __init__(self, geometry: ModelGeometry, batch: TokenBatch, like: Tensor) -> None:
        """`like` has the type and the device of the queries."""
        self._scale = geometry.arithmetic.attention_scale
        self._cap = geometry.arithmetic.score_cap
        self._masks = {
            key: grouped_mask(batch.allowed_in(key[0]), key[1], like)
            for key in {(shape.window, shape.group) for shape in geometry.distinct_attention}
        }

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, shape: AttentionShape) -> Tensor:
        """Attend with `[N, H, D]` queries to `[1, K, C, D]` keys and values; returns `[N, H * D]`."""
        mask = self._masks[shape.window, shape.group]
        return fast_attention(query, keys, values, mask, scale=self._scale, cap=self._cap)


def fast_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, *, scale: float, cap: float | None = None
) -> Tensor:
    """Attend with `[N, H, D]` queries to `[1, K, C, D]` keys and values; returns `[N, H * D]`.

    `mask` is the result of `grouped_mask`. KV heads are not repeated: the queries of a group are rows of one call.
    """
    N, H, D = query.shape
    K = keys.shape[1]
    folded = query.view(N, K, H // K, D).transpose(0, 1).reshape(1, K, -1, D)
    if cap is None:
        mixed = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    else:
        # No fused kernel caps scores.
        scores = torch.matmul(folded, keys.transpose(-1, -2)).mul_(scale)
        scores = scores.div_(cap).tanh_().mul_(cap).add_(mask)
        mixed = torch.matmul(scores.softmax(-1), values)
    return mixed.view(K, N, H // K * D).transpose(0, 1).reshape(N, H * D)


def grouped_mask(allowed: Tensor, group: int, like: Tensor) -> Tensor:
    """Make the additive mask `[1, 1, N * group, C]` of `fast_attention` from `[N, C]` bool, in `like`'s dtype."""
    bias = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device)
    return bias.masked_fill_(~allowed, -torch.inf).repeat_interleave(group, 0)[None, None]
