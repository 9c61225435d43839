"""8-bit sources: matrices in F8_E4M3 and the scales beside them, as `quantization_config` describes them.

The model is bf16(float32(code) * float32(scale)), rounded once: what the library computes where it has no GPU. It
computes in 16 bits there, so scales of activations have no effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

from subspec_cli.checkpoint.config_fields import shown
from subspec_cli.checkpoint.dtypes import EIGHT_BIT_DTYPE
from subspec_cli.checkpoint.layer_tensors import LAYERS_PREFIX, scale_name
from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.errors import UnsupportedModelError
from subspec_cli.units import counted, printable

Unit = Literal["tensor", "channel", "block"]
_HINT: Final = "give the 16-bit original"
_DEFAULT_BLOCK: Final = (128, 128)
_FLOAT_FORMATS: Final = ("float-quantized", "naive-quantized")
EIGHT_BIT_RESULT: Final = "BF16"
"""Type of the weights that codes and scales give, in which everything is computed."""
_SCALE_DTYPES: Final = ("F32", "BF16")
WEIGHT_SCALES: Final = ("weight_scale_inv", "weight_scale")
"""Last parts of the names of scales in files. Codes are multiplied by either."""
_ACTIVATION_SCALES: Final = (".activation_scale", ".input_scale")
_ZERO_POINTS: Final = (".weight_zero_point", ".input_zero_point", ".output_zero_point")
_CACHE_SCALES: Final = (".k_scale", ".v_scale", ".q_scale", ".output_scale", ".kv_scale")


@dataclass(frozen=True, slots=True)
class ScaleUnit:
    """What one scale belongs to."""

    unit: Unit
    block: tuple[int, int] | None = None
    """Rows and columns of a block."""

    @property
    def label(self) -> str:
        """As users read it."""
        return self.unit if self.block is None else f"block {self.block[0]} x {self.block[1]}"


@dataclass(frozen=True, slots=True)
class EightBitSource:
    """How a checkpoint's matrices in 8 bits are scaled."""

    scale: str
    """Last part of the names of their scales: one of `WEIGHT_SCALES`."""
    units: tuple[ScaleUnit, ...]
    """Those that may occur."""


@dataclass(frozen=True, slots=True)
class EightBitTensors:
    """The tensors of an 8-bit source, apart."""

    weights: dict[str, TensorEntry]
    """All that are no scales, by name."""
    scales: dict[str, TensorEntry]
    """By `scale_name` of their matrices."""
    note: str


Table: TypeAlias = Mapping[str, Any]


def read_eight_bit(config: Table) -> EightBitSource | None:
    """Read what config.json says of 8-bit weights; None if it names another method, or none.

    Raises UnsupportedModelError for a form that is not supported, by its name.
    """
    table = config.get("quantization_config")
    if not isinstance(table, dict):
        return None
    if table.get("quant_method") == "fp8":
        return _read_fp8(table)
    if table.get("quant_method") == "compressed-tensors":
        return _read_compressed(table)
    return None


def _read_fp8(table: Table) -> EightBitSource:
    _accept(table, "scale_fmt", (None, "float"))
    _accept(table, "fmt", (None, "e4m3"))
    _accept(table, "activation_scheme", (None, "dynamic", "static"))
    block = table.get("weight_block_size", list(_DEFAULT_BLOCK))
    unit = ScaleUnit("tensor") if block is None else _block_unit(block, "weight_block_size")
    return EightBitSource("weight_scale_inv", (unit,))


def _read_compressed(table: Table) -> EightBitSource | None:
    if table.get("format") not in _FLOAT_FORMATS:
        return None
    _accept(table, "kv_cache_scheme", (None, {}))
    _accept(table, "transform_config", (None, {}))
    sparsity = table.get("sparsity_config") or {}
    if sparsity:
        _accept(sparsity, "format", ("dense",))
    groups = table.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise UnsupportedModelError(f"config field config_groups is {shown(groups)}, not a table", _HINT)
    units = [_group_unit(group) for group in groups.values()]
    return EightBitSource("weight_scale", tuple(dict.fromkeys(unit for unit in units if unit is not None)))


def _group_unit(group: Table) -> ScaleUnit | None:
    """The unit of a group's weights; None if it leaves them alone."""
    _accept(group, "format", (None, *_FLOAT_FORMATS))
    _accept(group, "output_activations", (None, {}))
    weights = group.get("weights")
    if weights is None:
        return None
    if not isinstance(weights, dict):
        raise UnsupportedModelError(f"config field weights is {shown(weights)}, not a table", _HINT)
    _accept(weights, "type", ("float",))
    _accept(weights, "num_bits", (8,))
    _accept(weights, "symmetric", (None, True))
    _accept(weights, "dynamic", (None, False))
    _accept(weights, "strategy", ("tensor", "channel", "block"))
    if weights["strategy"] == "block":
        return _block_unit(weights.get("block_structure"), "block_structure")
    return ScaleUnit(weights["strategy"])


def _accept(table: Table, name: str, values: tuple[Any, ...]) -> None:
    if table.get(name) not in values:
        raise UnsupportedModelError(
            f"the model is in 8 bits with {name} {shown(table.get(name))}, which is not supported", _HINT
        )


def _block_unit(block: object, name: str) -> ScaleUnit:
    sizes = block if isinstance(block, list) else []
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise UnsupportedModelError(f"config field {name} is {shown(block)}, not two sizes", _HINT)
    return ScaleUnit("block", (sizes[0], sizes[1]))


def take_scales(source: EightBitSource, found: Mapping[str, TensorEntry]) -> EightBitTensors:
    """Set the scales of a model's tensors apart, and check that each belongs to a matrix in 8 bits.

    Raises UnsupportedModelError: what is not supported, by its name.
    """
    matrices = {name: entry for name, entry in found.items() if entry.dtype == EIGHT_BIT_DTYPE}
    for name, entry in matrices.items():
        if not name.startswith(LAYERS_PREFIX) or len(entry.shape) != 2:
            raise UnsupportedModelError(
                f"{printable(name)} is stored in 8 bits, which is supported for the matrices of layers only",
                _HINT,
            )
    weights, scales, unused = dict(found), {}, 0
    for name in found:
        if name.endswith(_ZERO_POINTS):
            raise UnsupportedModelError(f"zero points of weights are not supported: {printable(name)}", _HINT)
        if name.endswith(_CACHE_SCALES):
            raise UnsupportedModelError(
                f"scales of a KV cache or of outputs in 8 bits are not supported: {printable(name)}", _HINT
            )
        if name.endswith(_ACTIVATION_SCALES):
            del weights[name]
            unused += 1
        elif name.endswith(f".{source.scale}"):
            matrix = name.removesuffix(source.scale) + "weight"
            if matrix not in matrices:
                raise UnsupportedModelError(
                    f"{printable(name)} is a scale, but no {printable(matrix)} in 8 bits is there", _HINT
                )
            scales[scale_name(matrix)] = replace(weights.pop(name), name=scale_name(matrix))
    units = {_checked_unit(source, matrix, scales.get(scale_name(name))) for name, matrix in matrices.items()}
    return EightBitTensors(weights, scales, _note(matrices, units, unused))


def _checked_unit(source: EightBitSource, matrix: TensorEntry, scale: TensorEntry | None) -> str:
    """The label of the unit that a matrix's scales belong to."""
    shown_name = printable(matrix.name)
    if scale is None:
        raise UnsupportedModelError(f"{shown_name} is stored in 8 bits, but without {source.scale}", _HINT)
    if scale.dtype not in _SCALE_DTYPES:
        named = " (ue8m0)" if scale.dtype in ("F8_E8M0", "U8") else ""
        raise UnsupportedModelError(
            f"the scales of {shown_name} are of type {scale.dtype}{named}, only F32 and BF16 are supported",
            _HINT,
        )
    for unit in source.units:
        if scale.shape in _scale_shapes(unit, matrix):
            return unit.label
    units = " or ".join(unit.label for unit in source.units) or "no unit"
    raise UnsupportedModelError(
        f"{shown_name} of shape {list(matrix.shape)} has scales of shape {list(scale.shape)}, which is not whole "
        f"units of {units}",
        _HINT,
    )


def _scale_shapes(unit: ScaleUnit, matrix: TensorEntry) -> Iterator[tuple[int, ...]]:
    """The shapes that scales may have. The library takes blocks as equal parts, so a ragged last one has none."""
    rows, columns = matrix.shape
    if unit.unit == "tensor":
        yield from ((), (1,), (1, 1))
    elif unit.unit == "channel":
        yield (rows, 1)
    elif unit.block is not None:
        sizes = tuple(zip((rows, columns), unit.block, strict=True))
        if all(size <= block or size % block == 0 for size, block in sizes):
            yield tuple(-(-size // block) for size, block in sizes)


def _note(matrices: Mapping[str, TensorEntry], units: set[str], unused: int) -> str:
    named = ", ".join(sorted(units))
    left = f"; {counted(unused, 'scale')} of activations left unused" if unused else ""
    return (
        f"the weights are in 8 bits: {len(matrices)} matrices in {EIGHT_BIT_DTYPE} with scales "
        f"by {named}, streamed as they are and used as BF16; activations stay in 16 bits{left}"
    )
