"""A limit of host memory that is set for a process or for a group of processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """One limit and what is left of it."""

    limit_bytes: int
    free_bytes: int
    """What may still be taken."""
    owner: str
    """Who allows no more, as the end of `a budget is more than ...`."""
