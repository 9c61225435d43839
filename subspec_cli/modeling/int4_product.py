"""The product of a few rows with a packed 4-bit matrix: torch's kernel, or a faster one where the CPU allows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from subspec_cli.checkpoint.row_ranges import threads_entry

Int4Product = Callable[[Tensor, Tensor, int, Tensor], Tensor]
"""From bfloat16 rows `[N, in]`, packed codes, group size and bfloat16 scales and zeros `[in / group, out, 2]` to
`[N, out]`; weight = (code - 8) * scale + zero."""
PACKED_OUTPUTS: Final = 64
"""Output features that torch packs together where it uses AVX512."""
_FARTHEST: Final = 0.05
"""Largest relative difference between two kernels. A wrong layout gives more than 1, activations in int8 0.01."""


@dataclass(frozen=True, slots=True)
class DotProduct:
    """Dot products of 8-bit activations with the codes as torch packs them, by compiled code on torch's threads."""

    multiply: Callable[..., None]
    threads_entry: int
    """See `row_ranges.threads_entry`."""
    thread_code: Any
    """The code that each thread runs; held, since its memory would be freed."""

    def __call__(self, rows: Tensor, packed: Tensor, group_size: int, scales_and_zeros: Tensor) -> Tensor:
        """Multiply, see `Int4Product`; `out` must be a multiple of 64."""
        rows = rows.contiguous()
        outputs = scales_and_zeros.shape[1]
        result = rows.new_empty((len(rows), outputs))
        self.multiply(
            rows.data_ptr(),
            (len(rows), rows.shape[1], outputs, group_size),
            packed.data_ptr(),
            scales_and_zeros.data_ptr(),
            result.data_ptr(),
            (self.threads_entry, self.thread_code.address, torch.get_num_threads()),
        )
        return result


def int4_product(device: torch.device, outputs: int) -> Int4Product:
    """Return the kernel for matrices with so many output features on a device."""
    if device.type != "cpu":
        product: Int4Product = torch._weight_int4pack_mm
        return product
    dots = dot_product() if outputs % PACKED_OUTPUTS == 0 else None
    return dots or torch._weight_int4pack_mm_for_cpu


@cache
def dot_product() -> DotProduct | None:
    """Compile the product of 8-bit dots; None without numba or the instructions, or if it differs from torch's."""
    try:
        from subspec_cli.modeling import int4_code
    except ImportError:  # numba is not installed
        return None
    entry = threads_entry()
    if entry is None or not int4_code.can_compile():
        return None
    multiply, thread_code = int4_code.compile_product()
    product = DotProduct(multiply, entry, thread_code)
    return product if _agrees(product) else None


def _agrees(product: Int4Product) -> bool:
    """Compare with torch's kernel: how torch packs codes is not documented and differs between CPUs."""
    draws = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (2 * PACKED_OUTPUTS, 64), dtype=torch.int32, generator=draws)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 2)
    scales_and_zeros = torch.rand((2, len(codes), 2), generator=draws).bfloat16()
    rows = torch.randn((5, codes.shape[1]), generator=draws).bfloat16()
    given = (rows, packed, 32, scales_and_zeros)
    expected = torch._weight_int4pack_mm_for_cpu(*given).float()
    return bool((product(*given).float() - expected).norm() < _FARTHEST * expected.norm())
