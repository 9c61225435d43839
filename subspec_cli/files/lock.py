"""One writer per directory: an advisory lock that dies with its process."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from subspec_cli.errors import BusyError
from subspec_cli.files.io_errors import write_error
from subspec_cli.units import printable

LOCK_NAME = ".lock"
_POLL_S = 0.2
# Network filesystems without flock. Temporary names are unique, so going without only wastes work.
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@contextmanager
def directory_lock(directory: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[bool]:
    """Hold the lock of an existing directory; the file stays behind, the lock does not. Yields whether it waited.

    Args:
        directory: what is locked.
        on_wait: told, once per holder, that another process has the lock, which is then waited for; without
            it there is no waiting.

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
        told = None
        while (holder := _acquire(handle, path)) is not None:
            busy = f"another process (pid {holder}) is preparing {printable(str(directory))}"
            if on_wait is None:
                raise BusyError(busy, "wait until it is done, then run the command again")
            if holder != told:
                on_wait(f"waiting: {busy}")
                told = holder
            time.sleep(_POLL_S)
        yield told is not None
    finally:
        os.close(handle)


def _acquire(handle: int, path: Path) -> str | None:
    """Take the lock; None when it is ours, else who holds it."""
    try:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, f"{os.getpid()}\n".encode())
    except BlockingIOError:
        os.lseek(handle, 0, os.SEEK_SET)
        text = os.read(handle, 20).decode("ascii", "replace").strip()
        return text if text.isdecimal() else "unknown"
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise write_error(error, path) from error
    return None
