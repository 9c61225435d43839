"""Compiled loops over the rows of a matrix, divided among torch's own threads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from itertools import count
from typing import Final

import torch

_LEAST_WEIGHTS: Final = 1 << 18
"""Fewest weights for a thread of its own."""
_RANGES_A_THREAD: Final = 6
"""A thread that loses its core to a reader takes fewer ranges than the others."""
_ROWS_OF_UNITS: Final = 64
"""Ranges begin at multiples, since a packed unit of rows is unpacked as a whole."""
_WORK: Final = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_START: Final = ctypes.CFUNCTYPE(None, _WORK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
"""Types of what a thread runs, given a job, and of what starts so many threads, given work, job, number and flags."""


def in_row_ranges(loop: Callable[[int, int], None], rows: int, weights: int) -> None:
    """Call `loop(first, end)` for ranges that cover the rows of a matrix; `loop` holds no lock of the interpreter.

    A second pool of threads would wait for the same cores. If torch's OpenMP is not GNU's, one thread does all the
    work. Raises what `loop` raises, once all threads have ended.
    """
    threads = min(torch.get_num_threads(), weights // _LEAST_WEIGHTS)
    entry = threads_entry()
    if threads < 2 or entry is None:
        loop(0, rows)
        return
    step = -(-rows // (threads * _RANGES_A_THREAD * _ROWS_OF_UNITS)) * _ROWS_OF_UNITS
    numbers, failures = count(), list[BaseException]()

    def work(_job: object) -> None:
        try:
            while (first := step * next(numbers)) < rows:
                loop(first, min(rows, first + step))
        except BaseException as error:
            failures.append(error)

    _START(entry)(_WORK(work), None, threads, 0)
    if failures:
        raise failures[0]


@cache
def threads_entry() -> int | None:
    """Address of `GOMP_parallel`, by which torch's own OpenMP starts threads; None if torch uses another library."""
    try:
        entry = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    return ctypes.cast(entry, ctypes.c_void_p).value
