"""Reading regular files. Pipes, sockets and devices are refused, so no read can hang."""

from __future__ import annotations

import hashlib
import os
import stat
from io import FileIO
from pathlib import Path
from typing import TypeAlias

from subspec_cli.errors import IntegrityError
from subspec_cli.files.io_errors import read_error
from subspec_cli.units import format_bytes, printable

FileState: TypeAlias = tuple[int, int, int]
"""Inode, size in bytes and modification time in ns."""

_FILE_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def open_regular(path: Path) -> FileIO:
    """Open a regular file for unbuffered reading. A pipe or a device is refused; it is not waited for.

    Raises:
        IntegrityError: the file is missing or is not a regular file.
        ResourceError: it cannot be opened.
    """
    try:
        refuse_special(path, path.stat().st_mode)
        # O_NONBLOCK: do not wait if the path has just become a pipe. Regular files ignore the flag.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = FileIO(os.open(path, flags), "rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise read_error(error if isinstance(error, OSError) else OSError(str(error)), path) from error
    refuse_special(path, os.fstat(file.fileno()).st_mode)
    return file


def read_small_file(path: Path, limit_bytes: int) -> bytes:
    """Content of a regular file of at most `limit_bytes`.

    Raises:
        IntegrityError: missing, special or larger.
        ResourceError: unreadable.
    """
    with open_regular(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > limit_bytes:
            limit = format_bytes(limit_bytes)
            raise IntegrityError(f"{printable(str(path))} has {size_bytes} bytes; at most {limit} are read")
        try:
            return file.readall()
        except OSError as error:
            raise read_error(error, path) from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a regular file, in hex; errors as `open_regular`."""
    with open_regular(path) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise read_error(error, path) from error


def file_state(status: os.stat_result) -> FileState:
    """What differs once a file is replaced or written: inode, size and modification time."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def has_size(path: Path, size_bytes: int) -> bool:
    """Whether `path` is a regular file of this size."""
    return path.is_file() and path.stat().st_size == size_bytes


def refuse_special(path: Path, mode: int) -> None:
    """Raise IntegrityError for a directory, pipe, socket or device. `mode` is the status's of `path`."""
    for is_kind, kind in _FILE_KINDS:
        if is_kind(mode):
            raise IntegrityError(
                f"{printable(str(path))} is {kind}, not a file", "put the file itself in its place"
            )
