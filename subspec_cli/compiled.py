"""Loops that numba compiles, where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def compiled(loop: Callable[..., Any]) -> Callable[..., Any] | None:
    """Compile a loop over arrays, which then holds no lock of the interpreter; None if numba is not installed."""
    try:
        import numba
    except ImportError:
        return None
    found: Callable[..., Any] = _cached(numba.njit, loop, nogil=True)
    return found


def has_expanding_loads() -> bool:
    """Whether this processor spreads values from memory over the marked lanes of a vector in one instruction."""
    from llvmlite import binding

    return bool(binding.get_host_cpu_features().get("avx512vbmi2", False))


def expand_marked(lanes: int, marker: int) -> Any:  # noqa: ANN401 - numba has no types
    """A function for compiled loops: it replaces marked elements of a vector by the next values of a list.

    Args of that function: `marks` int8, `out` and `values` int16, contiguous; the next value's index, the first
    element's index. Elements of `out` whose mark is `marker` get values in their order; their number is returned.
    """
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    byte, half, long = ir.IntType(8), ir.IntType(16), ir.IntType(64)
    vector, mask = ir.VectorType(half, lanes), ir.VectorType(ir.IntType(1), lanes)

    @intrinsic
    def expand(_context: Any, marks: Any, out: Any, values: Any, number: Any, first: Any) -> Any:  # noqa: ANN401
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:  # noqa: ANN401
            data = [
                context.make_array(kind)(context, builder, value).data
                for kind, value in zip(signature.args[:3], given[:3], strict=True)
            ]
            places = [builder.gep(data[0], [given[4]]), builder.gep(data[1], [given[4]])]
            kinds = (ir.VectorType(byte, lanes).as_pointer(), vector.as_pointer())
            marks_at, out_at = (builder.bitcast(at, kind) for at, kind in zip(places, kinds, strict=True))
            found, old = builder.load(marks_at, align=1), builder.load(out_at, align=2)
            marked = builder.icmp_signed("==", found, ir.Constant(found.type, [marker] * lanes))
            kind = ir.FunctionType(vector, [half.as_pointer(), mask, vector])
            load = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.expandload.v{lanes}i16")
            new = builder.call(load, [builder.gep(data[2], [given[3]]), marked, old])
            builder.store(new, out_at, align=2)
            return builder.zext(builder.ctpop(builder.bitcast(marked, ir.IntType(lanes))), long)

        return types.int64(marks, out, values, number, first), generate

    return expand


def compiled_callback(loop: Callable[..., Any], signature: str) -> Any:  # noqa: ANN401 - numba has no types
    """Compile a function that a C library calls at its `address`. It is compiled at once; numba must be installed."""
    import numba

    return _cached(lambda **how: numba.cfunc(signature, **how), loop)


def _cached(decorator: Callable[..., Any], loop: Callable[..., Any], **how: Any) -> Any:  # noqa: ANN401
    try:
        return decorator(cache=True, error_model="numpy", **how)(loop)
    except RuntimeError:  # there is no directory for its cache
        return decorator(error_model="numpy", **how)(loop)
