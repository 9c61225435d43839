"""Measure how fast weights of 8 bits become 16 bits, in bytes of the file a second, on one thread."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from subspec_cli.checkpoint import compiled_widening
from subspec_cli.checkpoint.widening import widen

_REPEATS = 9


def main() -> None:
    """Print the rate of each form of scales: by numba if it is installed, by torch operations, by torch's cast."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows, columns = given.rows, given.columns
    codes = torch.randn(rows, columns).mul_(60).to(torch.float8_e4m3fn)
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    grids = {"tensor": (1, 1), "channel": (rows, 1), "block 128 x 128": (rows // 128, columns // 128)}
    print("GB/s of the processor's time, the best of", _REPEATS)
    for name, shape in grids.items():
        scales = torch.rand(shape) / 1000
        has_numba = compiled_widening.widen_compiled(codes, scales, out)
        compiled = f"numba {_rate(codes, scales, out):5.2f}, " if has_numba else "numba not installed, "
        with mock.patch.object(compiled_widening, "widen_compiled", return_value=False):
            operations = _rate(codes, scales, out)
            cast = _rate(codes, scales + 1000, out)  # too large for the short way
        print(f"{name:16} {compiled}operations {operations:5.2f}, cast {cast:5.2f}")


def _rate(codes: Tensor, scales: Tensor, out: Tensor) -> float:
    return codes.numel() / min(_time(lambda: widen(codes, scales, out)) for _ in range(_REPEATS)) / 1e9


def _time(work: Callable[[], None]) -> float:
    started_s = time.thread_time()
    work()
    return time.thread_time() - started_s


if __name__ == "__main__":
    main()
