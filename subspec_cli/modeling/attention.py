"""Attention, exact for the target and fast for the draft. `H` heads, `K` kv heads, `N` rows, `C` keys, `D` dim."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec_cli.limits import ATTENTION_TILE_BYTES

TILE_BYTES: Final = ATTENTION_TILE_BYTES


def exact_attention(query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
    """Attention whose result does not depend on the rows in which keys lie in the cache.

    query `[H, N, D]`, keys and values `[K, C, D]`, allowed `[N, C]` bool (every row allows at least one key)
    -> `[N, H * D]` in the query's dtype. Scores, softmax and the weighted sum are computed in float64 and
    rounded once, so the order of keys (scratch rows, compaction, masked rows) disappears in the rounding. KV
    heads are not repeated: the queries of a group are rows of one matrix product.
    """
    H, N, D = query.shape
    K, C, _ = keys.shape
    group = H // K
    keys64, values64 = keys.contiguous().double(), values.contiguous().double()
    output = torch.empty((N, H * D), dtype=query.dtype, device=query.device)
    tile = max(1, TILE_BYTES // (8 * H * C))
    for start in range(0, N, tile):
        rows = query[:, start : start + tile].double() * D**-0.5
        n = rows.shape[1]
        scores = torch.bmm(rows.reshape(K, group * n, D), keys64.transpose(1, 2)).view(K, group, n, C)
        scores.masked_fill_(~allowed[start : start + n], -torch.inf)
        mixed = torch.bmm(torch.softmax(scores, dim=-1).view(K, group * n, C), values64)
        output[start : start + n] = mixed.view(H, n, D).transpose(0, 1).reshape(n, H * D)
    return output


def fast_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention for the draft, with the same shapes; its rounding affects only the quality of the draft.

    `mask` is `[N, C]` bool, or the result of `grouped_mask`.
    """
    H, N, D = query.shape
    K = keys.shape[0]
    group = H // K
    rows = mask if len(mask) == group * N else mask.repeat(group, 1)
    mixed = F.scaled_dot_product_attention(
        query.reshape(1, K, group * N, D), keys[None], values[None], attn_mask=rows[None, None]
    )
    return mixed.view(H, N, D).transpose(0, 1).reshape(N, H * D)


def grouped_mask(allowed: Tensor, group: int, like: Tensor) -> Tensor:
    """Make the additive mask `[group * N, C]` of `fast_attention` from `[N, C]` bool, in `like`'s dtype."""
    bias = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device)
    return bias.masked_fill_(~allowed, -torch.inf).repeat(group, 1)
