"""Messages for the user while something takes long: progress that is replaced, notes that stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final


def _ignore(_text: str) -> None:
    """Drop a message that nobody asked for."""


@dataclass(frozen=True, slots=True)
class Reporter:
    """Where messages go; silent by default."""

    progress: Callable[[str], None] = _ignore
    """Receives the current activity, one line that replaces the line before."""
    note: Callable[[str], None] = _ignore
    """Receives a line that stays: a wait, a retry, a plan that could not be kept."""


SILENT: Final = Reporter()
