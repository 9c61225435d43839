"""Progress on stderr: one line that is redrawn on a terminal, a new line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column

from subspec_cli.cli.output import Output
from subspec_cli.metrics import PrefillProgress
from subspec_cli.units import format_seconds, plural, printable


class ProgressLine:
    """The current activity and its progress.

    `spins` moves a spinner from a second thread; leave it off while times are measured.
    """

    def __init__(
        self,
        output: Output,
        *,
        spins: bool = False,
        plain_interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._output = output
        self._plain_interval_s = plain_interval_s
        self._clock = clock
        self._next_plain_s = clock() + plain_interval_s
        text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=1))
        self._spins = spins
        self._bar = BarColumn(bar_width=24)
        self._progress = Progress(
            *((SpinnerColumn(),) if spins else ()),
            self._bar,
            text,
            console=output.err,
            auto_refresh=spins,
            refresh_per_second=5,
            transient=True,
            expand=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not output.is_animated,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show_prefill(self, progress: PrefillProgress) -> None:
        """Show how far a prompt is read; once it is read, the answer says so."""
        if progress.done_tokens < progress.tokens:
            self.update(prefill_text(progress), progress.done_tokens, progress.tokens)

    def update(self, text: str, done: float = 0, total: float | None = None) -> None:
        """Show `text`, and a bar if there is a `total`."""
        if self._output.is_animated:
            self._progress.update(self._task, description=printable(text), completed=done, total=total)
            if not self._spins:
                self._progress.refresh()
            return
        is_done = total is not None and done >= total
        if is_done or self._clock() >= self._next_plain_s:
            self._next_plain_s = self._clock() + self._plain_interval_s
            self._output.note(text)


def prefill_text(progress: PrefillProgress) -> str:
    """How far a prompt is read, such as `reading the prompt 1,536/6,000 tokens · 820 tok/s · 5.4 s left`."""
    text = f"reading the prompt {int(progress.done_tokens):,}/{progress.tokens:,} {plural(progress.tokens, 'token')}"
    if progress.left_s is None:
        return text
    rate, left = progress.tok_per_s, format_seconds(progress.left_s)
    return f"{text} · {rate:,.{0 if rate >= 10 else 1}f} tok/s · {left} left"


def rate_text(bytes_per_s: float) -> str:
    """A rate such as 0.4 MB/s or 820 MB/s."""
    return f"{bytes_per_s / 1e6:.{1 if bytes_per_s < 1e8 else 0}f} MB/s"


def time_left(done: float, total: float, elapsed_s: float) -> str:
    """Time that the rest takes at the rate so far, as `0:42 left`; empty if unknown."""
    if done <= 0 or total <= done:
        return ""
    return f"{format_seconds(elapsed_s * (total - done) / done)} left"
