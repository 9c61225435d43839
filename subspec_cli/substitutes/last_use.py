"""When a prepared model was last used: the time of a small file beside the manifest, which stays unchanged."""

from __future__ import annotations

import os
from pathlib import Path

LAST_USED_NAME = "last-used"


def mark_used(directory: Path) -> bool:
    """Record that the prepared model in `directory` is used now; False if the directory cannot be written."""
    flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(directory / LAST_USED_NAME, flags, 0o666)
        try:
            os.write(handle, b"\n")  # writing sets the time on every system
        finally:
            os.close(handle)
    except OSError:  # a read-only or full disk is no reason not to run
        return False
    return True


def last_used_s(directory: Path) -> float | None:
    """Unix time of the last use; None if there was none, or if the file cannot be read."""
    try:
        return (directory / LAST_USED_NAME).lstat().st_mtime
    except OSError:
        return None
