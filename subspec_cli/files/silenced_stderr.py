"""Standard error turned off while a library runs that reports on it what it raises as well."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_STDERR: Final = 2
_ONE_AT_A_TIME: Final = threading.Lock()
"""The process has one standard error: threads that turn it off and on in turns would lose it."""


@contextmanager
def silenced_stderr() -> Iterator[None]:
    """Drop what is written to file descriptor 2 in the meantime, by native code too."""
    with _ONE_AT_A_TIME:
        try:
            kept = os.dup(_STDERR)
        except OSError:  # closed by the parent process
            yield
            return
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, _STDERR)
            os.close(nowhere)
            yield
        finally:
            os.dup2(kept, _STDERR)
            os.close(kept)
