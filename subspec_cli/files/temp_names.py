"""Names of unfinished files: no two processes choose the same, and it can be told whether a file's writer is gone.

A process id alone names nobody: two containers, or two machines on a network disk, have the same ones, and a lock may
exclude nobody there. So a name has the process id, the space in which that id counts (this boot's process-id
namespace) and a random token. A writer of the same space is gone once its process is. Of any other writer we only
know whether its file still changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_OWNER: Final = r"(?P<pid>[0-9]{1,10})(?:\.(?P<space>[0-9a-f]{8})\.[0-9a-f]{16})?"
_TEMP_NAME: Final = re.compile(rf"\..+\.tmp\.{_OWNER}")
_OWNED_PARTIAL: Final = re.compile(rf".+\.{_OWNER}\.subspec\.incomplete")
_IDLE_S: Final = 3600.0
"""A writer of an unknown space is taken for gone after this long without a change; a stalled download ends sooner."""
_NO_SPACE: Final = "0" * 8
_MOST_LETTERS: Final = 100


def owner_tag() -> str:
    """A part of a file name that is unique, and names this process."""
    return f"{os.getpid()}.{_process_space()}.{secrets.token_hex(8)}"


def temp_path(path: Path) -> Path:
    """A new temporary name beside `path`."""
    return path.parent / f".{path.name[:_MOST_LETTERS]}.tmp.{owner_tag()}"


def is_temp_name(name: str) -> bool:
    """Whether a name is one of `temp_path`."""
    return _TEMP_NAME.fullmatch(name) is not None


def abandoned(paths: Iterable[Path]) -> list[Path]:
    """Those of the unfinished files in one directory whose writer is gone.

    They are compared with the directory's newest change, so that no clock but the disk's own counts.
    """
    changed_s = {}
    for path in paths:
        with contextlib.suppress(OSError):  # renamed meanwhile
            changed_s[path] = path.lstat().st_mtime
    directories = {path.parent for path in changed_s}
    newest_s = max([_newest_change_s(directory) for directory in directories], default=0.0)
    return [path for path, then_s in changed_s.items() if _is_gone(path.name, newest_s - then_s)]


def _is_gone(name: str, idle_s: float) -> bool:
    match = _TEMP_NAME.fullmatch(name) or _OWNED_PARTIAL.fullmatch(name)
    if match is None:
        return False
    space = _process_space()
    if space != _NO_SPACE and match["space"] == space and not _is_alive(int(match["pid"])):
        return True
    return idle_s > _IDLE_S


def _newest_change_s(directory: Path) -> float:
    newest_s = 0.0
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                newest_s = max(newest_s, entry.stat(follow_symlinks=False).st_mtime)
    return newest_s


def _process_space() -> str:
    """8 hex digits of the namespace in which process ids of this boot are unique; zeros where it is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return hashlib.sha256(f"{boot} {os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:8]
    except OSError:
        return _NO_SPACE


def _is_alive(pid: int) -> bool:
    """Whether a process of our own space lives. Our own id is alive: another of our threads may write."""
    if pid == os.getpid() or sys.platform == "win32":  # signal 0 is Ctrl-C there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
