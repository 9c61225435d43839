"""Substitutes: low-bit copies of decoder layers, loaded and applied; `quantization` makes them.

On disk a matrix has quanto's generic packing (grouped along the input, two or four values per byte along the
first dimension of the grouped matrix), which no kernel uses. In memory it has the layout of torch's own low-bit
kernels, which are called directly: `run` never imports quanto, whose import costs seconds at the start and whose
tensor subclass costs 0.1 ms per linear.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec_cli.checkpoint.layer_description import Activation
from subspec_cli.modeling.decoder import DraftLogits, Head
from subspec_cli.modeling.int4_product import Int4Product, int4_product
from subspec_cli.modeling.layers import LayerMath
from subspec_cli.modeling.row_rules import activate_
from subspec_cli.substitutes.head_file import HEAD_BITS
from subspec_cli.substitutes.settings import SubstituteSettings, group_size_for

_INNER_K_TILES: Final = 2
_PACK_ROWS: Final = 512
_PACK_BLOCK: Final = 64
"""A multiple of the rows that a kernel's layout keeps together."""
_TABLE_ELEMENTS: Final = 1 << 19
"""Elements of a table that are quantized at a time."""


class Linear(Protocol):
    """A projection of the draft from `[N, in]` to `[N, out]`, in the model's dtype."""

    def __call__(self, inputs: Tensor) -> Tensor:
        """Apply."""
        ...


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """An unquantized matrix: of a resident layer, or of a shape that no low-bit kernel takes."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, inputs: Tensor) -> Tensor:
        """Apply."""
        return F.linear(inputs.to(self.weight.dtype), self.weight, self.bias).to(inputs.dtype)


@dataclass(frozen=True, slots=True)
class Int4Linear:
    """A 4-bit matrix as torch packs it, and the kernel that multiplies bfloat16 rows with it."""

    packed: Tensor
    scales_and_zeros: Tensor
    """`[in / group, out, 2]` bfloat16: weight = (code - 8) * scale + zero."""
    group_size: int
    bias: Tensor | None
    product: Int4Product

    def __call__(self, inputs: Tensor) -> Tensor:
        """Apply."""
        if inputs.dtype is torch.bfloat16:
            output = self.product(inputs, self.packed, self.group_size, self.scales_and_zeros)
        else:
            rows = inputs.to(torch.bfloat16)
            output = self.product(rows, self.packed, self.group_size, self.scales_and_zeros).to(inputs.dtype)
        return output if self.bias is None else output.add_(self.bias)


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """An 8-bit matrix with one scale per output feature."""

    codes: Tensor
    """`[out, in]` int8."""
    scales: Tensor
    """`[out]` bfloat16."""
    bias: Tensor | None

    def __call__(self, inputs: Tensor) -> Tensor:
        """Apply."""
        rows = inputs.to(torch.bfloat16)
        if rows.device.type == "cpu":
            output = torch._weight_int8pack_mm(rows, self.codes, self.scales)
        else:
            output = F.linear(rows, self.codes.to(torch.bfloat16)) * self.scales
        output = output.to(inputs.dtype)
        return output if self.bias is None else output.add_(self.bias)


@dataclass(frozen=True, slots=True)
class LowBitHead:
    """A 4-bit vocabulary head for the draft: a draft step reads a quarter of the bytes.

    It finds the candidate tokens. Their logits are then computed by the 16-bit head, which is in memory for the
    target.
    """

    head: Head
    """The 16-bit head."""
    project: Int4Linear

    def guess(self, hidden: Tensor) -> DraftLogits:
        """Approximate logits `[N, V]` of `[N, hidden]` rows, with the inputs to rescore a few of them."""
        output = self.head.output
        normed = output.normed(hidden)
        return DraftLogits(output.finished(self.project(normed)), normed, self.head)


@dataclass(frozen=True, slots=True)
class SubstituteLayer:
    """A layer of the draft; projections with the same input are fused into one matrix."""

    qkv_proj: tuple[Linear, ...]
    """One fused projection, or three for query, key and value."""
    o_proj: Linear
    gate_up_proj: tuple[Linear, ...]
    down_proj: Linear
    activation: Activation

    def qkv(self, inputs: Tensor) -> Tensor:
        """Query, key and value rows, concatenated: `[N, (H + 2 K) * D]`."""
        if len(self.qkv_proj) == 1:
            return self.qkv_proj[0](inputs)
        return torch.cat([project(inputs) for project in self.qkv_proj], dim=-1)

    def attention_output(self, inputs: Tensor) -> Tensor:
        """`[N, H * D]` to `[N, hidden]`."""
        return self.o_proj(inputs)

    def feed_forward(self, inputs: Tensor) -> Tensor:
        """`[N, hidden]` to `[N, hidden]`."""
        if len(self.gate_up_proj) == 1:
            gate, up = self.gate_up_proj[0](inputs).chunk(2, dim=-1)
        else:
            gate, up = (project(inputs) for project in self.gate_up_proj)
        return self.down_proj(torch.mul(activate_(self.activation, gate), up))


def resident_layer(math_: LayerMath, layer: int, matrices: Mapping[str, Tensor]) -> SubstituteLayer:
    """A draft layer over the matrices of a resident layer, which it shares with the target."""

    def plain(name: str) -> PlainLinear:
        return PlainLinear(matrices[f"{name}.weight"], math_.bias(layer, name))

    inward, outward = _mixer_names(math_, layer)
    return SubstituteLayer(
        tuple(plain(name) for name in inward),
        plain(outward),
        (plain("mlp.gate_proj"), plain("mlp.up_proj")),
        plain("mlp.down_proj"),
        math_.geometry.arithmetic.activation,
    )


def _mixer_names(math_: LayerMath, layer: int) -> tuple[tuple[str, ...], str]:
    """The projections into a layer's attention, or what is in its place, and the one out of it."""
    if layer in math_.delta_layers:
        return ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), "linear_attn.out_proj"
    names = "qk" if math_.shape(layer).value_is_key else "qkv"
    return tuple(f"self_attn.{name}_proj" for name in names), "self_attn.o_proj"


def load_substitute(
    math_: LayerMath,
    layer: int,
    stored: Mapping[str, Tensor],
    settings: SubstituteSettings,
    device: torch.device,
) -> SubstituteLayer:
    """Make a draft layer from the stored tensors of `quantization.quantize_layer`, in the kernels' layout."""
    shapes = math_.geometry.layer_shapes(layer)

    def fused(*names: str) -> tuple[Linear, ...]:
        parts = [
            _read_matrix(stored, f"{name}.weight", shapes[f"{name}.weight"], settings.bits_of(name))
            for name in names
        ]
        biases = [math_.bias(layer, name) for name in names]
        if len({(part.bits, part.group_size) for part in parts}) > 1:
            return tuple(_linear([p], [b], device) for p, b in zip(parts, biases, strict=True))
        return (_linear(parts, biases, device),)

    inward, outward = _mixer_names(math_, layer)
    return SubstituteLayer(
        fused(*inward),
        fused(outward)[0],
        fused("mlp.gate_proj", "mlp.up_proj"),
        fused("mlp.down_proj")[0],
        math_.geometry.arithmetic.activation,
    )


def fused_projections(
    math_: LayerMath, layer: int, substitute: SubstituteLayer
) -> list[tuple[tuple[str, ...], tuple[Linear, ...]]]:
    """The matrices of a layer by the projections that hold them: one for all in their order, or one for each."""
    inward, outward = _mixer_names(math_, layer)
    return [
        (inward, substitute.qkv_proj),
        ((outward,), (substitute.o_proj,)),
        (("mlp.gate_proj", "mlp.up_proj"), substitute.gate_up_proj),
        (("mlp.down_proj",), (substitute.down_proj,)),
    ]


def kernel_codes(
    stored: Mapping[str, Tensor], name: str, shape: tuple[int, ...], bits: int
) -> tuple[Tensor, Tensor]:
    """Codes `[out, in]`, and scales and zeros `[in / group, out, 2]`, of one stored matrix, for the kernel."""
    return _kernel_layout(_read_matrix(stored, name, shape, bits))


@dataclass(frozen=True, slots=True)
class _StoredMatrix:
    """One matrix as it is stored on disk: plain, or codes with scales."""

    data: Tensor
    """Plain `[out, in]`; 8-bit codes `[out, in]` int8; packed codes `[groups / values per byte, group]` uint8."""
    shape: tuple[int, ...]
    bits: int
    scale: Tensor | None = None
    shift: Tensor | None = None

    @property
    def group_size(self) -> int:
        """Input features per scale; 0 for a plain matrix."""
        if self.scale is None:
            return 0
        return math.prod(self.shape) // self.scale.numel()


def _read_matrix(stored: Mapping[str, Tensor], name: str, shape: tuple[int, ...], bits: int) -> _StoredMatrix:
    if name in stored:
        return _StoredMatrix(stored[name], shape, 16)
    scale, shift = stored[f"{name}.scale"], stored.get(f"{name}.shift")
    return _StoredMatrix(stored[f"{name}.codes"], shape, bits, scale, shift)


def _linear(parts: list[_StoredMatrix], biases: list[Tensor | None], device: torch.device) -> Linear:
    given = [bias for bias in biases if bias is not None]
    bias = torch.cat(given) if given else None
    if parts[0].scale is None:
        weight = torch.cat([part.data for part in parts]).to(device)
        return PlainLinear(weight, None if bias is None else bias.to(weight.dtype))
    if parts[0].bits == 8:
        scales = torch.cat([part.scale.flatten() for part in parts if part.scale is not None])
        return Int8Linear(torch.cat([part.data for part in parts]).to(device), scales.to(device), bias)
    codes, pairs = zip(*(_kernel_layout(part) for part in parts), strict=True)
    scales_and_zeros = torch.cat(pairs, dim=1).contiguous().to(device)
    product = int4_product(device, scales_and_zeros.shape[1])
    packed = pack_codes(torch.cat(codes).to(device))
    return Int4Linear(packed, scales_and_zeros, parts[0].group_size, bias, product)


def _kernel_layout(part: _StoredMatrix) -> tuple[Tensor, Tensor]:
    """Codes `[out, in]` and scales and zeros `[in / group, out, 2]` of one stored matrix.

    Stored: weight = code * scale - shift. The kernel: weight = (code - 8) * scale + zero. 2-bit codes are raised
    by 6, to the middle of the kernel's range, where rounding the zero loses least.
    """
    assert part.scale is not None
    assert part.shift is not None
    middle = 2 ** (part.bits - 1)
    # In place: these codes are the largest temporary of loading, twice the size of what is stored.
    codes = unpack_codes(part.data, part.bits)[: part.scale.numel()].reshape(part.shape).add_(8 - middle)
    zeros = middle * part.scale.float() - part.shift.float()
    pairs = torch.stack((part.scale.flatten().float(), zeros.flatten()), dim=-1).to(torch.bfloat16)
    return codes, pairs.view(part.shape[0], -1, 2).transpose(0, 1)


def low_bit_table(weight: Tensor) -> Int4Linear | None:
    """Quantize a table `[V, hidden]` to 4 bits by the extremes of its groups; None if no kernel takes its shape.

    Works on a few rows at a time, so that it needs hardly more memory than the result.
    """
    group_size = group_size_for(tuple(weight.shape))
    if group_size is None:
        return None
    hidden = weight.shape[1]

    def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
        groups = rows.float().view(len(rows), -1, group_size)
        low, high = groups.amin(-1), groups.amax(-1)
        scale = ((high - low) / 15).clamp_min(torch.finfo(torch.bfloat16).tiny)
        # The kernel computes weight = (code - 8) * scale + zero.
        codes = ((groups - low[..., None]) / scale[..., None]).round_().to(torch.uint8).view(rows.shape)
        return codes, torch.stack((scale, low + 8 * scale), dim=-1).transpose(0, 1)

    pieces = weight.split(max(1, _TABLE_ELEMENTS // hidden // _PACK_BLOCK) * _PACK_BLOCK)
    return _joined(map(quantized, pieces), weight.shape, group_size, weight.device)


def load_table(
    pieces: Iterable[Mapping[str, Tensor]], shape: tuple[int, int], device: torch.device
) -> Int4Linear:
    """Bring a stored table `[V, hidden]` into the kernel's layout, piece by piece: it is in memory only once.

    `pieces` are those of `substitutes.head_file.read_head`.
    """
    group_size = group_size_for(shape)
    assert group_size is not None

    def unpacked(piece: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        rows = piece["scale"].numel() * group_size // shape[1]
        stored = _StoredMatrix(
            piece["codes"], (rows, shape[1]), HEAD_BITS, scale=piece["scale"], shift=piece["shift"]
        )
        return _kernel_layout(stored)

    return _joined(map(unpacked, pieces), shape, group_size, device)


def _joined(
    pieces: Iterable[tuple[Tensor, Tensor]], shape: tuple[int, ...], group_size: int, device: torch.device
) -> Int4Linear:
    """One packed matrix from the codes, scales and zeros of a few rows after others."""
    vocab, hidden = shape
    scales_and_zeros = torch.empty((hidden // group_size, vocab, 2), dtype=torch.bfloat16, device=device)
    packed, done = torch.empty(0), 0
    for codes, pairs in pieces:
        scales_and_zeros[:, done : done + len(codes)] = pairs
        # A packed table is a sequence of packed pieces; its first dimension counts rows or blocks of rows.
        piece = pack_codes(codes.to(device))
        if not done:
            packed = piece.new_empty((len(piece) * vocab // len(codes), *piece.shape[1:]))
        first = done * len(packed) // vocab
        packed[first : first + len(piece)] = piece
        done += len(codes)
    return Int4Linear(packed, scales_and_zeros, group_size, None, int4_product(packed.device, vocab))


def dummy_substitute(name: str, shape: tuple[int, ...], bits: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Stored tensors of a matrix in the right shapes, with meaningless values: for timing."""
    group_size, elements = group_size_for(shape), math.prod(shape)
    if group_size is None:
        return {name: torch.ones(shape, dtype=dtype)}
    if bits == 8:
        codes = torch.ones(shape, dtype=torch.int8)
        return {f"{name}.codes": codes, f"{name}.scale": torch.ones((shape[0], 1), dtype=torch.bfloat16)}
    scale = torch.ones((elements // group_size, 1), dtype=torch.bfloat16)
    codes = torch.ones((elements // group_size * bits // 8, group_size), dtype=torch.uint8)
    return {f"{name}.codes": codes, f"{name}.scale": scale, f"{name}.shift": scale}


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Undo quanto's packing: byte row i holds rows i, i + n, i + 2n, ..., from the lowest bits up."""
    mask = 2**bits - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)])


def pack_stored(codes: Tensor, bits: int) -> Tensor:
    """Pack codes `[groups, group]` uint8 as quanto does."""
    parts = codes.chunk(8 // bits)
    packed = torch.zeros_like(parts[0])
    for number, part in enumerate(parts):
        packed[: len(part)] |= part << (number * bits)
    return packed


def pack_codes(codes: Tensor) -> Tensor:
    """Pack codes `[out, in]` uint8 in 0..15 into the layout of torch's int4 kernel on the tensor's device."""
    if codes.device.type != "cpu":
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
        return torch._convert_weight_to_int4pack(pairs, _INNER_K_TILES)
    # The op needs int32. The layout is a sequence of row blocks, so packing a few rows at a time saves memory.
    parts = [
        torch._convert_weight_to_int4pack_for_cpu(rows.int(), _INNER_K_TILES)
        for rows in codes.split(_PACK_ROWS)
    ]
    return torch.cat(parts)
