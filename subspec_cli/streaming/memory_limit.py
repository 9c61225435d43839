"""A limit of host memory, and how the kernel reports sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A limit of host memory: the machine's, or one that is set for a process or for a group of processes."""

    limit_bytes: int
    free_bytes: int
    """What may still be taken."""
    owner: str
    """Who allows no more, as the end of `a budget is more than ...`."""


def kib_field(path: Path, field: str) -> int:
    """Bytes of a `kB` field in a file under /proc; 0 if there is no such file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)
