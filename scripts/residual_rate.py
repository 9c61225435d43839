"""Measure how fast weights are rebuilt from residuals, in bytes of bfloat16 a second, on one thread and on more."""

from __future__ import annotations

import argparse
import time
from unittest import mock

import torch

from subspec_cli.checkpoint import residual
from subspec_cli.modeling.residuals import dummy_residual

_REPEATS = 9


def main() -> None:
    """Print the rate by numba, if it is installed, and by torch operations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4608)
    parser.add_argument("--columns", type=int, default=1728)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    print("GB/s of bfloat16, the median of", _REPEATS)
    for threads in given.threads:
        torch.set_num_threads(threads)
        compiled = _rate(given.rows, given.columns)
        with mock.patch.object(residual, "_rebuild_compiled", return_value=False):
            operations = _rate(given.rows, given.columns)
        print(f"{threads} threads: numba {compiled:5.2f}, operations {operations:5.2f}")


def _rate(rows: int, columns: int) -> float:
    found = dummy_residual((rows, columns), torch.device("cpu"))
    assert found is not None, "no kernel takes this shape"
    stored, coded = found
    out = torch.empty(coded.shape, dtype=torch.bfloat16)
    seconds = []
    for _ in range(_REPEATS + 1):
        started_s = time.perf_counter()
        residual.rebuild(stored, coded, out)
        seconds.append(time.perf_counter() - started_s)
    return out.nbytes / sorted(seconds[1:])[_REPEATS // 2] / 1e9


if __name__ == "__main__":
    main()
