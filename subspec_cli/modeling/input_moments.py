"""What the inputs of a layer's matrices are like: sums of their products over rows of the model's own text.

The error of a matrix counts where its inputs are large and where they move together. Shapes: `N` rows.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from subspec_cli.modeling.decoder import Block, TargetDecoder
from subspec_cli.modeling.target_flow import BatchFlow, Flow

MOMENT_BLOCK: Final = 1024
"""Features whose errors are weighed together: memory and time grow by this, not by the width of a matrix."""
_POWER_ELEMENTS: Final = 1 << 22
_SHARED: Final = {
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "linear_attn.in_proj_z": "linear_attn.in_proj_qkv",
    "mlp.up_proj": "mlp.gate_proj",
}
"""Matrices whose inputs are those of another."""


@dataclass(slots=True)
class InputMoments:
    """Sums of products of a matrix's inputs, in blocks of features along the diagonal, on the host in float32."""

    features: int
    rows: int = 0
    """Rows that were added."""
    sums: list[Tensor] = field(default_factory=list)
    """`[block, block]` each; the last block may be smaller."""

    def __post_init__(self) -> None:
        self.sums = [torch.zeros(size, size) for size in block_sizes(self.features)]

    def add(self, inputs: Tensor) -> None:
        """Add rows `[N, in]`."""
        self.rows += len(inputs)
        wide = inputs.to("cpu", torch.float32)
        for total, part in zip(self.sums, wide.split(MOMENT_BLOCK, dim=1), strict=True):
            total.addmm_(part.T, part)

    def output_power(self, weight: Callable[[slice], Tensor], outputs: int) -> float:
        """Power of what a matrix `[out, in]` makes of these inputs; `weight` gives some of its rows in float32."""
        total = 0.0
        for start in range(0, outputs, step := max(1, _POWER_ELEMENTS // self.features)):
            rows = weight(slice(start, start + step))
            for moments, part in zip(self.sums, rows.split(MOMENT_BLOCK, dim=1), strict=True):
                total += float(torch.sum((part @ moments).mul_(part), dtype=torch.float64))
        return total

    @property
    def is_finite(self) -> bool:
        """Whether no input overflowed."""
        return all(bool(total.isfinite().all()) for total in self.sums)

    def power(self) -> Tensor:
        """Mean square of each feature, `[in]`."""
        return torch.cat([total.diagonal() for total in self.sums]) / max(1, self.rows)


@dataclass(frozen=True, slots=True)
class MeasuredInputs:
    """The inputs of one matrix on two texts."""

    fit: InputMoments
    """What the matrix is rounded for."""
    check: InputMoments
    """What says whether that was of use."""


def block_sizes(features: int) -> list[int]:
    """Sizes of the blocks of a matrix with so many inputs."""
    return [min(MOMENT_BLOCK, features - start) for start in range(0, features, MOMENT_BLOCK)]


def measured_name(name: str) -> str:
    """The matrix whose moments stand for those of `name`; both without `.weight`."""
    return _SHARED.get(name, name)


class MeasuringTarget(TargetDecoder):
    """A target that adds up the inputs of the matrices of the layer that it runs."""

    _measured: dict[str, MeasuredInputs]
    _batch: BatchFlow
    _check: BatchFlow

    def measured(self, flow: Flow) -> Generator[tuple[int, Mapping[str, MeasuredInputs]], None, None]:
        """Run all layers; yield the number of each, once it is done, and its inputs by `measured_name`.

        The last batch of rows is the text for checks; one batch alone is both.
        """
        self._measured, self._check = {}, flow.batches[-1]
        is_one = len(flow.batches) == 1
        with closing(self.layers(flow)) as layers:
            for layer in layers:
                found, self._measured = self._measured, {}
                yield (
                    layer,
                    {n: MeasuredInputs(i.check, i.check) for n, i in found.items()} if is_one else found,
                )

    def run_block(self, block: Block, flow: BatchFlow) -> None:
        """Run one block of a layer for one batch."""
        self._batch = flow
        super().run_block(block, flow)

    def _project(self, block: Block, name: str, inputs: Tensor) -> Tensor:
        if measured_name(name) == name:
            if name not in self._measured:
                width = inputs.shape[1]
                self._measured[name] = MeasuredInputs(InputMoments(width), InputMoments(width))
            found = self._measured[name]
            moments = found.check if self._batch is self._check else found.fit
            moments.add(inputs[: self._batch.rows])  # without padding
        return super()._project(block, name, inputs)
