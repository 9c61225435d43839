"""`subspec bench`: compare speculative with plain decoding in the same run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from subspec_cli.cli.interrupts import interrupt_status
from subspec_cli.cli.options import Settings, with_settings
from subspec_cli.config import BenchConfig, Config, DraftConfig, MemoryConfig, ModelConfig, SamplingConfig
from subspec_cli.errors import NotIdenticalError, UsageError
from subspec_cli.units import counted

if TYPE_CHECKING:
    from subspec_cli.bench.figures import Figure, Spread
    from subspec_cli.bench.report import BenchReport, BenchRow
    from subspec_cli.bench.runner import BenchProgress
    from subspec_cli.cli.output import Output

_HEADERS = (
    "category",
    "answers",
    "identical",
    "plain tok/s",
    "subspec tok/s",
    "speedup same plan",
    "speedup",
    "tau",
    "prefilled",
)
_FIGURES: Final[Mapping[Figure, str]] = {
    "plain_tok_per_s": "",
    "speculative_tok_per_s": "",
    "speedup_same_plan": "x",
    "speedup": "x",
}
"""Measured columns, and the unit behind their figures."""

Suite = Literal["mt-bench", "sample"]
SuiteArg = Annotated[
    Suite,
    typer.Argument(metavar="SUITE", help="mt-bench: 80 questions from the hub; sample: 16 that are shipped."),
]
JsonOpt = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write every answer's figures to FILE; - is stdout."),
]


@with_settings(BenchConfig, "json_file", ModelConfig, MemoryConfig, DraftConfig, SamplingConfig)
def bench(settings: Settings, suite: SuiteArg, json_file: JsonOpt = None) -> None:
    """Measure the speed-up over plain offloading, and that every answer is token for token the same."""
    _check_files(settings.config, json_file)
    _measure(settings.config, settings.file, suite, json_file)


def _check_files(config: Config, json_file: str | None) -> None:
    """Check the files now: a bad path would otherwise fail after an hour of measuring."""
    questions = config.bench.questions
    if questions is not None and not Path(questions).is_file():
        raise UsageError(f"--questions {questions}: no such file")
    if json_file is None or json_file == "-":
        return
    target = Path(json_file)
    if not target.parent.is_dir() or target.is_dir():
        raise UsageError(f"--json {json_file} cannot be written", "name a file in a directory that exists")


def _measure(config: Config, file: Path | None, suite: Suite, json_file: str | None) -> None:
    from subspec_cli.cli.answer_text import loading_line
    from subspec_cli.cli.output import Output
    from subspec_cli.cli.output_progress import ProgressLine

    output = Output(plain=config.run.plain)
    output.note(loading_line(config, file, f"bench {suite}"))
    with ProgressLine(output) as progress:
        progress.update("loading libraries")
        from subspec_cli.session.openmp import set_openmp_defaults

        set_openmp_defaults()
        from subspec_cli.bench.runner import run_bench

        report = run_bench(
            config,
            suite,
            progress=lambda state: progress.update(progress_text(state), state.done, state.total),
        )
    _show(report, output, json_file)
    total = report.rows[-1] if report.rows else None
    if total is not None and report.exactness == "exact" and total.identical < total.answers:
        different = total.answers - total.identical
        raise NotIdenticalError(
            f"{different} of {counted(total.answers, 'answer')} differ from plain decoding"
        )
    if report.interrupted:
        raise typer.Exit(interrupt_status())


def progress_text(state: BenchProgress) -> str:
    """Answers done, the current activity and the time left."""
    from subspec_cli.cli.output_progress import time_left

    parts = (f"{state.done}/{state.total}", state.status, time_left(state.done, state.total, state.elapsed_s))
    return " · ".join(part for part in parts if part)


def _show(report: BenchReport, output: Output, json_file: str | None) -> None:
    """Print the table and the summary; they go to stderr if stdout takes the JSON document."""
    from subspec_cli.cli.comparison_text import summary_lines
    from subspec_cli.cli.documents import bench_document
    from subspec_cli.cli.output import as_json

    aside = json_file == "-"
    output.table(_HEADERS, [table_cells(row) for row in report.rows], aside=aside)
    say = output.note if aside else output.result
    for line in summary_lines(report):
        say(line)
    if report.interrupted:
        output.note("interrupted: these are the answers that were done", style="bold")
    if aside:
        output.document(bench_document(report))
    elif json_file is not None:
        from subspec_cli.files.atomic_write import atomic_write

        atomic_write(Path(json_file), as_json(bench_document(report), indent=1).encode() + b"\n")
        output.note(f"written to {json_file}")


def table_cells(row: BenchRow) -> list[str]:
    """Return the cells of one row; a figure that means nothing is `void`."""
    return [
        row.category,
        str(row.answers),
        str(row.identical),
        *(
            "void" if row.is_void(figure) else _spread(row.spread(figure), unit)
            for figure, unit in _FIGURES.items()
        ),
        "-" if row.tau is None else f"{row.tau:.2f}",
        str(row.prefilled_tokens),
    ]


def _spread(spread: Spread | None, unit: str) -> str:
    """The median, and the range if there is one."""
    if spread is None:
        return "-"
    median = f"{spread.median:.2f}{unit}"
    return median if spread.least == spread.most else f"{median} ({spread.least:.2f}..{spread.most:.2f})"
