"""What the operating system reports without any library: host memory, and whether there is a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Final

from subspec_cli.streaming.cgroup import ROOT, cgroup_memory_limits
from subspec_cli.streaming.memory_limit import MemoryLimit, kib_field
from subspec_cli.streaming.process_limits import process_memory_limits

_DRIVER: Final = Path("/proc/driver/nvidia/version")
_WINDOWS_DRIVER: Final = Path("/dev/dxg")
"""Under WSL2 the GPU comes from Windows, and there is no Linux driver."""
_TOOL_S: Final = 3.0
_ORDINARY_BYTES: Final = 8 << 30
"""Assumed outside Linux: an ordinary laptop."""


def host_memory(root: Path = ROOT) -> MemoryLimit:
    """Return the host memory that this process may take at all, and what can be allocated now without swapping.

    That is the machine's memory, or what a container, a service or `ulimit` leaves of it. `root` is the directory
    that holds `proc` and the mounted control groups.
    """
    info = root / "proc/meminfo"
    total_bytes = kib_field(info, "MemTotal") or _ORDINARY_BYTES
    available_bytes = kib_field(info, "MemAvailable") or _ORDINARY_BYTES
    machine = MemoryLimit(total_bytes, available_bytes, "this machine has")
    limits = [machine, *cgroup_memory_limits(root), *process_memory_limits(root)]
    least = min(limits, key=lambda limit: limit.limit_bytes)
    return replace(least, free_bytes=min(limit.free_bytes for limit in limits))


def gpu_memory() -> tuple[int, int] | None:
    """Return total and free bytes of the GPU that would be used, as the driver's tool says; None if it does not."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    number = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
    query = [tool, "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits", f"--id={number}"]
    try:
        done = subprocess.run(query, capture_output=True, timeout=_TOOL_S, check=True)  # noqa: S603
        total, free = (int(word) << 20 for word in done.stdout.decode("ascii").split(","))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return total, free


def has_gpu() -> bool:
    """Whether a CUDA driver is loaded and not hidden; only torch can say whether it works."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return _DRIVER.exists() or _WINDOWS_DRIVER.exists()
