"""`subspec bench compare`: two records beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from subspec_cli.bench.figures import Spread
from subspec_cli.bench.record import read_record
from subspec_cli.bench.record_comparison import ComparedFigure, compare_records, differences
from subspec_cli.cli.bench_table import FIGURE_NAMES, Format, markdown_lines, spread_text, table_csv
from subspec_cli.cli.output import Output

_HEADERS = ("category", "figure", "first", "second", "ratio", "ranges overlap")


def show_comparison(paths: Sequence[Path], output: Output, shape: Format) -> None:
    """Print the figures of two records; raises UsageError if they cannot be compared."""
    first, second = map(read_record, paths)
    figures = compare_records(first, second)
    notes = differences(first, second)
    if shape == "json":
        output.document(_document(paths, figures, notes))
        return
    rows = [_cells(figure) for figure in figures]
    if shape == "table":
        output.table(_HEADERS, rows, has_total=False)
    elif shape == "markdown":
        for line in markdown_lines(_HEADERS, rows):
            output.result(line)
    else:
        output.result(table_csv(_HEADERS, rows))
    for note in notes:
        output.note(f"differs: {note}")


def _cells(figure: ComparedFigure) -> list[str]:
    overlap = {None: "-", True: "yes", False: "no"}[figure.overlap]
    return [
        figure.category,
        FIGURE_NAMES[figure.figure],
        *(
            spread if spread == "void" else spread_text(spread, figure.figure)
            for spread in (figure.first, figure.second)
        ),
        "-" if figure.ratio is None else f"{figure.ratio:.2f}",
        overlap,
    ]


def _document(paths: Sequence[Path], figures: Sequence[ComparedFigure], notes: list[str]) -> dict[str, Any]:
    return {
        "records": [str(path) for path in paths],
        "rows": [
            {
                "category": item.category,
                "figure": item.figure,
                "first": _plain(item.first),
                "second": _plain(item.second),
                "ratio": item.ratio,
                "ranges_overlap": item.overlap,
            }
            for item in figures
        ],
        "differences": notes,
    }


def _plain(spread: Spread | Literal["void"] | None) -> object:
    return asdict(spread) if isinstance(spread, Spread) else spread
