"""Which processes use a prepared model: each holds the lock of a small file of its own beside the manifest."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from subspec_cli.errors import SubspecError
from subspec_cli.files.lock import try_lock

IN_USE_NAME: Final = re.compile(r"in-use-([0-9]+)-[0-9a-f]{8}")
_STALE_S: Final = 60.0
"""Age from which a file whose process is gone is deleted; a younger one may not be locked yet."""


@contextmanager
def in_use(directory: Path) -> Iterator[None]:
    """Hold a mark that this process uses the prepared model; without one where the directory cannot be written."""
    path = directory / f"in-use-{os.getpid()}-{secrets.token_hex(4)}"
    users_of(directory)  # deletes what killed processes left
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError:  # a read-only or full disk is no reason not to run
        yield
        return
    try:
        with contextlib.suppress(SubspecError):
            try_lock(handle, path)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


def users_of(directory: Path) -> list[int]:
    """Ids of the processes that use the prepared model; none where locks do not work."""
    try:
        paths = sorted(directory.iterdir())
    except OSError:
        return []
    named = ((IN_USE_NAME.fullmatch(path.name), path) for path in paths)
    return [int(found[1]) for found, path in named if found and _is_held(path)]


def _is_held(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:  # its process has just deleted it, or it is another user's
        return False
    try:
        is_stale = time.time() - os.fstat(handle).st_mtime > _STALE_S
        if try_lock(handle, path) is not None:
            return True
        if is_stale:
            path.unlink()
    except (OSError, SubspecError):
        return False
    finally:
        os.close(handle)
    return False
