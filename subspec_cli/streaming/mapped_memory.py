"""Pinned host memory as the GPU sees it: kernels read and write it where it lies."""

from __future__ import annotations

import torch
from torch import Tensor


def gpu_view(memory: Tensor, device: torch.device) -> Tensor:
    """Pinned memory as a tensor of the GPU, whose kernels read it where it lies; on the CPU it is one already."""
    if device.type == "cpu":
        return memory
    found: Tensor = torch.as_tensor(_GpuArray(memory), device=device)
    return found.view(memory.dtype)


def shared_with_gpu(memory: Tensor, device: torch.device) -> Tensor:
    """Host memory as the GPU reads it, without a copy that would stand in line behind a streamed layer."""
    return memory if device.type == "cpu" else gpu_view(memory.pin_memory(), device)


class _GpuArray:
    """Pinned memory for whoever takes arrays of a GPU: host and GPU share its addresses."""

    def __init__(self, memory: Tensor) -> None:
        assert memory.is_contiguous()
        self._memory = memory  # lives as long as the view
        octets = memory.view(torch.uint8)
        self.__cuda_array_interface__ = {
            "shape": tuple(octets.shape),
            "typestr": "|u1",
            "data": (memory.data_ptr(), False),
            "version": 3,
        }
