"""Kernels that attend to one block of keys and return the output with its log-sum-exp.

A kernel takes query `[B, K, R, D]`, keys and values `[B, K, S, D]` and an additive mask that broadcasts to
`[B, K, R, S]`, or None. Every row sees at least one key. It returns the output `[B, R, K, D]` and the log-sum-exp
`[B, R, K]` in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec_cli.checkpoint.layer_description import Arithmetic

BlockKernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
KernelName = Literal["fused", "products"]
_BIAS_ALIGNMENT = 16
"""Elements to which a GPU kernel wants the mask's rows aligned."""


def block_kernel(name: KernelName, arithmetic: Arithmetic, device: torch.device) -> BlockKernel:
    """Return the library's fused kernel for a device, or matrix products in float32.

    No fused kernel caps scores, so a model that does always has the products.
    """
    scale = arithmetic.attention_scale
    if name == "products" or arithmetic.score_cap is not None:
        return partial(products_kernel, scale=scale, cap=arithmetic.score_cap)
    return partial(fused_cpu_kernel if device.type == "cpu" else fused_cuda_kernel, scale=scale)


def fused_cpu_kernel(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend with the library's fused kernel for CPUs, which has no stable name of its own."""
    if mask is not None:
        mask = mask.view(*[1] * (4 - mask.dim()), *mask.shape)
    output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, attn_mask=mask, scale=scale
    )
    return output.transpose(1, 2), log_sum.transpose(1, 2)


def fused_cuda_kernel(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend with the library's memory-efficient kernel, which splits no block over its keys."""
    blocks, kv_heads, rows, _ = query.shape
    if mask is not None:
        # Rows of the mask must be aligned in memory; blocks of keys are multiples of the alignment.
        assert mask.shape[-1] % _BIAS_ALIGNMENT == 0
        mask = mask.expand(blocks, kv_heads, rows, mask.shape[-1])
    output, log_sum, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, keys, values, mask, True, scale=scale
    )
    return output.transpose(1, 2), log_sum[..., :rows].transpose(1, 2)


def products_kernel(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with matrix products in float32, where the fused kernel fails or scores are capped.

    The output stays float32.
    """
    scores = torch.matmul(query.float() * scale, keys.float().transpose(-1, -2))
    if cap is not None:
        scores.div_(cap).tanh_().mul_(cap)
    if mask is not None:
        scores += mask.float()
    best = scores.amax(-1, keepdim=True)
    weights = scores.sub_(best).exp_()
    total = _ordered_sum(weights)
    output = torch.matmul(weights, values.float()).div_(total)
    return output.transpose(1, 2), (best + total.log())[..., 0].transpose(1, 2)


def _ordered_sum(weights: Tensor) -> Tensor:
    """Sum `[..., S]` over the last dimension by halves, so that the order does not depend on the number of rows."""
    width = weights.shape[-1]
    assert width & (width - 1) == 0
    while width > 1:
        width //= 2
        weights = weights[..., :width] + weights[..., width : 2 * width]
    return weights


def padded_rows(query: Tensor, multiple: int) -> Tensor:
    """Pad `[..., R, D]` queries with zero rows to a multiple of rows."""
    missing = -query.shape[-2] % multiple
    return F.pad(query, (0, 0, 0, missing)) if missing else query
