"""Which signal asked the command to stop: Ctrl-C, SIGTERM or SIGHUP. Signals and this state are per process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Final

from subspec_cli.errors import ExitCode

_BOUNCE_S: Final = 0.05
"""A launcher often passes on the signal that the terminal has sent already: within this time it is the same one."""
_SHOW_CURSOR: Final = b"\r\x1b[2K\x1b[?25h"
_STATUSES: Final = {
    getattr(signal, name): status
    for name, status in (
        ("SIGINT", ExitCode.INTERRUPTED),
        ("SIGTERM", ExitCode.TERMINATED),
        ("SIGHUP", ExitCode.HUNG_UP),  # not on Windows
    )
    if hasattr(signal, name)
}


class _Interrupts:
    """Remembers the signal that asked to stop. Every one unwinds like Ctrl-C, with its own exit status."""

    exit_code = ExitCode.INTERRUPTED
    latest_s = -_BOUNCE_S

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        now_s, status = time.monotonic(), _STATUSES[signum]
        if status is self.exit_code and now_s - self.latest_s < _BOUNCE_S:
            return
        self.latest_s = now_s
        if not is_terminating():
            self.exit_code = status
        if _is_importing(frame):
            _leave_at_once()
        raise KeyboardInterrupt


_interrupts = _Interrupts()


def interrupt_status() -> ExitCode:
    """Exit status of a command that a signal stopped."""
    return _interrupts.exit_code


def interrupt_text() -> str:
    """What is said of a command that a signal stopped."""
    return "subspec: terminated" if is_terminating() else "subspec: interrupted"


def is_terminating() -> bool:
    """Whether SIGTERM or SIGHUP has come; a chat must then end too."""
    return _interrupts.exit_code is not ExitCode.INTERRUPTED


@contextlib.contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack like Ctrl-C; by default they would skip every `finally`.

    A signal that the parent process chose to ignore, as nohup does with SIGHUP, stays ignored.
    """
    _interrupts.exit_code, _interrupts.latest_s = ExitCode.INTERRUPTED, -_BOUNCE_S
    before = {}
    try:
        for signum in _STATUSES:
            if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                before[signum] = signal.signal(signum, _interrupts.on_signal)
    except ValueError:  # not the main thread: the embedding program handles signals
        yield
        return
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def ignore_signals() -> None:
    """Let nothing interrupt the last steps of a command, which take no time."""
    with contextlib.suppress(ValueError):  # not the main thread
        for signum in _STATUSES:
            signal.signal(signum, signal.SIG_IGN)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _leave_at_once() -> None:
    """End the process. Libraries answer an exception within an import by importing anew, or swallow it.

    Nothing is lost: whatever is written survives a kill, and processes that were started see this one's end.
    """
    with contextlib.suppress(Exception):  # no reader, no space
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, (_SHOW_CURSOR if os.isatty(2) else b"") + interrupt_text().encode() + b"\n")
    os._exit(interrupt_status())
