"""How much memory a device has, and how much this process takes beyond what it had at the start."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import torch

from subspec_cli.errors import ResourceError
from subspec_cli.streaming.host_memory import host_memory
from subspec_cli.streaming.memory_limit import kib_field
from subspec_cli.units import format_bytes

_STATUS: Final = Path("/proc/self/status")
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_IO: Final = Path("/proc/self/io")
_CLEAR_REFS: Final = Path("/proc/self/clear_refs")
_RESET_PEAK: Final = "5"


def total_bytes(device: torch.device) -> int:
    """Total memory of the device: the GPU's, or the host memory that this process may take."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return host_memory().limit_bytes


def available_bytes(device: torch.device) -> int:
    """Memory that could be allocated now: free on a GPU, available without swapping on the host."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return host_memory().free_bytes


def allocator_share(budget_bytes: int, context_bytes: int, device_bytes: int) -> float:
    """Share of a GPU that PyTorch's allocator may reserve, so that the whole process stays within its budget.

    The allocator's cap counts tensors only, so the bytes of the CUDA context are subtracted first. Raises
    ResourceError if nothing would be left.
    """
    if budget_bytes <= context_bytes:
        raise ResourceError(
            f"a budget of {format_bytes(budget_bytes)} is no more than the {format_bytes(context_bytes)} "
            "that CUDA takes for itself",
            f"--vram-gb {2 * context_bytes / (1 << 30):g} is the least that can hold anything",
        )
    return min(1.0, (budget_bytes - context_bytes) / device_bytes)


def return_freed_memory_at_once() -> None:
    """Make the C library return large freed blocks to the system instead of keeping them.

    glibc raises its thresholds as large blocks are allocated and freed. Memory that loading needed for a moment
    then stays in the resident set for good: a fifth of a small budget.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another C library, without this call
    mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    mallopt(_M_TRIM_THRESHOLD, 4 << 20)


def return_freed_memory_now() -> None:
    """Give memory that was freed in small pieces back to the system, where the C library knows how."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class MemoryMeter:
    """Memory taken since the meter was made: resident set on the CPU, the allocator's reserve on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bare_bytes = _status_bytes("VmRSS")
        """Host memory of the bare process: what its imports have taken."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            # Importing the libraries may have peaked above what stayed; that peak does not count.
            _CLEAR_REFS.write_text(_RESET_PEAK)
        except OSError:
            self.bare_bytes = max(self.bare_bytes, _status_bytes("VmHWM"))

    def leave_out(self, work: Callable[[], None]) -> None:
        """Count what `work` leaves in host memory with the bare process: libraries that are imported late."""
        before = _status_bytes("VmRSS")
        work()
        self.bare_bytes += max(0, _status_bytes("VmRSS") - before)

    def current_bytes(self) -> int:
        """Memory taken at present."""
        if self._device.type == "cuda":
            return int(torch.cuda.memory_reserved(self._device))
        return max(0, _status_bytes("VmRSS") - self.bare_bytes)

    def peak_bytes(self) -> int:
        """Most memory taken at any time."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_reserved(self._device))
        return max(0, self.process_peak_bytes() - self.bare_bytes)

    def process_peak_bytes(self) -> int:
        """Most host memory of the whole process at any time, the bare process included."""
        return _status_bytes("VmHWM")


def disk_read_bytes() -> int | None:
    """Bytes that storage has delivered for this process; None if the system does not report them.

    Reads from the page cache do not count, so this figure separates cold reads from warm ones.
    """
    try:
        lines = _IO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def _status_bytes(field: str) -> int:
    """Bytes of a `kB` field of /proc/self/status; 0 if there is no such file."""
    return kib_field(_STATUS, field)
