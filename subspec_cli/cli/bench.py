"""`subspec bench`: compare speculative with plain decoding in the same run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from subspec_cli.cli.interrupts import interrupt_status
from subspec_cli.cli.options import JsonOpt, Settings, with_settings
from subspec_cli.config import BenchConfig, Config, DraftConfig, MemoryConfig, ModelConfig, SamplingConfig
from subspec_cli.errors import NotIdenticalError, UsageError
from subspec_cli.units import counted

if TYPE_CHECKING:
    from subspec_cli.bench.report import BenchReport
    from subspec_cli.bench.runner import BenchProgress
    from subspec_cli.cli.output import Output

Suite = Literal["mt-bench", "sample"]
SuiteArg = Annotated[
    Suite,
    typer.Argument(metavar="SUITE", help="mt-bench: 80 questions from the hub; sample: 16 that are shipped."),
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

    as_json: bool
    """Whether stdout takes the JSON record."""
    file: Path | None
    """File for the JSON record."""


@with_settings(
    BenchConfig, "output", "force", "as_json", ModelConfig, MemoryConfig, DraftConfig, SamplingConfig
)
def bench(
    settings: Settings,
    suite: SuiteArg,
    output: OutputOpt = None,
    force: ForceOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Measure the speed-up over plain offloading, and that every answer is token for token the same."""
    outputs = Outputs(as_json, None if output is None else Path(output))
    _check_files(settings.config, outputs, force=force)
    _measure(settings.config, settings.file, suite, outputs)


def _check_files(config: Config, outputs: Outputs, *, force: bool) -> None:
    """Check the files now: a bad path would otherwise fail after an hour of measuring."""
    questions = config.bench.questions
    if questions is not None and not Path(questions).is_file():
        raise UsageError(f"--questions {questions}: no such file")
    if outputs.file is not None:
        from subspec_cli.bench.record import check_target

        check_target(outputs.file, force=force)


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
        )
    _show(report, output, outputs)
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


def _show(report: BenchReport, output: Output, outputs: Outputs) -> None:
    """Print the table and the summary; they go to stderr if stdout takes the JSON document."""
    from subspec_cli.cli.bench_table import HEADERS, table_cells
    from subspec_cli.cli.comparison_text import summary_lines
    from subspec_cli.cli.documents import bench_document
    from subspec_cli.cli.output import as_json

    output.table(HEADERS, [table_cells(row) for row in report.rows], aside=outputs.as_json)
    say = output.note if outputs.as_json else output.result
    for line in summary_lines(report):
        say(line)
    if report.interrupted:
        output.note("interrupted: these are the answers that were done", style="bold")
    if outputs.as_json:
        output.document(bench_document(report))
    if outputs.file is not None:
        from subspec_cli.files.atomic_write import atomic_write

        atomic_write(outputs.file, as_json(bench_document(report), indent=1).encode() + b"\n")
        output.note(f"written to {outputs.file}")
