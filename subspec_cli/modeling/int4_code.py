"""Machine code for a few rows times a packed 4-bit matrix: eight-bit dot products, compiled by numba.

torch packs 64 output features together: for each input feature, byte `i` of 32 holds output `i` in its lower half
and output `32 + i` in its upper half. Four input features are thus 128 bytes in a row. They are shuffled so that the
four codes of an output lie side by side: the instruction `vpdpbusd` multiplies them with four activations and adds
the products up in int32. Activations are rounded to int8 with a scale for each row and group.

Every result is computed by one thread in one order, so that neither the number of threads nor the rows beside it
can change it. The threads are those of torch's own OpenMP pool: a second pool would wait for the same cores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from subspec_cli.compiled import compiled, compiled_callback

OUTPUTS: Final = 64
"""Output features that are packed together."""
_CODE_BYTES: Final = OUTPUTS // 2
"""Bytes of the codes of one input feature."""
_QUAD: Final = 4
"""Input features that one instruction takes."""
_LANES: Final = 16
"""Sums in a vector."""
_TILE_ROWS: Final = 4
"""Most rows that are computed together, so that their sums stay in registers."""
_COUNTERS: Final = 2
"""Counters of a job: the next block and the next thread."""
_JOB_FIELDS: Final = _COUNTERS + 10
"""They are followed by the shape and six addresses."""
_LARGEST: Final = 127
"""Largest rounded activation."""
_SMALLEST_BITS: Final = 0x80
"""Bits of the smallest normal number of bfloat16."""

_BYTE, _INT, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_BYTES = ir.VectorType(_BYTE, OUTPUTS)
_INTS, _FLOATS = (ir.VectorType(kind, _LANES) for kind in (_INT, ir.FloatType()))


def _pointer(builder: Any, address: Any, offset: int, kind: Any) -> Any:  # noqa: ANN401 - llvmlite has no types
    return builder.inttoptr(builder.add(address, _LONG(offset)), kind.as_pointer())


def _quad_codes(builder: Any, address: Any) -> list[Any]:  # noqa: ANN401
    """Codes of four input features: four vectors of 16 outputs, with the four codes of an output side by side."""
    halves = [builder.load(_pointer(builder, address, at, _BYTES), align=1) for at in (0, OUTPUTS)]
    lower, upper = [], []
    for first in (0, _LANES):
        places = [_CODE_BYTES * i + first + lane for lane in range(_LANES) for i in range(_QUAD)]
        shuffled = builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(_INT, OUTPUTS), places))
        lower.append(builder.and_(shuffled, ir.Constant(_BYTES, [15] * OUTPUTS)))
        upper.append(builder.lshr(shuffled, ir.Constant(_BYTES, [4] * OUTPUTS)))
    return [builder.bitcast(part, _INTS) for part in (*lower, *upper)]


def _repeated(builder: Any, address: Any, place: int, kind: Any) -> Any:  # noqa: ANN401
    """Four bytes, in every lane."""
    undefined = ir.Constant(kind, ir.Undefined)
    value = builder.load(_pointer(builder, address, 4 * place, kind.element), align=1)
    one = builder.insert_element(undefined, value, _INT(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(_INTS, [0] * _LANES))


def _dots(builder: Any, rows: int, codes: Any, activations: Any, quads: Any) -> list[list[Any]]:  # noqa: ANN401
    """Sums of codes times activations over a group: by row, four vectors of 16 outputs."""
    kind = ir.FunctionType(_INTS, [_INTS] * 3)
    dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
    zeros = ir.Constant(_INTS, [0] * _LANES)
    sums = [
        [cgutils.alloca_once_value(builder, zeros) for _ in range(OUTPUTS // _LANES)] for _ in range(rows)
    ]
    with cgutils.for_range(builder, quads) as loop:
        parts = _quad_codes(builder, builder.add(codes, builder.mul(loop.index, _LONG(_QUAD * _CODE_BYTES))))
        inputs = builder.add(activations, builder.mul(loop.index, _LONG(_QUAD * rows)))
        for row, row_sums in enumerate(sums):
            four = _repeated(builder, inputs, row, _INTS)
            for part, place in zip(parts, row_sums, strict=True):
                builder.store(builder.call(dot, (builder.load(place), part, four)), place)
    return [[builder.load(place) for place in row_sums] for row_sums in sums]


def _tile_of(rows: int) -> Any:  # noqa: ANN401
    """Return the function that adds the products of one group to the totals of this many rows."""

    def emit(context: Any, builder: Any, _signature: Any, given: tuple[Any, ...]) -> Any:  # noqa: ANN401
        codes, activations, quads, pairs, roundings, totals = given
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        fused = cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32")
        dots = _dots(builder, rows, codes, activations, quads)
        row_sums = [_repeated(builder, roundings, 2 * row + 1, _INTS) for row in range(rows)]
        row_factors = [_repeated(builder, roundings, 2 * row, _FLOATS) for row in range(rows)]
        for part in range(OUTPUTS // _LANES):
            pair = builder.load(_pointer(builder, pairs, 4 * _LANES * part, _INTS), align=1)
            # A scale is the lower half of a pair, a zero the upper one, and bfloat16 the upper half of a float32.
            scale = builder.bitcast(builder.shl(pair, ir.Constant(_INTS, [16] * _LANES)), _FLOATS)
            zero = builder.bitcast(builder.and_(pair, ir.Constant(_INTS, [0xFFFF0000] * _LANES)), _FLOATS)
            for row in range(rows):
                # Codes are 0 to 15 and mean -8 to 7.
                raised = builder.shl(row_sums[row], ir.Constant(_INTS, [3] * _LANES))
                product = builder.sitofp(builder.sub(dots[row][part], raised), _FLOATS)
                shift = builder.fmul(builder.sitofp(row_sums[row], _FLOATS), zero)
                scaled = builder.call(fused, (product, scale, shift))
                place = _pointer(builder, totals, 4 * (OUTPUTS * row + _LANES * part), _FLOATS)
                total = builder.call(fused, (scaled, row_factors[row], builder.load(place, align=4)))
                builder.store(total, place, align=4)
        return context.get_dummy_value()

    def tile(
        _typing: Any,  # noqa: ANN401
        codes: Any,  # noqa: ANN401
        activations: Any,  # noqa: ANN401
        quads: Any,  # noqa: ANN401
        pairs: Any,  # noqa: ANN401
        roundings: Any,  # noqa: ANN401
        totals: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        return types.void(codes, activations, quads, pairs, roundings, totals), emit

    return intrinsic(tile)


_tile_1, _tile_2, _tile_3, _tile_4 = (_tile_of(rows) for rows in (1, 2, 3, 4))


@intrinsic
def _next(_typing: Any, address: Any) -> Any:  # noqa: ANN401
    """Return a counter's value and raise it by one, as one operation for all threads."""

    def emit(_context: Any, builder: Any, _signature: Any, given: tuple[Any, ...]) -> Any:  # noqa: ANN401
        return builder.atomic_rmw("add", _pointer(builder, given[0], 0, _LONG), _LONG(1), "monotonic")

    return types.int64(address), emit


@intrinsic
def _on_threads(_typing: Any, run: Any, work: Any, job: Any, threads: Any, held: Any) -> Any:  # noqa: ANN401
    """Let OpenMP's `GOMP_parallel` at address `run` call the function `work` with `job` on each thread.

    The arrays of `held` are not freed before the end.
    """

    def emit(context: Any, builder: Any, _signature: Any, given: tuple[Any, ...]) -> Any:  # noqa: ANN401
        pointer = _BYTE.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, pointer, _INT, _INT])
        start = builder.inttoptr(given[0], kind.as_pointer())
        arguments = [builder.inttoptr(address, pointer) for address in given[1:3]]
        builder.call(start, [*arguments, builder.trunc(given[3], _INT), _INT(0)])
        return context.get_dummy_value()

    return types.void(run, work, job, threads, held), emit


@intrinsic
def _values(_typing: Any, address: Any, kind: Any) -> Any:  # noqa: ANN401
    """Return an address as a pointer to values of a type."""
    pointer = types.CPointer(kind.dtype)

    def emit(context: Any, builder: Any, _signature: Any, given: tuple[Any, ...]) -> Any:  # noqa: ANN401
        return builder.inttoptr(given[0], context.get_value_type(pointer))

    return pointer(address, kind), emit


@numba.njit
def _array(address: int, kind: Any, shape: tuple[int, ...]) -> Any:  # noqa: ANN401
    return carray(_values(address, kind), shape)


@numba.njit
def _address(array: Any) -> Any:  # noqa: ANN401
    return np.int64(array.ctypes.data)


@numba.njit
def _tile_rows(left: int) -> int:
    """How many of the rows that are left are computed together; five are three and two, so that no row is alone."""
    return left if left < _TILE_ROWS else (3 if left in (5, 6) else _TILE_ROWS)


@numba.njit
def _round_rows(source: Any, activations: Any, factors: Any, sums: Any, first: int) -> None:  # noqa: ANN401
    """Round some rows of bfloat16 to int8, with the largest number of each group at 127.

    Args:
        source: `[N, in]` bits of bfloat16.
        activations: `[in / 4, rows]` int32, to write: four rounded values each.
        factors: `[groups, N]` float32, to write: a number is about its rounded value times its group's factor.
        sums: `[groups, N]` int32, to write: the sum of a group's rounded values.
        first: the first of the rows.
    """
    groups = len(factors)
    size = source.shape[1] // groups
    bits = np.empty(size, dtype=np.uint32)
    numbers = bits.view(np.float32)
    rounded = np.empty(size, dtype=np.int8)
    quads = rounded.view(np.int32)
    for row in range(activations.shape[1]):
        for group in range(groups):
            part = source[first + row, group * size : (group + 1) * size]
            largest = np.uint16(0)
            for i in range(size):
                # Without their sign, bits are in the order of the numbers.
                largest = max(largest, part[i] & np.uint16(0x7FFF))
            bits[0] = np.uint32(largest) << np.uint32(16)
            factors[group, first + row] = numbers[0] / np.float32(_LARGEST)
            # Below the smallest normal number the quotient could be infinite.
            inverse = np.float32(_LARGEST) / numbers[0] if largest >= _SMALLEST_BITS else np.float32(0)
            for i in range(size):
                bits[i] = np.uint32(part[i]) << np.uint32(16)
            total = np.int32(0)
            for i in range(size):
                value = np.int32(np.rint(numbers[i] * inverse))
                rounded[i] = np.int8(value)
                total += value
            sums[group, first + row] = total
            for i in range(size // _QUAD):
                activations[group * len(quads) + i, row] = quads[i]


def _compute(job_pointer: Any) -> None:  # noqa: ANN401
    """Compute blocks of 64 outputs until none is left: every thread of a product runs this."""
    job = carray(job_pointer, _JOB_FIELDS)
    rows, inputs, outputs, group_size = job[2], job[3], job[4], job[5]
    codes, pairs, activations, roundings = job[6], job[7], job[8], job[9]
    target = _array(job[11], numba.uint16, (rows, outputs))
    own = job[10] + _next(_address(job) + 8) * 4 * OUTPUTS * rows
    totals = _array(own, numba.uint32, (rows, OUTPUTS))
    quads = group_size // _QUAD
    block = _next(_address(job))
    while block < outputs // OUTPUTS:
        totals[:] = 0
        for group in range(inputs // group_size):
            group_codes = codes + (block * inputs + group * group_size) * _CODE_BYTES
            group_pairs = pairs + 4 * (group * outputs + block * OUTPUTS)
            first = 0
            while first < rows:
                tile = _tile_rows(rows - first)
                values = activations + first * inputs + group * group_size * tile
                at = 8 * (group * rows + first)
                place = own + 4 * OUTPUTS * first
                if tile == 1:
                    _tile_1(group_codes, values, quads, group_pairs, roundings + at, place)
                elif tile == 2:
                    _tile_2(group_codes, values, quads, group_pairs, roundings + at, place)
                elif tile == 3:
                    _tile_3(group_codes, values, quads, group_pairs, roundings + at, place)
                else:
                    _tile_4(group_codes, values, quads, group_pairs, roundings + at, place)
                first += tile
        for row in range(rows):
            for i in range(OUTPUTS):
                value = totals[row, i]
                half = np.uint32(0x7FFF) + ((value >> np.uint32(16)) & np.uint32(1))
                target[row, block * OUTPUTS + i] = np.uint16((value + half) >> np.uint32(16))
        block = _next(_address(job))


def _multiply(
    source: int,
    shape: tuple[int, int, int, int],
    codes: int,
    pairs: int,
    output: int,
    threading: tuple[int, int, int],
) -> None:
    """Multiply rows with a packed matrix.

    Args:
        source: address of `[N, in]` bfloat16.
        shape: N, in, out, group size.
        codes: address of the packed codes.
        pairs: address of `[in / group, out, 2]` bfloat16, scales and zeros.
        output: address of `[N, out]` bfloat16, to write.
        threading: addresses of `GOMP_parallel` and of the compiled `_compute`, number of threads.
    """
    rows, inputs, _, group_size = shape
    quads = inputs // _QUAD
    numbers = _array(source, numba.uint16, (rows, inputs))
    activations = np.empty(rows * quads, dtype=np.int32)
    roundings = np.empty((inputs // group_size, rows, 2), dtype=np.float32)
    factors, sums = roundings[:, :, 0], roundings.view(np.int32)[:, :, 1]
    first = 0
    while first < rows:
        tile = _tile_rows(rows - first)
        part = activations[first * quads : (first + tile) * quads].reshape(quads, tile)
        _round_rows(numbers, part, factors, sums, first)
        first += tile
    run, compute, threads = threading
    totals = np.empty((threads, rows, OUTPUTS), dtype=np.float32)
    job = np.zeros(_JOB_FIELDS, dtype=np.int64)
    places = (codes, pairs, _address(activations), _address(roundings), _address(totals), output)
    for field, value in enumerate(shape + places):
        job[_COUNTERS + field] = value
    _on_threads(run, compute, _address(job), threads, (job, activations, roundings, totals))


def can_compile() -> bool:
    """Whether this processor, or the one that numba's settings name, has the instructions."""
    named = numba.config.CPU_FEATURES
    features = dict(get_host_cpu_features())
    if named is not None:
        features = {feature[1:]: feature[0] == "+" for feature in named.split(",") if feature}
    wanted = ("avx512f", "avx512bw", "avx512vnni")
    return not numba.config.DISABLE_JIT and all(features.get(feature) for feature in wanted)


def compile_product() -> tuple[Callable[..., None], Any]:
    """Compile `_multiply` and the code of its threads, which has an `address`."""
    multiply = compiled(_multiply)
    thread_code = compiled_callback(_compute, "void(CPointer(int64))")
    assert multiply is not None
    return multiply, thread_code
