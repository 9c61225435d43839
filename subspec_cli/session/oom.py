"""Running out of memory as an error with figures and a hint, never as a traceback."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from subspec_cli.errors import ResourceError
from subspec_cli.streaming.memory_meter import MemoryMeter
from subspec_cli.units import format_bytes

_GPU_SIGNS: Final = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Texts of RuntimeErrors: libraries allocate past PyTorch's allocator, and these errors have no type of their own."""
_HOST_SIGNS: Final = ("can't allocate memory",)
_WANTED: Final = re.compile(r"tried to allocate ([\d.]+) ?(bytes|[KMGT]iB)", re.IGNORECASE)
_UNITS: Final = {"bytes": 0, "kib": 1, "mib": 2, "gib": 3, "tib": 4}


@contextmanager
def oom_as_error(doing: str, *, budget_bytes: int, meter: MemoryMeter) -> Iterator[None]:
    """Raise ResourceError if the code within runs out of memory, of the GPU or of the host."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        place = _place(error)
        if place is None:
            raise
        wanted = _wanted(error)
        raise ResourceError(
            f"out of {place} memory while {doing}{wanted}: "
            f"the budget is {format_bytes(budget_bytes)}, {format_bytes(meter.peak_bytes())} were taken at most",
            _hint(place),
        ) from error


def _place(error: BaseException) -> str | None:
    """Return whose memory is short; None if the error means something else."""
    text = str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError) or any(sign in text for sign in _GPU_SIGNS):
        return "device"
    if isinstance(error, MemoryError) or any(sign in text for sign in _HOST_SIGNS):
        return "host"
    return None


def _wanted(error: BaseException) -> str:
    found = _WANTED.search(str(error))
    if found is None:
        return ""
    size_bytes = float(found[1]) * 1024 ** _UNITS[found[2].lower()]
    return f" ({format_bytes(size_bytes)} more were wanted)"


def _hint(place: str) -> str:
    if place == "host":
        return "give a smaller --vram-gb or --context, or close what else takes memory"
    return "give a smaller --context, a larger --vram-gb if the GPU has it, or close what else uses the GPU"
