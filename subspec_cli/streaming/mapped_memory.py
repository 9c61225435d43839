"""Zero-copy views of pinned host memory: kernels read and write it in place."""

from __future__ import annotations

import torch
from torch import Tensor


def gpu_view(memory: Tensor, device: torch.device) -> Tensor:
    """A GPU tensor over pinned memory, which kernels access in place; on the CPU the tensor itself."""
    if device.type == "cpu":
        return memory
    found: Tensor = torch.as_tensor(_GpuArray(memory), device=device)
    return found.view(memory.dtype)


def shared_with_gpu(memory: Tensor, device: torch.device) -> Tensor:
    """A view of host data for the GPU; a copy to the GPU would queue behind the layer being streamed."""
    return memory if device.type == "cpu" else gpu_view(memory.pin_memory(), device)


class _GpuArray:
    """Pinned memory under the CUDA array interface: host and GPU use the same addresses."""

    def __init__(self, memory: Tensor) -> None:
        assert memory.is_contiguous()
        self._memory = memory  # kept alive as long as the view
        octets = memory.view(torch.uint8)
        self.__cuda_array_interface__ = {
            "shape": tuple(octets.shape),
            "typestr": "|u1",
            "data": (memory.data_ptr(), False),
            "version": 3,
        }
