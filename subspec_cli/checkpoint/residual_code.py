"""Machine code for loops that rebuild weights: wide vectors, for processors that look up and spread their lanes."""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from subspec_cli.checkpoint.residual_names import MARKER

TURNED_BYTES: Final = 32
"""Bytes of a column of codes, and columns, that are turned together."""
_REGISTERS: Final = TURNED_BYTES * TURNED_BYTES // 64
LANES: Final = 32
"""Weights in a vector."""
_CODES: Final = 16

_BYTE, _HALF, _INT, _LONG = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_BYTES, _HALVES = ir.VectorType(_BYTE, LANES), ir.VectorType(_HALF, LANES)
_WIDE = ir.VectorType(_BYTE, 64)


def _data(context: Any, builder: Any, signature: Any, given: Any, number: int) -> Any:  # noqa: ANN401
    """The address of an array's first element, which is one of the arguments."""
    array = context.make_array(signature.args[number])(context, builder, given[number])
    return builder.ptrtoint(array.data, _LONG)


def _at(builder: Any, address: Any, offset: Any, kind: Any) -> Any:  # noqa: ANN401
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def _same(kind: Any, value: int) -> Any:  # noqa: ANN401
    return ir.Constant(kind, [value] * kind.count)


def _repeated(builder: Any, value: Any, count: int) -> Any:  # noqa: ANN401
    kind = ir.VectorType(value.type, count)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _INT(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_INT, count), [0] * count))


@intrinsic
def turn_codes(_typing: Any, packed: Any, first: Any, tile: Any, columns: Any, column: Any) -> Any:  # noqa: ANN401, ARG001
    """Write 32 columns of 32 bytes, which follow each other from byte `first` on, as 32 rows of `tile`.

    `tile` has rows of `columns` bytes; theirs begin at `column`. Both arrays are contiguous.
    """

    def emit(context: Any, builder: Any, signature: Any, given: Any) -> Any:  # noqa: ANN401
        source = builder.add(_data(context, builder, signature, given, 0), given[1])
        parts = [
            builder.load(_at(builder, source, _LONG(64 * number), _WIDE), align=1)
            for number in range(_REGISTERS)
        ]
        half = _REGISTERS // 2
        # A byte's place has ten bits, five of its column and five of its row. Each round turns them by one.
        for _ in range(5):
            turned = []
            for number in range(half):
                for first_lane in (0, 32):
                    places = [first_lane + lane // 2 + 64 * (lane % 2) for lane in range(64)]
                    picked = ir.Constant(ir.VectorType(_INT, 64), places)
                    turned.append(builder.shuffle_vector(parts[number], parts[number + half], picked))
            parts = turned
        target = builder.add(_data(context, builder, signature, given, 2), given[4])
        for row in range(TURNED_BYTES):
            part = parts[row // 2]
            places = [32 * (row % 2) + lane for lane in range(32)]
            bytes_of_row = builder.shuffle_vector(part, part, ir.Constant(ir.VectorType(_INT, 32), places))
            offset = builder.mul(given[3], _LONG(row))
            builder.store(bytes_of_row, _at(builder, target, offset, _BYTES), align=1)
        return context.get_dummy_value()

    return types.void(packed, types.int64, tile, types.int64, types.int64), emit


@intrinsic
def group_weights(
    _typing: Any,  # noqa: ANN401
    codes: Any,  # noqa: ANN401
    residuals: Any,  # noqa: ANN401
    out: Any,  # noqa: ANN401
    place: Any,  # noqa: ANN401
    base: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Write a group's weights without its escapes: base of the code + residual, as bits of bfloat16.

    Args of that function: contiguous uint8, int8 and int16; `place` has the group's first element, its elements, a
    multiple of 32, and the bits by which codes are shifted; `base` has scale and zero in float32. A group has 16
    bases, so each weight looks up its own.
    """

    def emit(context: Any, builder: Any, signature: Any, given: Any) -> Any:  # noqa: ANN401
        at = [_data(context, builder, signature, given, number) for number in range(3)]
        first, count, shift = (builder.extract_value(given[3], field) for field in range(3))
        scale, zero = (
            _repeated(builder, builder.extract_value(given[4], field), _CODES) for field in range(2)
        )
        floats, ints = ir.VectorType(ir.FloatType(), _CODES), ir.VectorType(_INT, _CODES)
        every_code = ir.Constant(floats, [float(code) for code in range(_CODES)])
        bits = builder.bitcast(builder.fadd(builder.fmul(every_code, scale), zero), ints)
        sign = builder.and_(builder.ashr(bits, _same(ints, 31)), _same(ints, 0x7FFFFFFF))
        order = builder.ashr(builder.xor(bits, sign), _same(ints, 16))
        few = builder.trunc(order, ir.VectorType(_HALF, _CODES))
        twice = ir.Constant(ir.VectorType(_INT, LANES), [*range(_CODES)] * 2)
        table = builder.shuffle_vector(few, few, twice)
        kind = ir.FunctionType(_HALVES, [_HALVES] * 2)
        look_up = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.hi.512")
        shifts = _repeated(builder, builder.trunc(shift, _HALF), LANES)
        with cgutils.for_range(builder, builder.udiv(count, _LONG(LANES))) as loop:
            element = builder.add(first, builder.mul(loop.index, _LONG(LANES)))
            pair = builder.zext(builder.load(_at(builder, at[0], element, _BYTES), align=1), _HALVES)
            code = builder.and_(builder.lshr(pair, shifts), _same(_HALVES, _CODES - 1))
            added = builder.sext(builder.load(_at(builder, at[1], element, _BYTES), align=1), _HALVES)
            found = builder.add(builder.call(look_up, (table, code)), added)
            sign = builder.and_(builder.ashr(found, _same(_HALVES, 15)), _same(_HALVES, 0x7FFF))
            target = _at(builder, at[2], builder.mul(element, _LONG(2)), _HALVES)
            builder.store(builder.xor(found, sign), target, align=2)
        return context.get_dummy_value()

    return types.void(codes, residuals, out, place, base), emit


@intrinsic
def expand_marked(_typing: Any, marks: Any, out: Any, values: Any, number: Any, first: Any) -> Any:  # noqa: ANN401, ARG001
    """Replace marked elements among 32 of a row by the next values of a list, and return their number.

    Args of that function: `marks` int8, `out` and `values` int16, contiguous; the next value's index, the first
    element's index. Elements of `out` whose mark is `MARKER` get values in their order.
    """

    def emit(context: Any, builder: Any, signature: Any, given: Any) -> Any:  # noqa: ANN401
        at = [_data(context, builder, signature, given, place) for place in range(3)]
        found = builder.load(_at(builder, at[0], given[4], _BYTES), align=1)
        marked = builder.icmp_signed("==", found, _same(_BYTES, MARKER))
        target = _at(builder, at[1], builder.mul(given[4], _LONG(2)), _HALVES)
        pointer = _HALF.as_pointer()
        kind = ir.FunctionType(_HALVES, [pointer, marked.type, _HALVES])
        load = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.expandload.v{LANES}i16")
        next_value = _at(builder, at[2], builder.mul(given[3], _LONG(2)), _HALF)
        new = builder.call(load, [next_value, marked, builder.load(target, align=2)])
        builder.store(new, target, align=2)
        return builder.zext(builder.ctpop(builder.bitcast(marked, ir.IntType(LANES))), _LONG)

    return types.int64(marks, out, values, types.int64, types.int64), emit
