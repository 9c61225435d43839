"""Errors for a file that cannot be written or read: the cause, the path, and what to do."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final

from subspec_cli.errors import IntegrityError, ResourceError
from subspec_cli.files.free_space import DISK_FULL_HINT, PLACES_HINT, free_disk_bytes
from subspec_cli.files.open_files import open_files_hint
from subspec_cli.units import format_bytes, printable

TOO_MANY_FILES: Final = frozenset((errno.EMFILE, errno.ENFILE))
_HINTS = {
    errno.ENOSPC: DISK_FULL_HINT,
    errno.EDQUOT: f"free some of your disk quota, or choose another disk: {PLACES_HINT}",
    errno.EIO: f"the disk reports a fault: check it, or choose another: {PLACES_HINT}",
}


def write_error(error: OSError, path: Path, need_bytes: int | None = None) -> ResourceError:
    """The error for a `path` that cannot be written: errno by name, the path, bytes needed and free."""
    figures = ""
    if need_bytes is not None:
        figures = f"; {format_bytes(need_bytes)} needed, {format_bytes(free_disk_bytes(path))} free"
    if error.errno in TOO_MANY_FILES:
        return ResourceError(f"cannot write {printable(str(path))}: {_reason(error)}", open_files_hint())
    return ResourceError(
        f"cannot write {printable(str(path))}: {_reason(error)}{figures}",
        _HINTS.get(error.errno or 0, f"choose a place that you can write: {PLACES_HINT}"),
    )


def read_error(error: OSError, path: Path) -> IntegrityError | ResourceError:
    """The error for a `path` that cannot be read; a missing file and a link to itself are IntegrityErrors."""
    text = f"cannot read {printable(str(path))}: {_reason(error)}"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        return IntegrityError(text, "put the file there, or fetch the model again")
    if error.errno in (errno.EACCES, errno.EPERM):
        return ResourceError(text, "run as a user who may read it, or make it readable")
    if error.errno in TOO_MANY_FILES:
        return ResourceError(text, open_files_hint())
    return ResourceError(text, "check the disk, then run the command again")


def _reason(error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, type(error).__name__)
    return f"{name} ({error.strerror or printable(str(error))})"
