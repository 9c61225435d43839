"""Rotary position tables. They depend on positions and on the length of the prompt, never on unused room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from subspec_cli.checkpoint.rope_settings import RopeSettings

Rotation = tuple[Tensor, Tensor]
"""cos and sin of some rows, each `[N, 1, D]`."""


class RopeTable:
    """cos and sin in the model's dtype, scaled as the RoPE type requires.

    A model that was stretched by longrope turns by its short factors up to its original length, the switch. A token
    that is generated behind it is turned by the long factors, and the rows before it keep theirs; a prompt that is
    longer is turned by the long ones whole. The library's `generate` does the same.
    """

    def __init__(self, cos: Tensor, sin: Tensor, *, length: int = 0, switch: int | None = None) -> None:
        """`cos` and `sin` are `[positions, 1, D]`; with a `switch` a second table of long prompts follows the first.

        `length` is the number of positions of each; `switch` the number of tokens of the longest short prompt.
        """
        self._cos = cos
        self._sin = sin
        self._length = length
        self._switch = switch
        # A tensor that keeps its address: captured draft steps read it.
        self._first = torch.zeros((), dtype=torch.long, device=cos.device)

    def rows(self, positions: Tensor) -> Rotation:
        """Cos and sin of the given positions, each `[N, 1, D]`."""
        if self._switch is not None:
            positions = positions + self._first
        return self._cos[positions], self._sin[positions]

    def begin(self, prompt_tokens: int) -> bool:
        """Begin an answer to a prompt of so many tokens; return whether cached rows are turned by the other table."""
        if self._switch is None:
            return False
        first = 0 if prompt_tokens <= self._switch else self._length
        changed = int(self._first) != first
        self._first.fill_(first)
        return changed


def build_rope_table(
    settings: RopeSettings, *, positions: int, dtype: torch.dtype, device: torch.device
) -> RopeTable:
    """Build the table for positions `[0, positions)`.

    The formula and the order of casts are those of transformers' rotary embedding.
    """
    inv_freq, scaling = _inverse_frequencies(settings, 1)
    angles, switch = _angles(inv_freq, positions), settings.switch
    if switch is not None and switch < positions:
        long = _angles(_inverse_frequencies(settings, switch + 1)[0], positions)
        angles = torch.cat((angles[:switch], long[switch:], long))
    else:
        switch = None
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return RopeTable(cos.to(device, dtype), sin.to(device, dtype), length=positions, switch=switch)


def _angles(inv_freq: Tensor, positions: int) -> Tensor:
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * inv_freq.float()[None, :]
    return torch.cat((angles, angles), dim=-1)[:, None, :]


@dataclass(frozen=True, slots=True)
class _LibraryConfig:
    """What the library's functions of rotary positions read of a configuration."""

    rope_parameters: dict[str, Any]
    head_dim: int
    max_position_embeddings: int
    hidden_size: int = 0
    num_attention_heads: int = 1

    def standardize_rope_params(self) -> None:
        """Do nothing: the parameters are complete."""


def _inverse_frequencies(settings: RopeSettings, tokens: int) -> tuple[Tensor, float]:
    """Frequencies and the factor of cos and sin, for a call over so many tokens."""
    if settings.kind != "default":
        config: Any = _LibraryConfig(dict(settings.parameters), settings.head_dim, settings.max_positions)
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[settings.kind](config, torch.device("cpu"), seq_len=tokens)
        return inv_freq, float(scaling)
    exponents = torch.arange(0, settings.head_dim, 2, dtype=torch.float32) / settings.head_dim
    return 1.0 / (settings.parameters["rope_theta"] ** exponents), 1.0
