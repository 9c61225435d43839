"""The keyboard of a chat while its line editor does not read: what is typed then."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType

from subspec_cli.cli.output import Output

termios: ModuleType | None
try:
    import termios
except ImportError:  # Windows
    termios = None


@contextlib.contextmanager
def held_keys(output: Output) -> Iterator[None]:
    """Let what is typed wait, unseen, for the line editor, Enter as Enter; Ctrl-C still interrupts.

    The terminal would echo it into rows that are redrawn, and would make Enter a line break of the next message.
    """
    descriptor = _own_terminal() if output.can_edit else None
    if termios is None or descriptor is None:
        yield
        return
    before = termios.tcgetattr(descriptor)
    held = termios.tcgetattr(descriptor)
    held[0] &= ~termios.ICRNL
    held[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(descriptor, termios.TCSANOW, held)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(descriptor, termios.TCSANOW, before)


def _own_terminal() -> int | None:
    """The terminal of standard input; None if there is none, or if another job has it."""
    try:
        descriptor = sys.stdin.fileno()
        # A job in the background would be stopped when it changes the terminal.
        return descriptor if os.tcgetpgrp(descriptor) == os.getpgrp() else None
    except (AttributeError, OSError, ValueError):
        return None
