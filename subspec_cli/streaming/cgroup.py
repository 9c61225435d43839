"""What the control groups (cgroups) of a container or a service allow this process: memory and processor time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from subspec_cli.streaming.memory_limit import MemoryLimit

ROOT: Final = Path("/")

Controller = Literal["memory", "cpu"]


def cgroup_memory_limits(root: Path = ROOT) -> list[MemoryLimit]:
    """Return the limits of this process's groups, from its own up to the outermost one that can be seen.

    The page cache of a group counts as free, because the kernel drops it on demand. `root` is the directory that
    holds `proc` and the mounted groups.
    """
    found = []
    for directory in _groups(root, "memory"):
        used_bytes = (
            _number(directory / "memory.current") or _number(directory / "memory.usage_in_bytes") or 0
        )
        taken_bytes = max(0, used_bytes - _page_cache_bytes(directory))
        # memory.high is no hard limit, but the kernel slows a group that passes it down to a crawl.
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limit_bytes = _number(directory / name)
            if limit_bytes is not None:
                owner = f"this container or service may take ({directory / name})"
                found.append(MemoryLimit(limit_bytes, max(0, limit_bytes - taken_bytes), owner))
    return found


def processor_quota(root: Path = ROOT) -> float | None:
    """Return how many processors' time this process's groups may take; None if there is no limit."""
    quotas = []
    for directory in _groups(root, "cpu"):
        with suppress(OSError, ValueError):
            limit, period = (directory / "cpu.max").read_text().split()
            if limit != "max":
                quotas.append(int(limit) / int(period))
        limit_us, period_us = (_number(directory / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if limit_us and period_us:
            quotas.append(limit_us / period_us)
    return min((quota for quota in quotas if quota > 0), default=None)


def _groups(root: Path, controller: Controller) -> Iterator[Path]:
    """Yield the directories of the groups that this process is in, innermost first, of both versions of cgroups."""
    inside = dict(_memberships(root))
    for version in ("", controller):  # version 2 has no names of controllers there
        mounts = [(top, place) for controllers, top, place in _mounts(root) if version in controllers]
        own = inside.get(version)
        if own is not None:
            seen = [found for top, place in mounts if (found := _seen(own, top, place)) is not None]
            # A container may see its own group as the root, and a name from outside.
            for place, directory in seen or [(place, place) for _, place in mounts]:
                yield from (directory, *directory.parents)[: len(directory.relative_to(place).parts) + 1]


def _seen(group: PurePosixPath, top: PurePosixPath, place: Path) -> tuple[Path, Path] | None:
    """Return a mount and a group's directory in it; None if the group cannot be seen there."""
    if ".." in group.parts or not group.is_relative_to(top):
        return None
    directory = place / group.relative_to(top)
    return (place, directory) if directory.is_dir() else None


def _memberships(root: Path) -> Iterator[tuple[str, PurePosixPath]]:
    """Yield controller and group of each line of /proc/self/cgroup; version 2 has the controller ''."""
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number.isdecimal() and group.startswith("/"):
            for controller in controllers.split(","):
                yield controller, PurePosixPath(group)


def _mounts(root: Path) -> Iterator[tuple[set[str], PurePosixPath, Path]]:
    """Yield controllers ('' in version 2), the mounted group and the place of each mount of cgroups."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) > 4 and len(kind) > 2 and kind[0] in ("cgroup", "cgroup2"):
            top, place = (PurePosixPath(_unescaped(field)) for field in fields[3:5])
            controllers = set(kind[2].split(",")) if kind[0] == "cgroup" else {""}
            yield controllers, top, root / place.relative_to("/")


def _page_cache_bytes(directory: Path) -> int:
    """Return the page cache of a group and the groups below it."""
    values = dict(line.split() for line in _lines(directory / "memory.stat") if len(line.split()) == 2)
    # Version 1 counts the groups below it under other names.
    return sum(
        int(values.get(f"total_{name}", values.get(name, 0))) for name in ("inactive_file", "active_file")
    )


def _number(path: Path) -> int | None:
    """Return a whole number from a file; None if there is no such file, or no number in it, such as `max`."""
    try:
        value = int(path.read_text())
    except (OSError, ValueError):
        return None
    return value if value >= 0 else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _unescaped(field: str) -> str:
    return field.replace("\\040", " ")
