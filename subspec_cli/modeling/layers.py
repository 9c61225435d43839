"""The arithmetic of one decoder layer, in parts: the target runs them block by block, the draft a layer at a time.

All four families use this layer; rounding follows transformers' own order of casts. Shapes: `N` rows, `P` rows
with padding, `H` heads, `K` kv heads, `D` head dim. The caller pads rows; `batch.rows` of them are real.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.rope import RopeTable, Rotation

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_ROW_SIZES: Final = (8, 16, 32, 48, 64)
_SERIAL_ELEMENTS: Final = 32_768
"""Elementwise kernels run on one thread below this many elements (torch's grain size)."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The rows of one forward, and the cache rows for their keys and values.

    `token_ids` and `positions` are `[P]` with `P >= rows`; the rows behind `rows` are padding. A batch is made on
    the host. Token ids stay there: the embedding gathers by them.
    """

    token_ids: Tensor
    positions: Tensor
    rows: int
    start: int | Tensor
    """The first cache row to write. In a captured draft step, all `[rows]` of them as a tensor on the GPU."""
    allowed: Tensor
    """`[rows, C]` bool: which of the first C cache rows each row attends to."""
    key_positions: Tensor
    """`[C]` position of each cache row, for sliding windows."""

    def to(self, device: torch.device) -> TokenBatch:
        """The batch on `device`, except its token ids."""
        if device.type == self.positions.device.type:
            return self
        return replace(
            self,
            positions=self.positions.to(device),
            allowed=self.allowed.to(device),
            key_positions=self.key_positions.to(device),
        )


@dataclass(frozen=True, slots=True)
class RowRules:
    """The rules that make a row's bits batch-invariant; found by the self-check, never assumed."""

    row_block: int
    """Rows are padded to multiples of this."""
    fixed_rows: bool = False
    """Whether linears run in calls of exactly `row_block` rows (CUDA) instead of any multiple (CPU)."""
    tile_elementwise: bool = False
    """Whether SiLU runs in tiles too small to be split among threads."""

    def padded(self, rows: int) -> int:
        """Rows after padding: one of a few sizes, since kernels keep code and scratch memory for each size."""
        if rows > _ROW_SIZES[-1]:
            return -(-rows // _ROW_SIZES[-1]) * _ROW_SIZES[-1]
        sizes = (self.row_block, *_ROW_SIZES)
        return next(size for size in sizes if size >= rows and size % self.row_block == 0)

    def linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`inputs [P, in] @ weight [out, in].T + bias` with batch-invariant rows; P must be padded."""
        if not self.fixed_rows or inputs.shape[0] == self.row_block:
            return F.linear(inputs, weight, bias)
        return torch.cat([F.linear(part, weight, bias) for part in inputs.split(self.row_block)])

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """SiLU(gate) * up, `[P, feed_forward]`; overwrites `gate`."""
        if not self.tile_elementwise:
            return F.silu(gate, inplace=True).mul_(up)
        tile = max(1, (_SERIAL_ELEMENTS - 1) // gate.shape[1])
        for rows, other in zip(gate.split(tile), up.split(tile), strict=True):
            F.silu(rows, inplace=True).mul_(other)
        return gate


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

    def mix(
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
        mixed = self.attend(qk[: sizes.heads], keys, values, allowed)
        if len(batch.positions) == n:
            return mixed
        return F.pad(mixed, (0, 0, 0, len(batch.positions) - n))

    def allowed_in(self, window: int | None, batch: TokenBatch) -> Tensor:
        """The mask `[N, C]` bool of the batch's rows in layers with this sliding window."""
        if window is None:
            return batch.allowed
        distance = batch.positions[: batch.rows, None] - batch.key_positions[None, :]
        return batch.allowed & (distance < window)

    def bias(self, layer: int, name: str) -> Tensor | None:
        """The bias of a projection such as `self_attn.q_proj`; None if the family has none."""
        return self.small[layer].get(f"{name}.bias")


def causal_batch(token_ids: Sequence[int], start: int, padded: int) -> TokenBatch:
    """Make a batch of tokens at positions and cache rows `[start, start + N)`; each attends up to its own row."""
    positions = torch.arange(start, start + len(token_ids))
    key_positions = torch.arange(start + len(token_ids))
    allowed = key_positions[None, :] <= positions[:, None]
    return batch_of(token_ids, positions, start, allowed, key_positions, padded)


def batch_of(
    token_ids: Sequence[int],
    positions: Tensor,
    start: int,
    allowed: Tensor,
    key_positions: Tensor,
    padded: int,
) -> TokenBatch:
    """Make a batch of `N` tokens at `positions` `[N]`, padded to `padded` rows; see `TokenBatch` for the rest."""
    n = len(token_ids)
    # Padding repeats the last token: its values are finite and nothing reads them.
    ids = torch.tensor([*token_ids, *[token_ids[-1]] * (padded - n)])
    return TokenBatch(
        token_ids=ids,
        positions=F.pad(positions, (0, padded - n)),
        rows=n,
        start=start,
        allowed=allowed,
        key_positions=key_positions,
    )
