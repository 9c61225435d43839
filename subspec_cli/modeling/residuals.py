"""Residuals of layers: made from their substitutes and checked, and applied to the codes in the draft's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from subspec_cli.checkpoint.layer_tensors import matrices_of
from subspec_cli.checkpoint.packed_codes import CodedMatrix, PackedLayout, find_layout
from subspec_cli.checkpoint.residual import encode, is_exact, rebuild
from subspec_cli.checkpoint.residual_names import RESIDUAL_PARTS, parts_of
from subspec_cli.modeling.layers import LayerMath
from subspec_cli.modeling.substitute import (
    Int4Linear,
    SubstituteLayer,
    fused_projections,
    kernel_codes,
    pack_codes,
)
from subspec_cli.substitutes.settings import GROUP_SIZES, SubstituteSettings, group_size_for

_BITS = 4


def residuals_of_layer(
    weights: Mapping[str, Tensor], stored: Mapping[str, Tensor], settings: SubstituteSettings
) -> dict[str, Tensor]:
    """The residuals of a layer's bfloat16 matrices over their stored 4-bit codes, in the order of use.

    A matrix whose residual would not be smaller, or whose substitute is not 4-bit, has none.
    """
    made: dict[str, Tensor] = {}
    for name in matrices_of(weights):
        if settings.bits_of(name) != _BITS or f"{name}.codes" not in stored:
            continue
        found = encode(weights[name], *kernel_codes(stored, name, tuple(weights[name].shape), _BITS))
        if found is not None:
            made |= {f"{name}.{part}": found[part] for part in RESIDUAL_PARTS}
    return made


def differing_matrix(
    residuals: Mapping[str, Tensor], weights: Mapping[str, Tensor], stored: Mapping[str, Tensor]
) -> str | None:
    """The first matrix that its residual does not give bit for bit; None if all are exact."""
    for name in matrices_of(weights):
        if parts_of(name)[0] not in residuals:
            continue
        found = {part: residuals[f"{name}.{part}"] for part in RESIDUAL_PARTS}
        if not is_exact(found, weights[name], *kernel_codes(stored, name, tuple(weights[name].shape), _BITS)):
            return name
    return None


def compile_rebuilding(device: torch.device) -> None:
    """Import and compile what rebuilds weights, so that no pass waits for it."""
    found = dummy_residual((16, GROUP_SIZES[-1]), device)
    assert found is not None
    stored, coded = found
    rebuild(stored, coded, torch.empty(coded.shape, dtype=torch.bfloat16, device=device))


def dummy_residual(
    shape: tuple[int, int], device: torch.device
) -> tuple[dict[str, Tensor], CodedMatrix] | None:
    """A residual as those of trained models are, with one escape in twelve weights, and its codes: for timing.

    None if no 4-bit kernel takes the shape.
    """
    group_size = group_size_for(shape)
    if group_size is None:
        return None
    rows, columns = shape
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=random)
    pairs = torch.full((columns // group_size, rows, 2), 2.0**-6, dtype=torch.bfloat16)
    residuals = torch.randint(-127, 128, shape, dtype=torch.int8, generator=random)
    escaped = torch.rand(shape, generator=random) < 1 / 12
    residuals[escaped] = -128
    counts = escaped.sum(1)
    stored = {
        "starts": torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32),
        "residuals": residuals,
        "escapes": torch.zeros(int(counts.sum()), dtype=torch.int16),
    }
    layout = find_layout(pack_codes, rows, columns, device)
    coded = CodedMatrix(pack_codes(codes.to(device)), pairs.to(device), layout, 0, shape)
    return {name: tensor.to(device) for name, tensor in stored.items()}, coded


class CodedLayers:
    """Finds the codes of matrices in the kernels of the draft's layers."""

    def __init__(self, math_: LayerMath, device: torch.device) -> None:
        self._math = math_
        self._layout = cache(lambda rows, columns: find_layout(pack_codes, rows, columns, device))

    def of_layer(self, layer: int, substitute: SubstituteLayer) -> dict[str, CodedMatrix]:
        """The matrices of a layer that have 4-bit codes, by their names inside it."""
        shapes, found = self._math.geometry.layer_shapes(layer), {}
        for names, projections in fused_projections(self._math, layer, substitute):
            first_row = 0
            for number, name in enumerate(names):
                linear = projections[number if len(projections) > 1 else 0]
                if len(projections) > 1:
                    first_row = 0
                rows, columns = shapes[f"{name}.weight"]
                if isinstance(linear, Int4Linear):
                    packed_rows = linear.scales_and_zeros.shape[1]
                    layout: PackedLayout = self._layout(packed_rows, columns)
                    found[f"{name}.weight"] = CodedMatrix(
                        linear.packed, linear.scales_and_zeros, layout, first_row, (rows, columns)
                    )
                first_row += rows
        return found
