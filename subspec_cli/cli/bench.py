"""`subspec bench`: speculative against plain decoding, in the same run."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from subspec_cli.cli import options as opt
from subspec_cli.cli.interrupts import interrupt_status
from subspec_cli.config import Config, find_config_file, resolve_config
from subspec_cli.errors import NotIdenticalError, UsageError

if TYPE_CHECKING:
    from subspec_cli.bench.runner import BenchProgress, BenchReport, BenchRow
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


class Suite(StrEnum):
    """The question sets."""

    MT_BENCH = "mt-bench"
    SAMPLE = "sample"


SuiteArg = Annotated[
    Suite,
    typer.Argument(metavar="SUITE", help="mt-bench: 80 questions from the hub; sample: 16 that are shipped."),
]
LimitOpt = Annotated[
    int | None,
    typer.Option(
        "--limit",
        parser=opt.whole,
        metavar="N",
        help="Questions to run, over all categories.",
        show_default="all",
    ),
]
TokensOpt = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        parser=opt.whole,
        metavar="N",
        help="Longest answer of each turn.",
        show_default=str(opt.DEFAULTS.bench.max_new_tokens),
    ),
]
PlainTokensOpt = Annotated[
    int | None,
    typer.Option(
        "--plain-tokens",
        parser=opt.whole,
        metavar="K",
        help="Longest answer of the plain arm, the slow one.",
        show_default="as --max-new-tokens",
    ),
]
QuestionsOpt = Annotated[
    str | None,
    typer.Option("--questions", metavar="FILE", help="MT-Bench questions from a local JSON lines file."),
]
JsonOpt = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write every answer's figures to FILE; - is stdout."),
]


def bench(
    suite: SuiteArg,
    limit: LimitOpt = None,
    max_new_tokens: TokensOpt = None,
    plain_tokens: PlainTokensOpt = None,
    questions: QuestionsOpt = None,
    json_file: JsonOpt = None,
    model: opt.ModelOpt = None,
    revision: opt.RevisionOpt = None,
    bits: opt.BitsOpt = None,
    config_file: opt.ConfigOpt = None,
    vram_gb: opt.VramOpt = None,
    memory_gb: opt.MemoryOpt = None,
    ram_gb: opt.RamOpt = None,
    device: opt.DeviceOpt = None,
    context: opt.ContextOpt = None,
    resident_layers: opt.ResidentOpt = None,
    reprobe: opt.ReprobeOpt = None,
    depth: opt.DepthOpt = None,
    width: opt.WidthOpt = None,
    no_shadow: opt.ShadowOpt = None,
    no_speculation: opt.SpeculationOpt = None,
    temperature: opt.TemperatureOpt = None,
    top_p: opt.TopPOpt = None,
    top_k: opt.TopKOpt = None,
    seed: opt.SeedOpt = None,
    _debug: opt.DebugOpt = False,
) -> None:
    """Measure the speed-up over plain offloading, and that every answer is token for token the same."""
    lengths = {"limit": limit, "max_new_tokens": max_new_tokens, "plain_tokens": plain_tokens}
    flags: dict[str, dict[str, object]] = {
        "model": {"model": model, "revision": revision, "bits": bits},
        "memory": opt.memory_flags(vram_gb, memory_gb, ram_gb, device, context, resident_layers, reprobe),
        "draft": opt.draft_flags(depth, width, no_shadow, no_speculation),
        "sampling": {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed},
        "bench": {**lengths, "questions": questions},
    }
    file = find_config_file(config_file)
    config = resolve_config(flags, file)
    _check_files(config, json_file)
    _measure(config, file, suite, json_file)


def _check_files(config: Config, json_file: str | None) -> None:
    """Refuse now what would be lost after an hour."""
    questions = config.bench.questions
    if questions is not None and not Path(questions).is_file():
        raise UsageError(f"--questions {questions}: no such file")
    if json_file is None or json_file == "-":
        return
    target = Path(json_file)
    if not target.parent.is_dir() or target.is_dir():
        raise UsageError(f"--json {json_file} cannot be written", "name a file in a directory that exists")


def _measure(config: Config, file: Path | None, suite: Suite, json_file: str | None) -> None:
    from subspec_cli.cli.output import Output
    from subspec_cli.cli.output_progress import ProgressLine
    from subspec_cli.cli.report import loading_line

    output = Output(plain=config.run.plain)
    output.note(loading_line(config, file, f"bench {suite}"))
    with ProgressLine(output) as progress:
        progress.update("loading libraries")
        from subspec_cli.bench.runner import run_bench

        report = run_bench(
            config,
            suite.value,
            progress=lambda state: progress.update(progress_text(state), state.done, state.total),
        )
    _show(report, output, json_file)
    total = report.rows[-1] if report.rows else None
    if total is not None and report.exactness == "exact" and total.identical < total.answers:
        different = total.answers - total.identical
        raise NotIdenticalError(f"{different} of {total.answers} answers differ from plain decoding")
    if report.interrupted:
        raise typer.Exit(interrupt_status())


def progress_text(state: BenchProgress) -> str:
    """Answers done, what is going on, and the time left."""
    from subspec_cli.cli.output_progress import time_left

    parts = (f"{state.done}/{state.total}", state.status, time_left(state.done, state.total, state.elapsed_s))
    return " · ".join(part for part in parts if part)


def _show(report: BenchReport, output: Output, json_file: str | None) -> None:
    """The table and the summary; they make way on stdout for the document."""
    from subspec_cli.cli.output import as_json

    aside = json_file == "-"
    output.table(_HEADERS, [_cells(row) for row in report.rows], aside=aside)
    say = output.note if aside else output.result
    for line in report.summary_lines:
        say(line)
    if report.interrupted:
        output.note("interrupted: these are the answers that were done", style="bold")
    if aside:
        output.document(report.as_dict())
    elif json_file is not None:
        from subspec_cli.files.atomic_write import atomic_write

        atomic_write(Path(json_file), as_json(report.as_dict(), indent=1).encode() + b"\n")
        output.note(f"written to {json_file}")


def _cells(row: BenchRow) -> list[str]:
    return [
        row.category,
        str(row.answers),
        str(row.identical),
        _figure(row.plain_tok_per_s),
        _figure(row.speculative_tok_per_s),
        _figure(row.speedup_same_plan, "x"),
        _figure(row.speedup, "x"),
        _figure(row.tau),
        str(row.prefilled_tokens),
    ]


def _figure(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.2f}{unit}"
