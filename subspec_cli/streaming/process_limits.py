"""Limits of memory that `ulimit` sets for a process, and whether PyTorch can be loaded within them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from subspec_cli.errors import ResourceError
from subspec_cli.streaming.cgroup import ROOT
from subspec_cli.streaming.memory_limit import MemoryLimit, kib_field
from subspec_cli.streaming.processors import usable_processors
from subspec_cli.units import MIB, format_bytes

_STACK_BYTES: Final = 8 * MIB


class _Resource(NamedTuple):
    """A kind of limit. What libraries need of it was measured on two cores, and holds for that number of threads."""

    flag: str
    name: str
    field: str
    what: str
    libraries_bytes: int


_RESOURCES: Final = (
    # Measured: a run of the demo peaks at 973 MiB of address space and 339 MiB of data, 77 MiB of both for the model.
    _Resource("-v", "RLIMIT_AS", "VmSize", "address space", 1024 * MIB),
    _Resource("-d", "RLIMIT_DATA", "VmData", "memory for data", 384 * MIB),
)


def process_memory_limits(root: Path = ROOT) -> list[MemoryLimit]:
    """Return what the limits of this process leave beside the libraries; `root` is the directory of `proc`."""
    found = []
    for resource, limit_bytes in _limits():
        libraries_bytes = _libraries_bytes(resource)
        taken_bytes = max(libraries_bytes, kib_field(root / "proc/self/status", resource.field))
        owner = f"ulimit {resource.flag} {limit_bytes // 1024} leaves beside the libraries"
        found.append(
            MemoryLimit(max(0, limit_bytes - libraries_bytes), max(0, limit_bytes - taken_bytes), owner)
        )
    return found


def check_libraries_fit() -> None:
    """Raise ResourceError if PyTorch cannot be loaded within this process's limits. Some libraries would crash."""
    for resource, limit_bytes in _limits():
        need_bytes = _libraries_bytes(resource)
        if limit_bytes < need_bytes:
            raise ResourceError(
                f"not enough {resource.what} to load torch: ulimit {resource.flag} {limit_bytes // 1024} allows "
                f"{format_bytes(limit_bytes)}, libraries take {format_bytes(need_bytes)}",
                f"ulimit {resource.flag} unlimited, or {need_bytes // 1024} and what the model takes",
            )


def _libraries_bytes(resource: _Resource) -> int:
    return resource.libraries_bytes + max(0, usable_processors().threads - 2) * _STACK_BYTES


def _limits() -> Iterator[tuple[_Resource, int]]:
    """Yield the limits that are set, in bytes."""
    try:
        import resource
    except ImportError:  # Windows has none
        return
    for kind in _RESOURCES:
        limit_bytes = resource.getrlimit(getattr(resource, kind.name))[0]
        if limit_bytes != resource.RLIM_INFINITY:
            yield kind, limit_bytes
