"""Files written so that a crash leaves the old one or the new one, and read so that nothing can hang."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import sys
from io import FileIO
from pathlib import Path

from subspec_cli.errors import IntegrityError, ResourceError
from subspec_cli.files.free_space import DISK_FULL_HINT, PLACES_HINT, free_disk_bytes
from subspec_cli.units import format_bytes, printable

_WRITE_BYTES = 8 << 20  # a signal is handled between two writes of this size
_TEMP_NAME = re.compile(r"\..+\.tmp\.([0-9]{1,10})")
_HINTS = {
    errno.ENOSPC: DISK_FULL_HINT,
    errno.EDQUOT: f"free some of your disk quota, or choose another disk: {PLACES_HINT}",
    errno.EIO: f"the disk reports a fault: check it, or choose another: {PLACES_HINT}",
}
_FILE_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def write_error(error: OSError, path: Path, need_bytes: int | None = None) -> ResourceError:
    """What the user reads when `path` cannot be written: errno by name, the path, bytes needed and free."""
    figures = ""
    if need_bytes is not None:
        figures = f"; {format_bytes(need_bytes)} needed, {format_bytes(free_disk_bytes(path))} free"
    return ResourceError(
        f"cannot write {printable(str(path))}: {_reason(error)}{figures}",
        _HINTS.get(error.errno or 0, f"choose a place that you can write: {PLACES_HINT}"),
    )


def read_error(error: OSError, path: Path) -> IntegrityError | ResourceError:
    """What the user reads when `path` cannot be read; a missing file is an integrity error."""
    text = f"cannot read {printable(str(path))}: {_reason(error)}"
    if isinstance(error, FileNotFoundError):
        return IntegrityError(text)
    return ResourceError(text)


def atomic_write(path: Path, data: bytes) -> None:
    """Replace `path` by a file that holds `data`: temporary name, fsync, rename, fsync of the directory.

    The temporary file is removed on any failure, Ctrl-C included, and the old file stays.

    Raises:
        ResourceError: no space, quota, permission, read-only or faulty disk.
        IntegrityError: the temporary name is taken, which only a foreign process can have done.
    """
    temp = path.parent / f".{path.name}.tmp.{os.getpid()}"
    # O_EXCL and O_NOFOLLOW: a planted file or link is never written through. The kernel takes the umask off
    # 0666 here, so no call has to read the umask, which cannot be done without setting it for all threads.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(temp, flags, 0o666)
    except FileExistsError as error:
        raise IntegrityError(f"{printable(str(temp))} is in the way", "remove it and try again") from error
    except OSError as error:
        raise write_error(error, path, len(data)) from error
    try:
        try:
            _write_all(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temp, path)
        sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first failure is the one to tell
            temp.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(error, path, len(data)) from error
        raise


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power cut, where the system can."""
    if sys.platform == "win32":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_regular(path: Path) -> FileIO:
    """Open a regular file for unbuffered reading; a pipe or a device is refused, not waited for.

    Raises:
        IntegrityError: the file is missing or is not a regular file.
        ResourceError: it cannot be opened.
    """
    try:
        _refuse_special(path, path.stat().st_mode)
        # Not to wait if the path became a pipe just now; regular files do not heed the flag.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = FileIO(os.open(path, flags), "rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise read_error(error if isinstance(error, OSError) else OSError(str(error)), path) from error
    _refuse_special(path, os.fstat(file.fileno()).st_mode)
    return file


def read_small_file(path: Path, limit_bytes: int) -> bytes:
    """The whole of a regular file of at most `limit_bytes`.

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


def has_size(path: Path, size_bytes: int) -> bool:
    """Whether a regular file of that size is there."""
    return path.is_file() and path.stat().st_size == size_bytes


def sweep_stale_temps(directory: Path) -> None:
    """Remove `atomic_write`'s temporary files of processes that are gone; call it while holding the lock.

    A name with our own process id is of an earlier process with that number, as every container's is.
    """
    for path in directory.iterdir():
        match = _TEMP_NAME.fullmatch(path.name)
        if match and not _is_alive(int(match.group(1))):
            path.unlink(missing_ok=True)


def is_temp_name(name: str) -> bool:
    """Whether a file has the name of `atomic_write`'s temporary ones."""
    return _TEMP_NAME.fullmatch(name) is not None


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view[:_WRITE_BYTES]) :]


def _reason(error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, type(error).__name__)
    return f"{name} ({error.strerror or printable(str(error))})"


def _refuse_special(path: Path, mode: int) -> None:
    for is_kind, kind in _FILE_KINDS:
        if is_kind(mode):
            raise IntegrityError(f"{printable(str(path))} is {kind}, not a file")


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    if sys.platform == "win32":  # there, signal 0 is Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
