"""Figures of a benchmark's row: their names, and their spread over the repetitions."""

from __future__ import annotations

import statistics
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

Figure = Literal[
    "plain_tok_per_s",
    "speculative_tok_per_s",
    "speedup_same_plan",
    "speedup",
    "peer_tok_per_s",
    "speedup_over_peer",
]
"""A measured figure of a row."""
FIGURES: Final[tuple[Figure, ...]] = typing.get_args(Figure)
PEER_FIGURES: Final[tuple[Figure, ...]] = ("peer_tok_per_s", "speedup_over_peer")
"""Figures that only a run with a peer has."""
Arm = Literal["plain", "speculative", "best_plain", "peer"]
"""Plain and speculative decoding under one plan, plain decoding under its own best plan, the library's offload."""
ARMS_OF: Final[dict[Figure, tuple[Arm, ...]]] = {
    "plain_tok_per_s": ("plain",),
    "speculative_tok_per_s": ("speculative",),
    "speedup_same_plan": ("plain", "speculative"),
    "speedup": ("speculative", "best_plain"),
    "peer_tok_per_s": ("peer",),
    "speedup_over_peer": ("speculative", "peer"),
}
"""The arms that a figure is made from."""


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure over the repetitions."""

    median: float
    least: float
    most: float


def spread_of(values: Iterable[float]) -> Spread | None:
    """Return median, least and most of some values; None without values."""
    found = list(values)
    return Spread(statistics.median(found), min(found), max(found)) if found else None
