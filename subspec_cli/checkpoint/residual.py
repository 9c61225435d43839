"""Residuals: what a 4-bit code leaves open of a bfloat16 weight, so that code and residual give every bit again.

The bits of bfloat16 map to integers in the order of the values (`ordered`). A weight's base is the upper half of
float32(code * scale + zero), in this order; its residual is the order of the weight less the base. A residual from
-127 to 127 takes a byte. Any other weight is an escape: the byte is the marker -128, and its 16 bits are in a list,
by rows. Rows can be rebuilt by themselves, since the first escape of each is stored.

The base does not depend on a machine: in float32 the product of a 4-bit code and a scale in bfloat16 is exact, and
so is 8 * scale. So rounding happens once, whether or not an operation is fused.

Shapes: `[R, C]` a matrix, `[C / group, R, 2]` scales and zeros with weight = (code - 8) * scale + zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from subspec_cli.checkpoint.packed_codes import CodedMatrix, UnitLayout
from subspec_cli.checkpoint.residual_names import MARKER

_LARGEST: Final = 127
_STRIP_WEIGHTS: Final = 1 << 20
"""Weights that torch operations rebuild at a time, which bounds the memory of intermediate values."""


def ordered(bits: Tensor) -> Tensor:
    """Map the bits of bfloat16 (int16) to int32 in the order of the values: all patterns differ, also both zeros."""
    wide = bits.to(torch.int32)
    return wide ^ ((wide >> 15) & 0x7FFF)


def base_order(codes: Tensor, pairs: Tensor) -> Tensor:
    """The base of each weight, `[R, C]` int32, from codes `[R, C]` uint8 and scales and zeros `[C / group, R, 2]`."""
    rows, columns = codes.shape
    scale, middle = pairs.float().transpose(0, 1).unbind(-1)
    zero = middle - 8 * scale
    grouped = codes.view(rows, pairs.shape[0], -1).float()
    bits = grouped.mul_(scale[..., None]).add_(zero[..., None]).view(torch.int32).view(rows, columns)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> 16


def encode(weight: Tensor, codes: Tensor, pairs: Tensor) -> dict[str, Tensor] | None:
    """The residual of a matrix in bfloat16: its parts by name; None if it would take as many bytes as the matrix.

    Args:
        weight: `[R, C]` bfloat16.
        codes: `[R, C]` uint8, from 0 to 15.
        pairs: `[C / group, R, 2]` bfloat16.
    """
    scale, zero = pairs.float().abs().unbind(-1)
    if not torch.isfinite(zero + 32 * scale).all():  # the bits of what is not a number differ between devices
        return None
    bits = weight.view(torch.int16)
    residual = ordered(bits) - base_order(codes, pairs)
    escaped = (residual < -_LARGEST) | (residual > _LARGEST)
    counts = escaped.sum(1)
    escapes = bits[escaped]
    if len(escapes) % 2:  # so that all parts of the next matrix are aligned
        escapes = torch.cat([escapes, escapes.new_zeros(1)])
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    made = {
        "starts": starts,
        "residuals": residual.masked_fill_(escaped, MARKER).to(torch.int8),
        "escapes": escapes,
    }
    return made if sum(part.nbytes for part in made.values()) < weight.nbytes else None


def rebuild(stored: Mapping[str, Tensor], coded: CodedMatrix, out: Tensor) -> None:
    """Write the weights `[R, C]` in bfloat16 to `out`, from the parts of a residual and the code of the matrix.

    Compiled loops do it where numba is installed and the code's layout has units, else torch operations.
    """
    if not _rebuild_compiled(stored, coded, out):
        rows, columns = out.shape
        step = max(1, _STRIP_WEIGHTS // columns)
        for first in range(0, rows, step):
            rebuild_rows(stored, coded, out, first, min(rows, first + step))


def rebuild_rows(stored: Mapping[str, Tensor], coded: CodedMatrix, out: Tensor, first: int, end: int) -> None:
    """Rebuild some rows by torch operations; no value leaves the device, so that nothing waits for a GPU."""
    place = slice(coded.first_row + first, coded.first_row + end)
    pairs = coded.scales_and_zeros[:, place]
    out.view(torch.int16)[first:end] = _decoded(stored, coded.codes(first, end), pairs, first, end)


def is_exact(stored: Mapping[str, Tensor], weight: Tensor, codes: Tensor, pairs: Tensor) -> bool:
    """Whether a residual gives every bit of the matrix; arguments as of `encode`."""
    step = max(1, _STRIP_WEIGHTS // weight.shape[1])
    for first in range(0, len(weight), step):
        rows = slice(first, min(len(weight), first + step))
        found = _decoded(stored, codes[rows], pairs[:, rows], rows.start, rows.stop)
        if not torch.equal(found, weight.view(torch.int16)[rows]):
            return False
    return True


def _decoded(stored: Mapping[str, Tensor], codes: Tensor, pairs: Tensor, first: int, end: int) -> Tensor:
    """The bits of rows `first` to `end`, int16, from their codes and scales."""
    residuals, starts, escapes = (stored[name] for name in ("residuals", "starts", "escapes"))
    part = residuals[first:end]
    marked = part == MARKER
    order = base_order(codes, pairs).add_(part)
    order ^= (order >> 31) & 0x7FFF
    if not len(escapes):
        return order.to(torch.int16)
    # An escape's number is the row's first one plus the marks before it in the row.
    number = marked.cumsum(1, dtype=torch.int32).sub_(1).add_(starts[first:end, None])
    values = escapes.index_select(0, number.clamp_(0, len(escapes) - 1).flatten()).view(number.shape)
    return torch.where(marked, values, order.to(torch.int16))


def _rebuild_compiled(stored: Mapping[str, Tensor], coded: CodedMatrix, out: Tensor) -> bool:
    if out.device.type != "cpu" or not all(isinstance(part, UnitLayout) for part in coded.layout):
        return False
    from subspec_cli.checkpoint.compiled_residual import rebuild_compiled

    return rebuild_compiled(stored, coded, out)
