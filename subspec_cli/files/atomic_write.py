"""Atomic file writes: after a crash, a path holds either the old file or the new one."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from subspec_cli.errors import IntegrityError
from subspec_cli.files.io_errors import write_error
from subspec_cli.files.regular_file import FileState, file_state
from subspec_cli.files.temp_names import abandoned, is_temp_name, temp_path
from subspec_cli.units import printable

_WRITE_BYTES = 8 << 20  # a signal is handled between two writes of this size


def atomic_write(path: Path, data: bytes) -> FileState:
    """Replace `path` by a file that holds `data`, as `atomic_write_pieces` does."""
    return atomic_write_pieces(path, [data], len(data))


def atomic_write_pieces(path: Path, pieces: Iterable[bytes | memoryview], size_bytes: int) -> FileState:
    """Replace `path` by a file that holds all pieces: temporary name, fsync, rename, fsync of the directory.

    Returns the new file's state, by which a later replacement by another process can be told. A piece may be made
    while the others are written; `size_bytes`, the size of all, is for messages.

    The temporary file is removed on any failure, Ctrl-C included, and the old file stays.

    Raises:
        ResourceError: no space, quota, permission, read-only or faulty disk.
        IntegrityError: the temporary name is taken, which only a foreign process can have done.
    """
    temp = temp_path(path)
    # O_EXCL and O_NOFOLLOW: never write through a planted file or link. The kernel applies the umask to 0666,
    # so the umask need not be read here, which is only possible by setting it for all threads.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(temp, flags, 0o666)
    except FileExistsError as error:
        raise IntegrityError(f"{printable(str(temp))} is in the way", "remove it and try again") from error
    except OSError as error:
        raise write_error(error, path, size_bytes) from error
    try:
        try:
            for piece in pieces:
                _write_all(handle, piece)
            os.fsync(handle)
            state = file_state(os.fstat(handle))
        finally:
            os.close(handle)
        os.replace(temp, path)
        sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first failure is the one to report
            temp.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(error, path, size_bytes) from error
        raise
    return state


def remove_file(path: Path) -> None:
    """Remove a file if it is there. Raises ResourceError."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(error, path) from error


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power cut, where the system can."""
    if sys.platform == "win32":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep_stale_temps(directory: Path) -> None:
    """Remove temporary files of `atomic_write` whose process has ended. No lock is needed for it."""
    with contextlib.suppress(OSError):  # a leftover only takes space
        for path in abandoned(path for path in directory.iterdir() if is_temp_name(path.name)):
            path.unlink(missing_ok=True)


def _write_all(handle: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view[:_WRITE_BYTES]) :]
