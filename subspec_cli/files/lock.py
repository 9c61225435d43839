"""One writer per directory: an advisory lock that ends with its process."""

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
# Network file systems without flock; on others it excludes nobody. Names of unfinished files are unique and finished
# ones are checked at the end, so working without a lock only wastes work.
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@contextmanager
def directory_lock(directory: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[bool]:
    """Hold the lock of an existing directory; yields whether it had to wait. The lock file stays behind.

    Args:
        directory: the directory to lock.
        on_wait: called once per holder with the notice that another process has the lock, before waiting for
            it. Without `on_wait` a lock that is held is an error.

    Raises:
        BusyError: another process holds the lock; names its process id.
        ResourceError: the lock file cannot be written.
    """
    path = directory / LOCK_NAME
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise write_error(error, path) from error
    try:
        reported = None
        while (holder := try_lock(handle, path)) is not None:
            busy = f"another process (pid {holder}) is preparing {printable(str(directory))}"
            if on_wait is None:
                raise BusyError(busy, "wait until it is done, then run the command again")
            if holder != reported:
                on_wait(f"waiting: {busy}")
                reported = holder
            time.sleep(_POLL_S)
        yield reported is not None
    finally:
        os.close(handle)


def try_lock(handle: int, path: Path) -> str | None:
    """Take the lock of an open file, until it is closed. Returns None on success, else the holder's process id.

    Where locks do not work, it succeeds. Raises ResourceError if the file cannot be locked or written.
    """
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
