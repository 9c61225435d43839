"""Whether a disk has enough free space for what is about to be written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from subspec_cli.errors import ResourceError
from subspec_cli.units import format_bytes, printable

PLACES_HINT: Final = "SUBSPEC_HOME for prepared models, HF_HOME for downloads"
DISK_FULL_HINT: Final = f"free disk space, or choose a larger disk: {PLACES_HINT}"


def check_free_space(directory: Path, need_bytes: int, what: str) -> None:
    """Refuse, before the first write, if the disk of `directory` has too little free space.

    Args:
        directory: where to write; it need not exist yet.
        need_bytes: the free space needed.
        what: subject of the error's sentence.

    Raises:
        ResourceError: with the bytes needed and free.
    """
    free_bytes = free_disk_bytes(directory)
    if free_bytes < need_bytes:
        raise ResourceError(
            f"{what} needs {format_bytes(need_bytes)} of disk, "
            f"{printable(str(directory))} has {format_bytes(free_bytes)} free",
            DISK_FULL_HINT,
        )


def on_one_disk(one: Path, other: Path) -> bool:
    """Whether two places share their free space. Neither need exist yet."""
    return _nearest_existing(one).stat().st_dev == _nearest_existing(other).stat().st_dev


def free_disk_bytes(path: Path) -> int:
    """Free bytes of the disk that holds `path`, which need not exist yet."""
    return shutil.disk_usage(_nearest_existing(path)).free


def _nearest_existing(path: Path) -> Path:
    while not os.path.exists(path) and path != path.parent:  # Path.exists raises on EACCES
        path = path.parent
    return path
