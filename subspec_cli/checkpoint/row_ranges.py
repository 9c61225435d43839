"""Compiled loops over the rows of a matrix, divided among as many threads as torch has."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Final

import torch

_LEAST_WEIGHTS: Final = 1 << 18
"""Fewest weights for a thread of its own."""


def in_row_ranges(loop: Callable[[int, int], None], rows: int, weights: int) -> None:
    """Call `loop(first, end)` for ranges that cover the rows of a matrix; `loop` holds no lock of the interpreter."""
    threads = max(1, min(torch.get_num_threads(), weights // _LEAST_WEIGHTS))
    if threads == 1:
        loop(0, rows)
        return
    cuts = [rows * number // threads for number in range(threads + 1)]
    for done in [_pool(threads).submit(loop, first, end) for first, end in pairwise(cuts)]:
        done.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="weights")
