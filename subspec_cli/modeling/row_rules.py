"""Row rules: padding and call sizes under which the bits of a row do not depend on the rows beside it.

Shapes: `P` rows with padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec_cli.checkpoint.layer_description import Activation
from subspec_cli.limits import ROW_SIZES

ROW_BLOCKS: Final = (2, 4, 8, 16, 32, 64)
"""Sizes to whose multiples rows may be padded."""
CPU_CALL_ROWS: Final = (32, 64)
"""Fixed rows of a product on CPUs whose kernels change with the row count, as with AMX tiles: 32 rows take about
half as long as 64, and 16 two thirds of 32."""
GPU_CALL_ROWS: Final = 64
"""Fixed rows of a product off the CPU, where kernels change with the shape."""
_TRIED_ROWS: Final = (8, 16, 64, 192)
_TRIED_FEATURES: Final = 1024
_SERIAL_ELEMENTS: Final = 32_768
"""Elementwise kernels run on one thread below this many elements (torch's grain size)."""
_FEW_ELEMENTS: Final = 4 * _SERIAL_ELEMENTS
"""Elements for which no second thread is woken: it would wait for a core longer than the whole work takes."""


@dataclass(frozen=True, slots=True)
class RowRules:
    """The rules under which rows are batch-invariant; the self-check finds them, they are never assumed."""

    row_block: int
    """Rows are padded to multiples of this."""
    fixed_rows: bool = False
    """Whether linears run in calls of exactly `row_block` rows (CUDA) instead of any multiple (CPU)."""
    tile_elementwise: bool = False
    """Whether the activation runs in tiles too small to be split among threads."""

    def padded(self, rows: int) -> int:
        """Rows after padding: one of a few sizes, since kernels keep code and scratch memory for each size."""
        if rows > ROW_SIZES[-1]:
            return -(-rows // ROW_SIZES[-1]) * ROW_SIZES[-1]
        sizes = (self.row_block, *ROW_SIZES)
        return next(size for size in sizes if size >= rows and size % self.row_block == 0)

    def linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`inputs [P, in] @ weight [out, in].T + bias` with batch-invariant rows; P must be padded."""
        if not self.fixed_rows or inputs.shape[0] == self.row_block:
            return F.linear(inputs, weight, bias)
        return torch.cat([F.linear(part, weight, bias) for part in inputs.split(self.row_block)])

    def gated(self, activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
        """Activation of the gate, times `up`, `[P, feed_forward]`; overwrites `gate`."""
        if not self.tile_elementwise:
            return activate_(activation, gate).mul_(up)
        tile = max(1, (_SERIAL_ELEMENTS - 1) // gate.shape[1])
        for rows, other in zip(gate.split(tile), up.split(tile), strict=True):
            activate_(activation, rows).mul_(other)
        return gate


@torch.inference_mode()
def likely_rules(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> RowRules:
    """Return the rules that the self-check will probably find for `[out, in]` matrices, after a product of each."""
    if device.type != "cpu":
        return RowRules(GPU_CALL_ROWS, fixed_rows=True)
    draws = torch.Generator().manual_seed(0)
    for out, width in set(shapes):
        weight = torch.randn((min(out, _TRIED_FEATURES), width), dtype=dtype, generator=draws)
        rows = torch.randn((_TRIED_ROWS[-1], width), dtype=dtype, generator=draws)
        results = [F.linear(rows[:count], weight) for count in _TRIED_ROWS]
        if any(not torch.equal(results[0], found[: len(results[0])]) for found in results[1:]):
            return RowRules(CPU_CALL_ROWS[0], fixed_rows=True)
    return RowRules(ROW_BLOCKS[0])


@contextmanager
def serial(elements: int) -> Iterator[None]:
    """Run elementwise work on one thread, if its tensors have few elements.

    A pass has some dozens of such operations a layer, and a core that reads weights meanwhile is not there at once.
    """
    threads = torch.get_num_threads()
    if threads == 1 or elements > _FEW_ELEMENTS:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def sigmoid(rows: Tensor) -> Tensor:
    """Sigmoid of float32 rows, written out: the library's own call feels the row count."""
    return 1.0 / (1.0 + rows.neg().exp_())


def silu(rows: Tensor) -> Tensor:
    """SiLU of float32 rows, written out as `sigmoid`."""
    return rows / (1.0 + rows.neg().exp_())


def activate_(activation: Activation, gate: Tensor) -> Tensor:
    """Apply an activation in place."""
    if activation == "silu":
        return F.silu(gate, inplace=True)
    activated: Tensor = torch.ops.aten.gelu_(gate, approximate="tanh")
    return activated
