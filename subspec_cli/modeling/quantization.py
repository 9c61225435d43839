"""Quantizing the layers of a model into substitutes, and the error of it. The only module that imports quanto."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias
from unittest import mock

import torch
from torch import Tensor

from subspec_cli.checkpoint.layer_tensors import matrices_of
from subspec_cli.modeling.input_moments import InputMoments, MeasuredInputs, measured_name
from subspec_cli.modeling.substitute import pack_stored, unpack_codes
from subspec_cli.modeling.tuned_rounding import ErrorFeedback
from subspec_cli.substitutes.head_file import HEAD_BITS
from subspec_cli.substitutes.quality import MatrixQuality, OutputQuality, matrix_kind, rounded_power
from subspec_cli.substitutes.settings import SubstituteSettings, group_size_for

_POWER_ELEMENTS: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """The tensors to store for one layer, and how close they are to the original."""

    tensors: dict[str, Tensor]
    quality: dict[str, MatrixQuality]
    """By kind of matrix."""


@dataclass(frozen=True, slots=True)
class _QuantizedMatrix:
    """One matrix as it is stored, and its weights as `codes * scale - shift` to compute the error."""

    stored: dict[str, Tensor]
    codes: Tensor
    """`[groups, group]`, one code per byte."""
    scale: Tensor
    shift: Tensor | None

    def restore(self, rows: slice) -> Tensor:
        """Dequantize some groups to float32."""
        found = self.codes[rows].float() * self.scale[rows].float()
        return found if self.shift is None else found - self.shift[rows].float()


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What the inputs of a matrix ask of its rounding, and further inputs to check it with."""

    feedback: ErrorFeedback
    check: InputMoments


def quantize_layer(
    tensors: Mapping[str, Tensor],
    settings: SubstituteSettings,
    measured: Mapping[str, MeasuredInputs] | None = None,
) -> QuantizedLayer:
    """Quantize the matrices of one layer with quanto. The draft uses the target's norms and biases.

    `tensors` is by the name inside the layer. The optimizer, `minmax` or `hqq`, has no effect at 8 bits, where quanto
    scales by the largest magnitude. With `measured` inputs, by `measured_name`, a matrix of fewer bits is rounded for
    them too, and kept so if its outputs then err less.
    """
    inputs = {
        name: _Inputs(ErrorFeedback(item.fit), item.check)
        for name, item in (measured or {}).items()
        if item.fit.is_finite and item.check.is_finite
    }
    quantizers = {bits: _quantizer(bits, settings.optimizer) for bits in sorted(settings.widths)}
    stored: dict[str, Tensor] = {}
    quality = {}
    for name in matrices_of(tensors):
        original = tensors[name]
        if group_size_for(tuple(original.shape)) is None:
            weight = original.to(torch.bfloat16)
            stored[name] = weight
            quality[matrix_kind(name)] = _quality(original, [weight], weight.__getitem__)
            continue
        bits, known = settings.bits_of(name), inputs.get(measured_name(name.removesuffix(".weight")))
        made, quality[matrix_kind(name)] = _quantized(original, quantizers[bits], bits, known)
        stored |= {f"{name}.{part}": tensor for part, tensor in made.items()}
    return QuantizedLayer(stored, quality)


def quantize_head(rows: Tensor) -> tuple[dict[str, Tensor], MatrixQuality]:
    """Quantize rows of the head to 4 bits by the extremes of their groups.

    HQQ or smaller groups gain nothing: the head only picks the tokens that the 16-bit head scores.
    """
    return _quantized(rows, _quantizer(HEAD_BITS, "minmax"), HEAD_BITS, None)


_MatrixQuantizer: TypeAlias = Callable[[Tensor, int], _QuantizedMatrix]
"""From a matrix in bfloat16 and the group size."""


def _quantized(
    original: Tensor, quantizer: _MatrixQuantizer, bits: int, inputs: _Inputs | None
) -> tuple[dict[str, Tensor], MatrixQuality]:
    """The codes, scales and shifts of a matrix that a low-bit kernel takes."""
    group_size, weight, outputs = group_size_for(tuple(original.shape)), original.to(torch.bfloat16), None
    assert group_size is not None
    matrix = quantizer(weight, group_size)
    if bits < 8 and inputs is not None:
        matrix, outputs = _better_rounded(weight, matrix, inputs, bits)
    quality = _quality(original.reshape(matrix.codes.shape), matrix.stored.values(), matrix.restore)
    return matrix.stored, replace(quality, outputs=outputs)


def _quality(original: Tensor, stored: Iterable[Tensor], restore: Callable[[slice], Tensor]) -> MatrixQuality:
    return MatrixQuality(
        weights=original.numel(),
        stored_bytes=sum(tensor.nbytes for tensor in stored),
        signal=rounded_power(_difference_power(original, None)),
        noise=rounded_power(_difference_power(original, restore)),
    )


def _better_rounded(
    weight: Tensor, plain: _QuantizedMatrix, inputs: _Inputs, bits: int
) -> tuple[_QuantizedMatrix, OutputQuality]:
    """A matrix as quanto rounds it or as its inputs ask for, whichever errs less in its outputs."""
    found = inputs.feedback.round(weight, bits, plain.codes.shape[1])
    codes = found.codes.view(plain.codes.shape)
    scale, shift = found.grid.scale.view(-1, 1), found.grid.shift.view(-1, 1)
    stored = {"codes": pack_stored(codes, bits), "scale": scale, "shift": shift}
    tuned = _QuantizedMatrix(stored, codes, scale, shift)

    def error_power(matrix: _QuantizedMatrix) -> float:
        groups = weight.shape[1] // codes.shape[1]

        def errors(rows: slice) -> Tensor:
            restored = matrix.restore(slice(rows.start * groups, rows.stop * groups))
            return weight[rows].float() - restored.view(-1, weight.shape[1])

        return rounded_power(inputs.check.output_power(errors, len(weight)))

    outputs = OutputQuality(
        rows=inputs.check.rows,
        signal=rounded_power(inputs.check.output_power(lambda rows: weight[rows].float(), len(weight))),
        plain_noise=error_power(plain),
        tuned_noise=error_power(tuned),
    )
    return tuned if outputs.is_tuned else plain, outputs


def _difference_power(original: Tensor, restore: Callable[[slice], Tensor] | None) -> float:
    """Sum of squared differences (of squares, without `restore`) in float64, a few rows at a time."""
    step = max(1, _POWER_ELEMENTS // original.shape[1])
    total = 0.0
    for start in range(0, len(original), step):
        rows = slice(start, start + step)
        difference = original[rows].double()
        if restore is not None:
            difference -= restore(rows).double()
        total += float(difference.square().sum())
    return total


def _quantizer(bits: int, optimizer: str) -> _MatrixQuantizer:
    from optimum.quanto import (
        AbsmaxOptimizer,
        HqqOptimizer,
        MaxOptimizer,
        qint2,
        qint4,
        qint8,
        quantize_weight,
    )

    def to_8_bits(weight: Tensor, _group_size: int) -> _QuantizedMatrix:
        scale = AbsmaxOptimizer()(weight, qint8, axis=0)
        quantized: Any = quantize_weight(weight, qint8, 0, scale, optimized=False)
        codes, scale = quantized._data, quantized._scale
        return _QuantizedMatrix({"codes": codes, "scale": scale}, codes, scale, None)

    def to_low_bits(weight: Tensor, group_size: int) -> _QuantizedMatrix:
        qtype = {2: qint2, 4: qint4}[bits]
        search = HqqOptimizer() if optimizer == "hqq" else MaxOptimizer()
        with _unpacking_without_compiler():
            scale, shift = search(weight, qtype, axis=0, group_size=group_size)
        quantized: Any = quantize_weight(weight, qtype, 0, scale, shift, group_size, optimized=False)
        packed, scale, shift = quantized._data._data, quantized._scale, quantized._shift
        stored = {"codes": packed, "scale": scale, "shift": shift}
        return _QuantizedMatrix(stored, unpack_codes(packed, bits)[: len(scale)], scale, shift)

    return to_8_bits if bits == 8 else to_low_bits


@contextmanager
def _unpacking_without_compiler() -> Iterator[None]:
    """Replace quanto's unpacking, a C++ extension compiled at first use: not every machine has a compiler."""
    from optimum.quanto.tensor.packed import PackedTensor

    def unpack(self: Any) -> Tensor:  # noqa: ANN401 - quanto has no types
        return unpack_codes(self._data, self._bits)[: self.shape[0]]

    with mock.patch.object(PackedTensor, "unpack", unpack):
        yield
