"""What the operating system reports without any library: host memory, and whether there is a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_MEMORY: Final = Path("/proc/meminfo")
_DRIVER: Final = Path("/proc/driver/nvidia/version")
_WINDOWS_DRIVER: Final = Path("/dev/dxg")
"""Under WSL2 the GPU comes from Windows, and there is no Linux driver."""
_ORDINARY_BYTES: Final = 8 << 30
"""Assumed outside Linux: an ordinary laptop."""


def host_total_bytes() -> int:
    """Total memory of the host."""
    return kib_field(_MEMORY, "MemTotal") or _ORDINARY_BYTES


def host_available_bytes() -> int:
    """Host memory that could be allocated now without making the system swap."""
    return kib_field(_MEMORY, "MemAvailable") or _ORDINARY_BYTES


def has_gpu() -> bool:
    """Whether a CUDA driver is loaded and not hidden; only torch can say whether it works."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return _DRIVER.exists() or _WINDOWS_DRIVER.exists()


def kib_field(path: Path, field: str) -> int:
    """Bytes of a `kB` field in a file under /proc; 0 if there is no such file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)
