"""All that is written for the user: results on stdout, the rest on stderr. The only door to Rich."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TextIO

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from subspec_cli.cli.answer_rows import Row, Style
from subspec_cli.cli.wrapping import wrapped_text
from subspec_cli.units import printable

_FILE_WIDTH = 140
"""A file has no width, and a table cut at the usual 80 columns would lose figures."""

_STYLES: Final[dict[Style, str]] = {
    "text": "",
    "strong": "bold",
    "heading": "bold",
    "code": "cyan",
    "mark": "dim",
}


class Output:
    """Writes to stdout and stderr: styled on a terminal, bare text elsewhere or if `plain`."""

    def __init__(
        self, *, plain: bool = False, stdout: TextIO | None = None, stderr: TextIO | None = None
    ) -> None:
        self.stdout = stdout or sys.stdout
        self.stderr = stderr or sys.stderr
        dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
        self.is_terminal = self.stdout.isatty()
        self.is_live = self.is_terminal and not plain and not dumb
        """Whether stdout can show text with statistics under it."""
        self.is_animated = self.stderr.isatty() and not plain and not dumb
        """Whether stderr can redraw a line of progress."""
        self.can_edit = self.is_animated and sys.stdin is not None and sys.stdin.isatty()
        """Whether a line editor can be used."""
        self.out = _console(self.stdout, terminal=self.is_live)
        self.err = _console(self.stderr, terminal=self.is_animated)

    def note(self, text: str, *, style: str = "dim") -> None:
        """Write a line that is not part of the result to stderr, wrapped by words on a terminal."""
        shown = wrapped_text(printable(text), self.err.width) if self.stderr.isatty() else printable(text)
        self.err.print(Text(shown, style=style), soft_wrap=True)
        self.stderr.flush()

    def end_line(self) -> None:
        """Leave the line of a prompt that was left without Enter; the line editor has left it already."""
        if not self.can_edit:
            self.note("")

    def result(self, text: str) -> None:
        """Write lines of the result to stdout."""
        self.out.print(Text(printable(text)), soft_wrap=True)

    def styled(self, text: Text) -> None:
        """Write a line of the result with its own styles to stdout; bare text if it is not a terminal."""
        self.out.print(text, soft_wrap=True)

    def document(self, document: Mapping[str, Any]) -> None:
        """Write the JSON document of a `--json` run to stdout."""
        self.stdout.write(as_json(document) + "\n")
        self.stdout.flush()

    def tab_separated(self, rows: Sequence[Sequence[str]]) -> None:
        """Write rows for other programs to stdout: a tab between cells, none inside, nothing cut."""
        for row in rows:
            self.stdout.write("\t".join(printable(" ".join(cell.split())) for cell in row) + "\n")
        self.stdout.flush()

    def table(
        self,
        headers: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        aside: bool = False,
        has_total: bool = True,
    ) -> None:
        """Write a table to stdout, or to stderr if `aside`. The last row is the total unless `has_total` is False."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for number, header in enumerate(headers):
            table.add_column(Text(header), justify="right" if number else "left", no_wrap=True)
        for number, row in enumerate(rows):
            is_total = has_total and number == len(rows) - 1
            table.add_row(*(Text(printable(cell)) for cell in row), style="bold" if is_total else None)
        console = self.err if aside else self.out
        console.print(table)

    def area(self) -> LiveArea:
        """An area on stdout with growing text above lines that are redrawn."""
        return LiveArea(self.out)

    def ask(self, prompt: str) -> str:
        """Read one line from the user, with line editing and history if the platform has them."""
        with suppress(ImportError):
            importlib.import_module("readline")
        # Without a terminal `input` would write its prompt into the answers.
        return input(prompt if sys.stdin.isatty() else "")


class LiveArea:
    """Text that scrolls up when a line is complete, above a few lines that are redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(
            console=console,
            auto_refresh=False,  # a second thread would disturb measurements
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    @property
    def width(self) -> int:
        """Columns of the terminal, which may change."""
        return self._console.width

    def write_row(self, row: Row) -> None:
        """Write a finished row, or a line of code, which the terminal wraps."""
        self._console.print(_styled(row), soft_wrap=True)

    def show(self, row: Row, statistics: Sequence[str]) -> None:
        """Redraw the unfinished row and the statistics; as many of these as there is room for."""
        tail = [_styled(row, no_wrap=True, overflow="ellipsis")] if row else []
        statistics = statistics[: max(0, self._console.height - 3)]
        lines = [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in statistics]
        self._live.update(Group(*tail, *lines), refresh=True)


def _styled(row: Row, **how: Any) -> Text:  # noqa: ANN401 - options of Rich's text
    return Text.assemble(*((span.text, _STYLES[span.style]) for span in row), **how)


def as_json(document: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Strict JSON in ASCII, for every locale and parser. A number that is not finite becomes null."""
    return json.dumps(_jsonable(document), indent=indent, allow_nan=False)


def _jsonable(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _console(stream: TextIO, *, terminal: bool) -> Console:
    return Console(
        file=stream,
        force_terminal=terminal,  # or FORCE_COLOR would put control codes into files and pipes
        width=None if stream.isatty() else _FILE_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
    )
