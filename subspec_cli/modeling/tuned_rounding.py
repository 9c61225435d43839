"""Low-bit codes that are rounded for a model's own inputs, in the format and the bytes of plain rounding.

Scales are fitted to the codes that they give, weighted by the power of each input. Then the features are rounded in
turn, the strongest first, and those still to come make good what rounding changes in the outputs (GPTQ, arXiv
2210.17323). All is computed with the values that the kernel will use, so nothing is rounded twice.
Shapes: `R` output features, `F` input features, `G` groups of `F`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from subspec_cli.checkpoint.layer_tensors import matrices_of
from subspec_cli.modeling.input_moments import MOMENT_BLOCK, InputMoments, block_sizes, measured_name

_DAMPING: Final = 1.0
"""Part of the mean power that is added to every feature's: the rows that were seen are few, and others will come."""
_LEAST_SCALE: Final = torch.finfo(torch.bfloat16).tiny
_FIT_ELEMENTS: Final = 1 << 17
_ROUND_ELEMENTS: Final = 1 << 23
"""Weights that are fitted, and rounded, at a time: they bound the memory."""
_LAZY_FEATURES: Final = 64
"""Features that are rounded before their errors reach those behind them."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Scale and shift of each group of a matrix, as they are stored, in bfloat16: weight = code * scale - shift."""

    scale: Tensor
    """`[R, G]`."""
    shift: Tensor
    """`[R, G]`."""

    def kernel_pairs(self, bits: int) -> tuple[Tensor, Tensor]:
        """Scale and zero as the kernel has them, in float32: weight = (code - middle) * scale + zero."""
        scale = self.scale.float()
        return scale, (2 ** (bits - 1) * scale - self.shift.float()).to(torch.bfloat16).float()


@dataclass(frozen=True, slots=True)
class RoundedMatrix:
    """A matrix in a few bits."""

    codes: Tensor
    """`[R, F]` uint8."""
    grid: Grid


def rounding_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Most memory for the moments and the rounding of a layer with these matrices, beside its weights."""
    names = {measured_name(name.removesuffix(".weight")) for name in matrices_of(shapes)}
    moments = sum(
        4 * size * size for name in names for size in block_sizes(shapes[f"{name}.weight"][1])
    )  # and as much for what is made of them, in float64 block by block
    return 3 * moments + 6 * 8 * MOMENT_BLOCK**2 + 3 * 4 * _ROUND_ELEMENTS


class ErrorFeedback:
    """What one set of inputs says about rounding: made once, used for every matrix with these inputs."""

    def __init__(self, moments: InputMoments) -> None:
        self._power = moments.power()
        parts = [_order_and_factor(total) for total in moments.sums]
        self._parts: Sequence[tuple[Tensor, Tensor]] = parts

    def round(self, weight: Tensor, bits: int, group_size: int) -> RoundedMatrix:
        """Round a matrix `[R, F]`."""
        grid = fitted_grid(weight, self._power, bits, group_size)
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        step = max(1, _ROUND_ELEMENTS // MOMENT_BLOCK)
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            scale, zero = (part[rows] for part in grid.kernel_pairs(bits))
            first = 0
            for order, factor in self._parts:
                features = slice(first, first + len(order))
                groups = slice(first // group_size, (first + len(order)) // group_size)
                codes[rows, features] = _round_block(
                    weight[rows, features].float(),
                    (scale[:, groups], zero[:, groups]),
                    (order, factor),
                    bits,
                )
                first += len(order)
        return RoundedMatrix(codes, grid)


def _order_and_factor(total: Tensor) -> tuple[Tensor, Tensor]:
    """The order of rounding of a block's features, and the upper Cholesky factor of the inverse of their moments."""
    wide = total.double()
    power = wide.diagonal()
    power += _DAMPING * power.mean() + torch.finfo(torch.float32).tiny
    order = torch.argsort(power, descending=True, stable=True)
    lower = torch.linalg.cholesky(wide[order][:, order])
    return order, torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()


def _round_block(
    weight: Tensor, pairs: tuple[Tensor, Tensor], ordered: tuple[Tensor, Tensor], bits: int
) -> Tensor:
    """Codes `[R, block]` of a block of features."""
    order, factor = ordered
    width, middle = len(order), 2 ** (bits - 1)
    group = order // (width // pairs[0].shape[1])
    # Features are rows here: each is read and written whole.
    left = weight.T[order].contiguous()
    scales, zeros = (part.T.contiguous() for part in pairs)
    codes = torch.empty(left.shape, dtype=torch.uint8)
    for start in range(0, width, _LAZY_FEATURES):
        end = min(width, start + _LAZY_FEATURES)
        errors = torch.empty(end - start, left.shape[1])
        for feature in range(start, end):
            scale, zero = scales[group[feature]], zeros[group[feature]]
            code = ((left[feature] - zero) / scale).round_().clamp_(-middle, middle - 1)
            codes[order[feature]] = (code + middle).to(torch.uint8)
            error = (left[feature] - torch.addcmul(zero, code, scale)).div_(factor[feature, feature])
            errors[feature - start] = error
            left[feature + 1 : end].addr_(factor[feature, feature + 1 : end], error, alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return codes.T


def fitted_grid(weight: Tensor, power: Tensor, bits: int, group_size: int) -> Grid:
    """The grid between a group's extremes, or the one that fits best with its codes, whichever errs less.

    The errors of each feature are weighed by `power [F]`. Works on some rows at a time.
    """
    rows = max(1, _FIT_ELEMENTS // weight.shape[1])
    found = [_fitted_rows(part.float(), power, bits, group_size) for part in weight.split(rows)]
    scale, shift = (torch.cat(part) for part in zip(*found, strict=True))
    return Grid(scale, shift)


def _fitted_rows(weight: Tensor, power: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    groups = weight.view(len(weight), -1, group_size)
    weighing = power.view(1, -1, group_size) + power.mean() * _DAMPING
    low, high = groups.amin(-1), groups.amax(-1)
    plain = _stored((high - low) / (2**bits - 1), -low)
    code, error = _coded(groups, plain, bits)
    fitted = _stored(*_least_squares(groups, code, weighing, bits))
    _, fitted_error = _coded(groups, fitted, bits)
    loss, fitted_loss = (part.square_().mul_(weighing).sum(-1) for part in (error, fitted_error))
    better = fitted_loss < loss
    return (
        torch.where(better, fitted.scale, plain.scale),
        torch.where(better, fitted.shift, plain.shift),
    )


def _stored(scale: Tensor, shift: Tensor) -> Grid:
    return Grid(scale.clamp_min(_LEAST_SCALE).bfloat16(), shift.bfloat16())


def _least_squares(groups: Tensor, code: Tensor, weighing: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and shift that fit the weights best with these codes."""
    total = weighing.sum(-1)
    weighed = code * weighing
    code_mean, mean = weighed.sum(-1) / total, (groups * weighing).sum(-1) / total
    spread = (weighed * code).sum(-1) - total * code_mean.square()
    scale = ((weighed * groups).sum(-1) - total * code_mean * mean) / spread.clamp_min(_LEAST_SCALE)
    # Stored: weight = (code + middle) * scale - shift.
    return scale, (2 ** (bits - 1) + code_mean) * scale - mean


def _coded(groups: Tensor, grid: Grid, bits: int) -> tuple[Tensor, Tensor]:
    """Codes around the middle, and what they miss."""
    middle = 2 ** (bits - 1)
    scale, zero = (part[..., None] for part in grid.kernel_pairs(bits))
    code = ((groups - zero) / scale).round_().clamp_(-middle, middle - 1)
    return code, torch.addcmul(zero, code, scale).sub_(groups)
