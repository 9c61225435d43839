"""The table of a benchmark: its cells, and the same table as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Literal

from subspec_cli.bench.figures import FIGURES, PEER_FIGURES, Figure, Spread

if TYPE_CHECKING:
    from subspec_cli.bench.report import BenchRow

Format = Literal["table", "markdown", "csv", "json"]
FIGURE_NAMES: Final[Mapping[Figure, str]] = {
    "plain_tok_per_s": "plain tok/s",
    "speculative_tok_per_s": "subspec tok/s",
    "speedup_same_plan": "speedup same plan",
    "speedup": "speedup",
    "peer_tok_per_s": "accelerate tok/s",
    "speedup_over_peer": "over it",
}
"""Headings of the measured columns."""
_RATIOS: Final = ("speedup", "speedup_same_plan", "speedup_over_peer")


def shown_figures(rows: Sequence[BenchRow]) -> tuple[Figure, ...]:
    """Return the figures that have a column: those of a peer only if one was asked."""
    return tuple(
        figure
        for figure in FIGURES
        if figure not in PEER_FIGURES or any(figure in row.measured for row in rows)
    )


def headers(figures: Sequence[Figure]) -> tuple[str, ...]:
    """Return the headings of the table."""
    names = (FIGURE_NAMES[figure] for figure in figures)
    return ("category", "answers", "identical", *names, "tau", "prefilled")


def table_cells(row: BenchRow, figures: Sequence[Figure]) -> list[str]:
    """Return the cells of one row; a figure that means nothing is `void`."""
    return [
        row.category,
        str(row.answers),
        str(row.identical),
        *("void" if row.is_void(figure) else spread_text(row.spread(figure), figure) for figure in figures),
        "-" if row.tau is None else f"{row.tau:.2f}",
        str(row.prefilled_tokens),
    ]


def spread_text(spread: Spread | None, figure: Figure) -> str:
    """Return the median, and the range if there is one."""
    if spread is None:
        return "-"
    median = f"{spread.median:.2f}{'x' if figure in _RATIOS else ''}"
    return median if spread.least == spread.most else f"{median} ({spread.least:.2f}..{spread.most:.2f})"


def markdown_lines(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Return a table as Markdown: the first column to the left, figures to the right."""
    yield _markdown_row(headers)
    yield _markdown_row(["---", *["---:"] * (len(headers) - 1)])
    yield from map(_markdown_row, rows)


def csv_text(rows: Sequence[BenchRow]) -> str:
    """Return the rows as CSV: numbers as they are, medians with least and most, and the reasons of void figures."""
    figures = shown_figures(rows)
    names = ["category", "answers", "identical"]
    names += [f"{figure}{part}" for figure in figures for part in ("", "_least", "_most", "_void")]
    return table_csv([*names, "tau", "prefilled_tokens"], [_csv_cells(row, figures) for row in rows])


def table_csv(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table as CSV, without the last line break."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([headers, *rows])
    return text.getvalue().rstrip("\n")


def _csv_cells(row: BenchRow, figures: Sequence[Figure]) -> list[object]:
    cells: list[object] = [row.category, row.answers, row.identical]
    for figure in figures:
        spread = row.spread(figure)
        cells += [spread.median, spread.least, spread.most] if spread else ["", "", ""]
        cells.append("; ".join(void.reason for void in row.voids if void.figure == figure))
    return [*cells, "" if row.tau is None else row.tau, row.prefilled_tokens]


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
