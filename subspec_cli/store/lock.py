"""One writer per directory: an advisory lock that dies with its process."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from subspec_cli.errors import BusyError
from subspec_cli.store.files import write_error
from subspec_cli.units import printable

LOCK_NAME = ".lock"
# Network filesystems without flock. Temporary names are unique, so going without only wastes work.
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@contextmanager
def directory_lock(directory: Path) -> Iterator[None]:
    """Hold the lock of an existing directory; the file stays behind, the lock does not.

    Raises:
        BusyError: another process holds it; names its process id.
        ResourceError: the lock file cannot be written.
    """
    path = directory / LOCK_NAME
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise write_error(error, path) from error
    try:
        _acquire(handle, path)
        yield
    finally:
        os.close(handle)


def _acquire(handle: int, path: Path) -> None:
    try:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
    except BlockingIOError as error:
        holder = printable(os.read(handle, 20).decode("ascii", "replace").strip()) or "unknown"
        raise BusyError(
            f"another process (pid {holder}) is preparing {printable(str(path.parent))}",
            "wait until it is done, then run the command again",
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise write_error(error, path) from error
