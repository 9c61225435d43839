"""`subspec bench`: compare speculative with plain decoding in the same run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from subspec_cli.bench.sources import Suite
from subspec_cli.cli.interrupts import interrupt_status
from subspec_cli.cli.options import JsonOpt, Settings, with_settings
from subspec_cli.config import BenchConfig, Config, DraftConfig, MemoryConfig, ModelConfig, SamplingConfig
from subspec_cli.errors import NotIdenticalError, SubspecError, UsageError
from subspec_cli.units import counted

if TYPE_CHECKING:
    from subspec_cli.bench.report import BenchReport
    from subspec_cli.bench.runner import BenchProgress
    from subspec_cli.cli.bench_table import Format
    from subspec_cli.cli.output import Output

SuiteArg = Annotated[
    Literal[Suite, "compare", "plot"],
    typer.Argument(
        metavar="SUITE",
        help="sample: 16 questions that are shipped; mt-bench, humaneval, gsm8k, alpaca, cnn-dm, math-500: 80 "
        "from the hub, or --limit; compare: two records; plot: a record's picture.",
    ),
]
RecordsArg = Annotated[
    list[str] | None, typer.Argument(metavar="[A.json B.json]", help="Records for compare and plot.")
]
FormatOpt = Annotated[
    Literal["table", "markdown", "csv", "json"],
    typer.Option("--format", metavar="FORMAT", help="table, markdown, csv or json."),
]
OutputOpt = Annotated[
    str | None, typer.Option("--output", metavar="FILE", help="Write the JSON record to FILE.")
]
ForceOpt = Annotated[
    bool, typer.Option("--force", help="Let --output overwrite what is no record of the same command.")
]


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where the figures go."""

    shape: Format
    """What stdout takes."""
    file: Path | None
    """File for the JSON record."""
    plot: Path | None = None
    """File for the picture."""


@with_settings(
    BenchConfig,
    "output",
    "force",
    "shape",
    "as_json",
    ModelConfig,
    MemoryConfig,
    DraftConfig,
    SamplingConfig,
)
def bench(
    settings: Settings,
    suite: SuiteArg,
    records: RecordsArg = None,
    output: OutputOpt = None,
    force: ForceOpt = False,
    shape: FormatOpt = "table",
    as_json: JsonOpt = False,
) -> None:
    """Measure the speed-up over plain offloading, and that every answer is token for token the same."""
    chosen = settings.config.bench
    outputs = Outputs("json" if as_json else shape, _path(output or chosen.resume), _path(chosen.plot))
    if suite == "compare":
        _compare(settings, records or [], outputs)
        return
    if suite == "plot":
        _plot(settings, records or [], outputs, force=force)
        return
    if records:
        raise UsageError(f"unexpected {records[0]!r} after {suite}", "--output FILE writes the record")
    _check_files(settings.config, outputs, force=force)
    _measure(settings.config, settings.file, suite, outputs)


def _compare(settings: Settings, records: list[str], outputs: Outputs) -> None:
    if len(records) != 2:
        raise UsageError(
            f"compare takes two records, not {len(records)}", "subspec bench compare A.json B.json"
        )
    if _given(settings) or outputs.file is not None:
        raise UsageError("compare takes --format and --json alone", "subspec bench compare A.json B.json")
    from subspec_cli.cli.bench_compare import show_comparison
    from subspec_cli.cli.output import Output

    show_comparison([Path(name) for name in records], Output(), outputs.shape)


def _plot(settings: Settings, records: list[str], outputs: Outputs, *, force: bool) -> None:
    file = settings.config.bench.plot
    if len(records) != 1 or file is None or _given(settings) != ["plot"] or outputs.file is not None:
        raise UsageError("plot takes one record and --plot", "subspec bench plot A.json --plot A.png")
    from subspec_cli.bench.record import read_record
    from subspec_cli.cli.bench_plot import check_plot, write_plot
    from subspec_cli.cli.output import Output

    check_plot(Path(file), force=force)
    write_plot(read_record(Path(records[0])), Path(file))
    Output().note(f"drawn as {file}")


def _given(settings: Settings) -> list[str]:
    """Settings from the command line."""
    return [key for values in settings.flags.values() for key, value in values.items() if value is not None]


def _check_files(config: Config, outputs: Outputs, *, force: bool) -> None:
    """Check the files now: a bad path would otherwise fail after an hour of measuring."""
    questions = config.bench.questions
    if questions is not None and not Path(questions).is_file():
        raise UsageError(f"--questions {questions}: no such file")
    resume = config.bench.resume
    if resume is not None and not Path(resume).is_file():
        raise UsageError(f"--resume {resume}: no such file")
    if outputs.file is not None and outputs.file != _path(resume):
        from subspec_cli.bench.record import check_target

        check_target(outputs.file, force=force)
    if config.bench.peer is not None:
        from subspec_cli.bench.peer import check_peer

        check_peer(temperature=config.sampling.temperature)
    if config.bench.plot is not None:
        from subspec_cli.cli.bench_plot import check_plot

        check_plot(Path(config.bench.plot), force=force)


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _measure(config: Config, file: Path | None, suite: Suite, outputs: Outputs) -> None:
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
            on_question=_Keeper(output, outputs.file).keep,
        )
    write_report(report, output, outputs)
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


class _Keeper:
    """Writes the record after each question, so that a kill or a power cut costs the question in work alone."""

    def __init__(self, output: Output, file: Path | None) -> None:
        self._output = output
        self._file = file

    def keep(self, report: BenchReport) -> None:
        """Write what is measured so far; a full disk is told once, and the measuring goes on."""
        if self._file is None:
            return
        try:
            _write_record(report, self._file)
        except SubspecError as error:
            self._file = None
            self._output.note(f"the record is not written before the end: {error.message}")


def _write_record(report: BenchReport, file: Path) -> None:
    from subspec_cli.cli.documents import bench_document
    from subspec_cli.cli.output import as_json
    from subspec_cli.files.atomic_write import atomic_write

    atomic_write(file, as_json(bench_document(report), indent=1).encode() + b"\n")


def write_report(report: BenchReport, output: Output, outputs: Outputs) -> None:
    """Write the record, then print the figures: a reader that leaves early or a full disk costs one of them alone."""
    try:
        if outputs.file is not None:
            _write_record(report, outputs.file)
            output.note(f"written to {outputs.file}")
    finally:
        show_report(report, output, outputs)


def show_report(report: BenchReport, output: Output, outputs: Outputs) -> None:
    """Print the figures in their format. JSON and CSV are alone on stdout; the rest goes to stderr then."""
    from subspec_cli.cli.bench_table import csv_text, headers, markdown_lines, shown_figures, table_cells
    from subspec_cli.cli.comparison_text import summary_lines
    from subspec_cli.cli.documents import bench_document

    figures = shown_figures(report.rows)
    titles, cells = headers(figures), [table_cells(row, figures) for row in report.rows]
    if outputs.shape == "markdown":
        for line in (*markdown_lines(titles, cells), ""):
            output.result(line)
    else:
        output.table(titles, cells, aside=outputs.shape != "table")
    if outputs.shape == "csv":
        output.result(csv_text(report.rows))
    for line in summary_lines(report):
        if outputs.shape == "markdown":
            output.result(f"- {line}")
        elif outputs.shape == "table":
            output.result(line)
        else:
            output.note(line)
    if report.interrupted:
        output.note("interrupted: these are the answers that were done", style="bold")
    if outputs.shape == "json":
        output.document(bench_document(report))
    if outputs.plot is not None and report.pairs:
        from subspec_cli.cli.bench_plot import write_plot

        write_plot(bench_document(report), outputs.plot)
        output.note(f"drawn as {outputs.plot}")
