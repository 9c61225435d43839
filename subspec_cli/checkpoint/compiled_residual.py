"""Rebuilding weights from residuals, compiled by numba: the same bits as `residual` gives by torch operations."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from subspec_cli.checkpoint.packed_codes import CodedMatrix, UnitLayout
from subspec_cli.checkpoint.residual_names import MARKER
from subspec_cli.checkpoint.row_ranges import in_row_ranges
from subspec_cli.compiled import compiled, has_expanding_loads
from subspec_cli.errors import IntegrityError

_BLOCK: Final = 32
"""Weights of an inner loop, whose length is a constant so that it becomes vector instructions. It divides every
group size."""


def rebuild_compiled(stored: Mapping[str, Tensor], coded: CodedMatrix, out: Tensor) -> bool:
    """Write the weights `[R, C]` in bfloat16 to `out`, on all of torch's threads; False if numba is missing.

    All parts of the code's layout are units. Arguments as of `residual.rebuild`.
    """
    if _rebuild_rows is None:
        return False
    rows, columns = coded.shape
    arrays = (
        coded.packed.view(torch.uint8).numpy().reshape(-1).view(np.uint64),
        coded.scales_and_zeros.view(torch.int16).numpy().view(np.uint16),
        tuple(stored[name].numpy() for name in ("residuals", "starts", "escapes")),
        out.view(torch.int16).numpy(),
    )
    in_row_ranges(partial(_between, coded, arrays), rows, rows * columns)
    return True


def _between(coded: CodedMatrix, arrays: tuple[Any, ...], first: int, end: int) -> None:
    for part in coded.layout:
        assert isinstance(part, UnitLayout)
        low = max(first, part.first_row - coded.first_row)
        high = min(end, part.first_row + part.rows - coded.first_row)
        if low < high:
            place = (part.first_row, coded.first_row, low, high)
            if wrong := _rebuild_rows(*arrays, part.order.numpy(), place):
                raise IntegrityError(
                    f"the residuals of {wrong} rows are damaged", "subspec models verify --repair"
                )


def _transpose(
    packed: Any,  # noqa: ANN401 - numba compiles these functions for arrays
    first_word: int,
    words: int,
    tile: Any,  # noqa: ANN401
) -> None:
    """Turn a unit's codes from columns into rows: 8 x 8 bytes at a time, which hold two codes each.

    A column is `words` words of 8 bytes; `tile` is `[8 * words, columns / 8]` of words.
    """
    four, two, one = (
        np.uint64(0x00000000FFFFFFFF),
        np.uint64(0x0000FFFF0000FFFF),
        np.uint64(0x00FF00FF00FF00FF),
    )
    by4, by2, by1 = np.uint64(32), np.uint64(16), np.uint64(8)
    for column in range(tile.shape[1]):
        for word in range(words):
            at = first_word + column * 8 * words + word
            x0, x1, x2, x3 = packed[at], packed[at + words], packed[at + 2 * words], packed[at + 3 * words]
            at += 4 * words
            x4, x5, x6, x7 = packed[at], packed[at + words], packed[at + 2 * words], packed[at + 3 * words]
            a0, a4 = (x0 & four) | (x4 << by4), (x0 >> by4) | (x4 & ~four)
            a1, a5 = (x1 & four) | (x5 << by4), (x1 >> by4) | (x5 & ~four)
            a2, a6 = (x2 & four) | (x6 << by4), (x2 >> by4) | (x6 & ~four)
            a3, a7 = (x3 & four) | (x7 << by4), (x3 >> by4) | (x7 & ~four)
            b0, b2 = (a0 & two) | ((a2 & two) << by2), ((a0 >> by2) & two) | (a2 & ~two)
            b1, b3 = (a1 & two) | ((a3 & two) << by2), ((a1 >> by2) & two) | (a3 & ~two)
            b4, b6 = (a4 & two) | ((a6 & two) << by2), ((a4 >> by2) & two) | (a6 & ~two)
            b5, b7 = (a5 & two) | ((a7 & two) << by2), ((a5 >> by2) & two) | (a7 & ~two)
            row = 8 * word
            tile[row, column] = (b0 & one) | ((b1 & one) << by1)
            tile[row + 1, column] = ((b0 >> by1) & one) | (b1 & ~one)
            tile[row + 2, column] = (b2 & one) | ((b3 & one) << by1)
            tile[row + 3, column] = ((b2 >> by1) & one) | (b3 & ~one)
            tile[row + 4, column] = (b4 & one) | ((b5 & one) << by1)
            tile[row + 5, column] = ((b4 >> by1) & one) | (b5 & ~one)
            tile[row + 6, column] = (b6 & one) | ((b7 & one) << by1)
            tile[row + 7, column] = ((b6 >> by1) & one) | (b7 & ~one)


def _transpose_by_vectors(packed: Any, first_word: int, words: int, tile: Any) -> None:  # noqa: ANN401
    """The same with wide vectors, for units whose columns are as long as these take."""
    columns = 8 * tile.shape[1]
    if 8 * words == _TURNED_BYTES and columns % _TURNED_BYTES == 0:
        for column in range(0, columns, _TURNED_BYTES):
            _turn(packed, 8 * first_word + _TURNED_BYTES * column, tile, columns, column)
    else:
        _transpose_words(packed, first_word, words, tile)


def _scale_and_zero(pair: Any) -> Any:  # noqa: ANN401
    scale = np.uint32(np.uint32(pair[0]) << np.uint32(16)).view(np.float32)
    middle = np.uint32(np.uint32(pair[1]) << np.uint32(16)).view(np.float32)
    return scale, np.float32(middle - np.float32(8) * scale)


def _weights(
    codes: Any,  # noqa: ANN401
    shift: Any,  # noqa: ANN401
    pairs: Any,  # noqa: ANN401
    residuals: Any,  # noqa: ANN401
    out: Any,  # noqa: ANN401
) -> None:
    """A row's weights without its escapes; `pairs` are `[groups, 2]`.

    The product of code and scale is exact, so fusing it with the sum changes no bit.
    """
    values = np.empty(len(out), dtype=np.float32)
    groups = len(pairs)
    blocks = len(out) // _BLOCK // groups
    for group in range(groups):
        scale, zero = _base_of(pairs[group])
        for block in range(blocks):
            first = (group * blocks + block) * _BLOCK
            for column in range(_BLOCK):
                code = (np.int32(codes[first + column]) >> shift) & np.int32(15)
                values[first + column] = np.float32(code) * scale + zero
    base = values.view(np.int32)
    for column in range(len(out)):
        bits = base[column]
        order = (bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))) >> np.int32(16)
        order = order + np.int32(residuals[column])
        out[column] = np.int16(order ^ ((order >> np.int32(31)) & np.int32(0x7FFF)))


def _weights_by_vectors(
    codes: Any,  # noqa: ANN401
    shift: Any,  # noqa: ANN401
    pairs: Any,  # noqa: ANN401
    residuals: Any,  # noqa: ANN401
    out: Any,  # noqa: ANN401
) -> None:
    """The same with wide vectors."""
    size = len(out) // len(pairs)
    for group in range(len(pairs)):
        place = (np.int64(group * size), np.int64(size), np.int64(shift))
        _group(codes, residuals, out, place, _base_of(pairs[group]))


def _set_escapes_by_vectors(residuals: Any, escapes: Any, first_escape: int, places: Any, out: Any) -> Any:  # noqa: ANN401, ARG001
    """Replace marked weights by escapes, never beyond their list; returns how many were marked."""
    number: Any = np.int64(first_escape)
    columns, last = len(out), len(escapes) - _LANES
    first = 0
    while first + _LANES <= columns and number <= last:
        number += _expand(residuals, out, escapes, number, first)
        first += _LANES
    for column in range(first, columns):
        if residuals[column] == MARKER:
            if number < len(escapes):
                out[column] = escapes[number]
            number += 1
    return number - first_escape


def _set_escapes_by_places(residuals: Any, escapes: Any, first_escape: int, places: Any, out: Any) -> Any:  # noqa: ANN401
    """The same without branches, which half of the escapes would mispredict."""
    found: Any = 0
    for column in range(len(out)):
        places[found] = column
        found += np.int64(residuals[column] == MARKER)
    for number in range(min(found, len(escapes) - first_escape)):
        out[places[number]] = escapes[first_escape + number]
    return found


def _rebuild(
    packed: Any,  # noqa: ANN401
    pairs: Any,  # noqa: ANN401
    stored: Any,  # noqa: ANN401
    out: Any,  # noqa: ANN401
    order: Any,  # noqa: ANN401
    place: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Rebuild some rows that are in units, and return the rows whose escapes are not as many as stored.

    `place` has the first packed row of the units, that of the matrix, and the rows.
    """
    residuals, starts, escapes = stored
    units_row, packed_row, first, end = place
    columns, unit_rows = residuals.shape[1], len(order)
    tile = np.empty((unit_rows // 2, columns // 8), dtype=np.uint64)
    places = np.empty(columns + 1, dtype=np.int32)
    row, wrong = first, np.int64(0)
    while row < end:
        unit_row = (packed_row + row - units_row) // unit_rows * unit_rows + units_row
        _transpose_unit(packed, unit_row // 16 * columns, unit_rows // 16, tile)
        last = min(end, unit_row + unit_rows - packed_row)
        while row < last:
            at = order[packed_row + row - unit_row]
            codes, shift = tile[at >> 1].view(np.uint8), np.int32((at & 1) << 2)
            _row_weights(codes, shift, pairs[:, packed_row + row], residuals[row], out[row])
            start = min(max(starts[row], 0), len(escapes))
            found = _set_escapes(residuals[row], escapes, start, places, out[row])
            wrong += np.int64(found != starts[row + 1] - starts[row])
            row += 1
    return wrong


# Compiled once the module is imported: loops find each other by these names.
_transpose_words: Any = compiled(_transpose)
_base_of: Any = compiled(_scale_and_zero)
_transpose_unit: Any = _transpose_words
_row_weights: Any = None
_expand: Any = None
_turn: Any = None
_group: Any = None
_set_escapes: Any = None
_rebuild_rows: Any = None
_LANES = _TURNED_BYTES = 0
if _transpose_words is not None:
    if has_expanding_loads():
        from subspec_cli.checkpoint.residual_code import LANES as _LANES
        from subspec_cli.checkpoint.residual_code import TURNED_BYTES as _TURNED_BYTES
        from subspec_cli.checkpoint.residual_code import expand_marked as _expand
        from subspec_cli.checkpoint.residual_code import group_weights as _group
        from subspec_cli.checkpoint.residual_code import turn_codes as _turn

        _set_escapes = compiled(_set_escapes_by_vectors)
        _transpose_unit = compiled(_transpose_by_vectors)
        _row_weights = compiled(_weights_by_vectors)
    else:
        _set_escapes = compiled(_set_escapes_by_places)
        _row_weights = compiled(_weights)
    _rebuild_rows = compiled(_rebuild)
