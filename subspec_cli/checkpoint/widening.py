"""From matrices in 8 bits to 16: bf16(float32(code) * float32(scale)), rounded once.

Shapes: `[R, C]` a matrix, `[r, c]` its scales, where r divides R and c divides C.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from subspec_cli.checkpoint.layer_tensors import LAYER_MATRICES, scale_name
from subspec_cli.errors import IntegrityError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_STRIP_WEIGHTS: Final = 1 << 19
"""Weights that are widened at a time; all of their intermediate values stay in a processor's cache."""
_GPU_STRIP_WEIGHTS: Final = 1 << 24
_NAN_CODE: Final = 0x7F
_EXPONENT_SHIFT: Final = 120
"""The bits of a code, moved to their place in bfloat16, are those of the code's value times 2 ** -120."""
_LARGEST_SHIFTED_SCALE: Final = 128.0


def widen(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """Write the weights `[R, C]` in bfloat16 to `out`; `codes` are `[R, C]` in float8_e4m3fn, without NaN."""
    grid = scales.float().reshape(scales.shape if scales.dim() == 2 else (1, 1))
    columns = codes.shape[1]
    factors = grid if grid.shape[1] == 1 else grid.repeat_interleave(columns // grid.shape[1], 1)
    # Strips need sizes alone: asking a GPU for values would wait for it.
    if codes.device.type != "cpu":
        _widen_strips(codes, factors, out, most_rows=_GPU_STRIP_WEIGHTS // columns, shift=False)
        return
    from subspec_cli.checkpoint.compiled_widening import widen_compiled

    shift = float(grid.abs().max()) <= _LARGEST_SHIFTED_SCALE
    if shift:
        factors = factors * 2.0**_EXPONENT_SHIFT
    if not shift or not widen_compiled(codes, factors, out):
        _widen_strips(codes, factors, out, most_rows=_STRIP_WEIGHTS // columns, shift=shift)


def _widen_strips(codes: Tensor, factors: Tensor, out: Tensor, *, most_rows: int, shift: bool) -> None:
    """Widen some rows after others; `factors` are `[r, C]` or `[r, 1]`."""
    rows = len(codes)
    unit_rows = rows // len(factors)
    if factors.shape[1] == 1:  # rows of several units may go together
        factors, unit_rows = factors.repeat_interleave(unit_rows, 0), 1
    span = rows if unit_rows == 1 else unit_rows
    step = max(1, min(span, most_rows))
    for first in range(0, rows, span):
        for start in range(first, first + span, step):
            part = slice(start, min(start + step, first + span))
            factor = factors[part] if unit_rows == 1 else factors[first // unit_rows]
            _widen_strip(codes[part], factor, out[part], shift=shift)


def _widen_strip(codes: Tensor, factor: Tensor, out: Tensor, *, shift: bool) -> None:
    import torch

    if shift:
        # Several times as fast as the library's cast. The sign is extended to 16 bits, and moves with the others.
        bits = codes.view(torch.int8).to(torch.int16)
        bits.bitwise_left_shift_(4).bitwise_and_(-0x7810)
        wide = bits.view(torch.bfloat16).float()
    else:
        wide = codes.float()
    out.copy_(wide.mul_(factor))


def widened_tensors(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A layer's tensors with all matrices in `dtype`, and without scales.

    Raises IntegrityError: a code that is not a number.
    """
    import torch

    made = {}
    scales = {scale_name(name) for name in tensors}
    for name, tensor in tensors.items():
        if name in scales:
            continue
        if tensor.dtype != torch.float8_e4m3fn:
            made[name] = tensor.to(dtype) if name.endswith(LAYER_MATRICES) else tensor
            continue
        if bad := int(((tensor.view(torch.uint8) & _NAN_CODE) == _NAN_CODE).sum()):
            raise IntegrityError(
                f"{name} holds {bad} values that are NaN (codes 0x7F and 0xFF)", "download the model again"
            )
        made[name] = torch.empty(tensor.shape, dtype=dtype)
        widen(tensor, tensors[scale_name(name)], made[name])
    return made
