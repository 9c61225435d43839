"""Loops that numba compiles, where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def compiled(loop: Callable[..., Any]) -> Callable[..., Any] | None:
    """Compile a loop over arrays, which then holds no lock of the interpreter; None if numba is not installed."""
    try:
        import numba
    except ImportError:
        return None
    found: Callable[..., Any] = _cached(numba.njit, loop, nogil=True)
    return found


def has_expanding_loads() -> bool:
    """Whether this processor spreads values from memory over the marked lanes of a vector in one instruction."""
    from llvmlite import binding

    return bool(binding.get_host_cpu_features().get("avx512vbmi2", False))


def compiled_callback(loop: Callable[..., Any], signature: str) -> Any:  # noqa: ANN401 - numba has no types
    """Compile a function that a C library calls at its `address`. It is compiled at once; numba must be installed."""
    import numba

    return _cached(lambda **how: numba.cfunc(signature, **how), loop)


def _cached(decorator: Callable[..., Any], loop: Callable[..., Any], **how: Any) -> Any:  # noqa: ANN401
    try:
        return decorator(cache=True, error_model="numpy", **how)(loop)
    except RuntimeError:  # there is no directory for its cache
        return decorator(error_model="numpy", **how)(loop)
