"""How many files this process may have open: the limit is raised at the start, and named where it is met."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

_ENOUGH: Final = 4096
"""More than any model has files. Without a bound, some systems call an unlimited number an error."""


def raise_open_files_limit() -> None:
    """Raise the soft limit of open files as far as the hard limit allows, up to what any model needs."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(_ENOUGH, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def open_files_limit() -> int | None:
    """Return how many files may be open; None if there is no limit."""
    with suppress(ImportError):
        import resource

        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return None if soft == resource.RLIM_INFINITY else soft
    return None


def open_files_hint() -> str:
    """Return the command that allows more open files."""
    return f"ulimit -n {_ENOUGH} (now {open_files_limit()}) in the shell that starts subspec, or its service's limit"
