"""Which signal asked the command to stop: a process has one answer to that, so it is kept here once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from subspec_cli.errors import ExitCode


class _Interrupts:
    """Remembers which signal asked to stop: SIGTERM unwinds like Ctrl-C but ends in its own status."""

    exit_code = ExitCode.INTERRUPTED

    def on_terminate(self, _signum: int, _frame: FrameType | None) -> None:
        self.exit_code = ExitCode.TERMINATED
        raise KeyboardInterrupt


_interrupts = _Interrupts()


def interrupt_status() -> ExitCode:
    """The exit status of a command that a signal stopped."""
    return _interrupts.exit_code


def is_terminating() -> bool:
    """Whether the KeyboardInterrupt at hand was a SIGTERM, which no prompt may outlive."""
    return _interrupts.exit_code is ExitCode.TERMINATED


@contextlib.contextmanager
def terminate_raises() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does: by default it would skip every `finally`."""
    _interrupts.exit_code = ExitCode.INTERRUPTED
    try:
        before = signal.signal(signal.SIGTERM, _interrupts.on_terminate)
    except ValueError:  # not the main thread: whoever embeds us handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
