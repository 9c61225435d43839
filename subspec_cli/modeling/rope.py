"""Rotary position tables, one per session, so that a deep tree never changes the frequencies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

Rotation = tuple[Tensor, Tensor]
"""cos and sin of some rows, each `[N, 1, D]`."""


@dataclass(frozen=True, slots=True)
class RopeTable:
    """cos and sin `[positions, 1, D]` in the model's dtype, scaled as the RoPE type requires."""

    cos: Tensor
    sin: Tensor

    def rows(self, positions: Tensor) -> Rotation:
        """Cos and sin of the given positions, each `[N, 1, D]`."""
        return self.cos[positions], self.sin[positions]


def build_rope_table(
    config: PreTrainedConfig, *, context: int, positions: int, dtype: torch.dtype, device: torch.device
) -> RopeTable:
    """Build tables for positions `[0, positions)`.

    `context` selects longrope's long or short factors, once for the session; other types ignore it. The formula
    and the order of casts are those of transformers' rotary embedding.
    """
    inv_freq, scaling = _inverse_frequencies(config, context)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * inv_freq.float()[None, :]
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return RopeTable(cos.to(device, dtype), sin.to(device, dtype))


def _inverse_frequencies(config: PreTrainedConfig, context: int) -> tuple[Tensor, float]:
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=context)
        return inv_freq, float(scaling)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
