"""Widening compiled by numba, where it is installed: the same bits as torch operations give, about twice as fast."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from subspec_cli.checkpoint.row_ranges import in_row_ranges
from subspec_cli.compiled import compiled


def widen_compiled(codes: Tensor, factors: Tensor, out: Tensor) -> bool:
    """Write bf16(code * factor) to `out`, on all of torch's threads; False, with nothing written, without numba.

    Args:
        codes: `[R, C]` in float8_e4m3fn, without NaN, on the CPU.
        factors: `[r, C]` or `[r, 1]` in float32: scales times 2 ** 120, where r divides R.
        out: `[R, C]` in bfloat16.
    """
    kernel = _compiled_rows()
    if kernel is None:
        return False
    arrays = (
        codes.view(torch.uint8).numpy(),
        factors.contiguous().numpy(),
        out.view(torch.int16).numpy().view(np.uint16),
    )
    in_row_ranges(partial(kernel, *arrays), len(codes), codes.numel())
    return True


@cache
def _compiled_rows() -> Callable[..., None] | None:
    return compiled(_widen_rows)


def _widen_rows(
    codes: Any,  # noqa: ANN401 - numba compiles it for arrays of uint8, float32 and uint16
    factors: Any,  # noqa: ANN401
    out: Any,  # noqa: ANN401
    first: int,
    end: int,
) -> None:
    columns = codes.shape[1]
    unit_rows = len(codes) // len(factors)
    bits = np.empty(columns, dtype=np.uint32)
    values = bits.view(np.float32)
    # Loops of one simple step each, which become vector instructions.
    for row in range(first, end):
        source, target, factor = codes[row], out[row], factors[row // unit_rows]
        for column in range(columns):
            code = np.uint32(source[column])
            bits[column] = ((code & np.uint32(0x7F)) << np.uint32(20)) | (
                (code & np.uint32(0x80)) << np.uint32(24)
            )
        if len(factor) == 1:
            for column in range(columns):
                values[column] *= factor[0]
        else:
            for column in range(columns):
                values[column] *= factor[column]
        for column in range(columns):
            value = bits[column]
            half = np.uint32(0x7FFF) + ((value >> np.uint32(16)) & np.uint32(1))
            target[column] = np.uint16((value + half) >> np.uint32(16))
