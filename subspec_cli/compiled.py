"""Loops that numba compiles, where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def compiled(loop: Callable[..., None]) -> Callable[..., None] | None:
    """Compile a loop over arrays, which then holds no lock of the interpreter; None if numba is not installed."""
    try:
        import numba
    except ImportError:
        return None
    how: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        found: Callable[..., None] = numba.njit(cache=True, **how)(loop)
    except RuntimeError:  # there is no directory for its cache
        found = numba.njit(**how)(loop)
    return found
