"""Rotary position tables. They depend on positions and on the length of the prompt, never on unused room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from subspec_cli.checkpoint.layer_description import Arithmetic
from subspec_cli.checkpoint.rope_settings import QueryGrowth, RopeSettings


class Rotation(NamedTuple):
    """How some rows are turned. A head may have more features than are turned."""

    cos: Tensor
    """`[N, 1, turned]`."""
    sin: Tensor
    """`[N, 1, turned]`."""
    is_interleaved: bool = False
    rounds_once: bool = False
    """Whether the turned states are computed in float32 and rounded once."""
    query_factor: Tensor | None = None
    """`[N, 1, 1]`, a factor of the turned query by its position."""


Rotations = Sequence[Rotation]
"""By the number of the rotary table."""


def rotate(states: Tensor, rotation: Rotation) -> Tensor:
    """Apply rotary positions to `[N, H, D]` states."""
    cos, sin = rotation.cos, rotation.sin
    turned = cos.shape[-1]
    kept = states[..., turned:]
    wide = states[..., :turned].float() if rotation.rounds_once else states[..., :turned]
    if rotation.is_interleaved:
        swapped = torch.stack((-wide[..., 1::2], wide[..., ::2]), dim=-1).flatten(-2)
    else:
        swapped = torch.cat((-wide[..., turned // 2 :], wide[..., : turned // 2]), dim=-1)
    found = (wide * cos + swapped * sin).to(states.dtype)
    return torch.cat((found, kept), dim=-1) if kept.shape[-1] else found


class RopeTable:
    """cos and sin in the model's dtype, scaled as the RoPE type requires.

    A model that was stretched by longrope turns by its short factors up to its original length, the switch. A token
    that is generated behind it is turned by the long factors, and the rows before it keep theirs; a prompt that is
    longer is turned by the long ones whole. The library's `generate` does the same.
    """

    def __init__(
        self,
        whole: Rotation,
        *,
        length: int = 0,
        switch: int | None = None,
    ) -> None:
        """`whole` has a row for each position; with a `switch` a second table of long prompts follows the first.

        `length` is the number of positions of each; `switch` the number of tokens of the longest short prompt.
        """
        self._whole = whole
        self._length = length
        self._switch = switch

    def rows(self, positions: Tensor, prompt_tokens: Tensor) -> Rotation:
        """How rows at positions `[N]` are turned; `prompt_tokens`, `[]` or `[N]`, is the length of their prompts."""
        at, whole = positions, self._whole
        if self._switch is not None:
            at = positions + self._length * (prompt_tokens > self._switch)
        growth = whole.query_factor
        return whole._replace(
            cos=whole.cos[at], sin=whole.sin[at], query_factor=None if growth is None else growth[positions]
        )

    def differs(self, one: int, other: int) -> bool:
        """Whether answers to prompts of these lengths are turned by different tables."""
        return self._switch is not None and (one > self._switch) != (other > self._switch)


@dataclass(frozen=True, slots=True)
class RopeTables:
    """All rotary tables of a model."""

    tables: tuple[RopeTable, ...]

    def rows(self, positions: Tensor, prompt_tokens: Tensor) -> Rotations:
        """How rows are turned, by each table; arguments as of `RopeTable.rows`."""
        return [table.rows(positions, prompt_tokens) for table in self.tables]

    def differ(self, one: int, other: int) -> bool:
        """Whether answers to prompts of these lengths are turned by different tables."""
        return any(table.differs(one, other) for table in self.tables)


def build_rope_tables(
    settings: Sequence[RopeSettings],
    arithmetic: Arithmetic,
    *,
    positions: int,
    dtype: torch.dtype,
    device: torch.device,
) -> RopeTables:
    """Build the tables for positions `[0, positions)`.

    The formula and the order of casts are those of transformers' rotary embedding.
    """
    return RopeTables(tuple(_table(one, arithmetic, positions, dtype, device) for one in settings))


def _table(
    settings: RopeSettings, arithmetic: Arithmetic, positions: int, dtype: torch.dtype, device: torch.device
) -> RopeTable:
    inv_freq, scaling = _inverse_frequencies(settings, 1)
    is_interleaved = arithmetic.is_interleaved
    angles, switch = _angles(inv_freq, positions, is_interleaved), settings.switch
    if switch is not None and switch < positions:
        long = _angles(_inverse_frequencies(settings, switch + 1)[0], positions, is_interleaved)
        angles = torch.cat((angles[:switch], long[switch:], long))
    else:
        switch = None
    table_dtype = torch.float32 if arithmetic.rotation_rounding == "once" else dtype
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    growth = settings.query_growth
    whole = Rotation(
        cos.to(device, table_dtype),
        sin.to(device, table_dtype),
        is_interleaved,
        arithmetic.rotation_rounding != "each_step",
        None if growth is None else _query_factors(growth, positions).to(device, dtype),
    )
    return RopeTable(whole, length=positions, switch=switch)


def _query_factors(growth: QueryGrowth, positions: int) -> Tensor:
    steps = torch.floor(torch.arange(positions) / growth.length)
    return (1 + growth.beta * torch.log(1 + steps))[:, None, None]


def _angles(inv_freq: Tensor, positions: int, is_interleaved: bool) -> Tensor:
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * inv_freq.float()[None, :]
    both = angles.repeat_interleave(2, dim=-1) if is_interleaved else torch.cat((angles, angles), dim=-1)
    return both[:, None, :]


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
    exponents = torch.arange(0, settings.turned, 2, dtype=torch.float32) / settings.turned
    return 1.0 / (settings.parameters["rope_theta"] ** exponents), 1.0
