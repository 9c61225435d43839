"""The device that a session runs on, set up so that results are reproducible and the budget holds."""

from __future__ import annotations

import os

import torch

from subspec_cli.errors import UnsupportedModelError
from subspec_cli.planning.device_profile import device_profile
from subspec_cli.streaming.memory_meter import allocator_share, total_bytes


def open_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` takes a GPU if there is one.

    Raises UnsupportedModelError if `cuda` is asked for and cannot be used.
    """
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_gpu else "cpu"
    if name == "cuda":
        if not has_gpu:
            raise UnsupportedModelError(
                "no CUDA device can be used here", "--device cpu runs from disk and RAM"
            )
        _fix_cuda_arithmetic()
    return torch.device(name)


def cap_allocator(budget_bytes: int, device: torch.device) -> None:
    """Let PyTorch refuse to take more of a GPU than the budget; on the CPU the plan alone keeps it."""
    if device.type == "cuda":
        share = allocator_share(budget_bytes, device_profile(device.type).context_bytes, total_bytes(device))
        torch.cuda.set_per_process_memory_fraction(share, device)


def _fix_cuda_arithmetic() -> None:
    """Switch off, for the whole process, the shortcuts that make a row's bits depend on the chosen kernel."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
