"""How the configurations of a family set rotary positions: a part of the family's row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeRule:
    """How the configurations of a family set rotary positions."""

    theta: float = 10_000.0
    """Default of `rope_theta`."""
    share: float | None = None
    """Default of `partial_rotary_factor`; None: the family turns whole heads."""
    kinds: tuple[str, ...] = ("default", "linear", "yarn", "longrope", "llama3")
    """Types that the family has."""
    synonyms: Mapping[str, str] = field(default_factory=dict)
    """Other names of types."""
    sliding_theta: float | None = None
    """Default of `rope_theta` in layers with a window, if those have a table of their own."""
    sliding_theta_field: str = ""
    """Field beside the tables that sets it."""
    default_table: Mapping[str, Any] = field(default_factory=dict)
    """What is read if config.json has no table, or no tables."""
    fills_tables: bool = True
    """Whether fields beside the tables fill them."""
    has_query_growth: bool = False
    """Whether the table names `llama_4_scaling_beta`."""
    has_alpha: bool = False
    """Whether the type `dynamic` with `alpha` is a larger theta."""
