"""Which signal asked the command to stop: Ctrl-C or SIGTERM. Signals are per process, so this state is too."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from subspec_cli.errors import ExitCode


class _Interrupts:
    """Remembers the signal that asked to stop. SIGTERM unwinds like Ctrl-C but has its own exit status."""

    exit_code = ExitCode.INTERRUPTED

    def on_terminate(self, _signum: int, _frame: FrameType | None) -> None:
        self.exit_code = ExitCode.TERMINATED
        raise KeyboardInterrupt


_interrupts = _Interrupts()


def interrupt_status() -> ExitCode:
    """Exit status of a command that a signal stopped."""
    return _interrupts.exit_code


def is_terminating() -> bool:
    """Whether the current KeyboardInterrupt came from SIGTERM; a chat must then end too."""
    return _interrupts.exit_code is ExitCode.TERMINATED


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM unwind the stack like Ctrl-C; by default it would skip every `finally`."""
    _interrupts.exit_code = ExitCode.INTERRUPTED
    try:
        before = signal.signal(signal.SIGTERM, _interrupts.on_terminate)
    except ValueError:  # not the main thread: the embedding program handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
