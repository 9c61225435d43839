"""Attention of the draft: the library's fused kernel over all rows in view; its rounding affects only the guesses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fast_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attend with `[N, H, D]` queries to `[K, C, D]` keys and values; returns `[N, H * D]`.

    `mask` is `[N, C]` bool, or the result of `grouped_mask`. KV heads are not repeated: the queries of a group are
    rows of one call.
    """
    N, H, D = query.shape
    K = keys.shape[0]
    group = H // K
    rows = mask if len(mask) == group * N else mask.repeat(group, 1)
    mixed = F.scaled_dot_product_attention(
        query.transpose(0, 1).reshape(1, K, group * N, D),
        keys[None],
        values[None],
        attn_mask=rows[None, None],
    )
    return mixed.view(H, N, D).transpose(0, 1).reshape(N, H * D)


def grouped_mask(allowed: Tensor, group: int, like: Tensor) -> Tensor:
    """Make the additive mask `[group * N, C]` of `fast_attention` from `[N, C]` bool, in `like`'s dtype."""
    bias = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device)
    return bias.masked_fill_(~allowed, -torch.inf).repeat(group, 1)
