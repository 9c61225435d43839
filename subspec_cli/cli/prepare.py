"""`subspec prepare`: write the low-bit substitutes of a model, layer by layer."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Final

import typer

from subspec_cli.cli.completion import complete_model
from subspec_cli.cli.options import FollowLinksOpt, JsonOpt, Settings, with_settings
from subspec_cli.config import MemoryConfig, ModelConfig, SubstituteConfig
from subspec_cli.errors import ResourceError, UnsupportedModelError, UsageError
from subspec_cli.setting_rules import DEFAULT_BITS
from subspec_cli.streaming.host_memory import has_gpu
from subspec_cli.units import GIB, counted, format_bytes, format_seconds

if TYPE_CHECKING:
    from subspec_cli.cli.output import Output
    from subspec_cli.cli.output_progress import ProgressLine
    from subspec_cli.hub.weight_downloads import DownloadProgress
    from subspec_cli.session.prepare import KindReport, PrepareReport
    from subspec_cli.session.residuals import ResidualReport
    from subspec_cli.substitutes.preparation import PrepareProgress
    from subspec_cli.substitutes.settings import SubstituteSettings

_HEADERS = ("matrix", "bits", "bits/weight", "SQNR")
_OUTPUT_HEADERS = ("matrix", "tuned SQNR", "plain SQNR")
_TUNED_BYTES: Final = 200_000_000
"""Weights of a model from which on tuning is worth its time without being asked for: smaller ones are fast anyway."""
_TUNED_BITS: Final = 4


ModelArg = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, local directory or demo.",
        autocompletion=complete_model,
    ),
]
ForceOpt = Annotated[bool, typer.Option("--force", help="Do it again, even if it is done.")]

TuneOpt = Annotated[
    bool | None,
    typer.Option(
        "--tune/--no-tune",
        help="Then write substitutes of the same size that fit the model's own text better.",
        show_default=f"with at most 4 bits, for weights of {_TUNED_BYTES // 1_000_000} MB or more",
    ),
]


@with_settings(
    SubstituteConfig,
    ModelConfig,
    "tune",
    MemoryConfig,
    without=(
        "model.model",
        "model.bits",
        "memory.context",
        "memory.resident_layers",
        "memory.no_residual",
    ),
)
def prepare(
    settings: Settings,
    name: ModelArg,
    tune: TuneOpt = None,
    force: ForceOpt = False,
    follow_links: FollowLinksOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Write the substitutes of MODEL's layers; needs memory for about one layer, and is done once."""
    if not name.strip():
        raise UsageError("MODEL is empty", "give a hub id, a local directory or demo")
    chosen, file = settings.config.substitute, settings.file
    bits = chosen.bits or settings.config.model.bits or DEFAULT_BITS
    from subspec_cli.cli.output import Output
    from subspec_cli.cli.output_progress import ProgressLine

    output = Output()
    output.note(f"preparing {name} …" if file is None else f"preparing {name} with {file} …")
    with ProgressLine(output, spins=True, plain_interval_s=2.0) as progress:
        progress.update(f"preparing {name}: reading the checkpoint, loading the quantizer")
        from subspec_cli.reporter import Reporter
        from subspec_cli.session.prepare import prepare as prepare_model
        from subspec_cli.substitutes.settings import SubstituteSettings

        base = SubstituteSettings(bits, chosen.optimizer, chosen.overrides)
        revision = settings.flags["model"]["revision"]  # the file's revision belongs to the file's model

        def show(state: PrepareProgress) -> None:
            progress.update(progress_text(state), *progress_share(state))

        tuned = None
        if chosen.residual:  # they belong beside the set that `run` takes
            from subspec_cli.session.prepare import tuned_commit

            tuned = tuned_commit(name, base)
        report = prepare_model(
            name,
            base,
            revision=revision,
            force=force,
            follow_links=follow_links,
            progress=show,
            reporter=Reporter(note=output.note),
        )
        if tune or (tune is None and (_is_worth_tuning(base, report) or tuned == report.commit)):
            from subspec_cli.session.prepare import tune as tune_model

            tune_it = partial(
                tune_model,
                name,
                base,
                settings.config,
                revision=revision,
                force=force,
                progress=show,
                reporter=Reporter(progress.update, output.note),
            )
            report = tune_it() if tune else _tuned_if_possible(tune_it, report, output)
        residuals = None
        if chosen.residual:
            progress.update(f"preparing {name}: residuals")
            residuals = _with_residuals(report, progress, output)
    if as_json:
        output.document(report.as_dict() | {"residuals": residuals.as_dict() if residuals else None})
        return
    first, *rest = report_lines(report, name)
    output.result(first)
    output.table(_HEADERS, quality_rows(report))
    if any(item.outputs for item in report.kinds):
        output.result("outputs on text that nothing was rounded for, beside rounding each weight by itself:")
        output.table(_OUTPUT_HEADERS, output_rows(report))
    if residuals is not None:
        output.result(residual_line(residuals))
    for line in rest:
        output.result(line)


def _is_worth_tuning(settings: SubstituteSettings, report: PrepareReport) -> bool:
    """Whether a set is tuned without being asked for."""
    is_plain = settings.optimizer == "minmax" and settings.bits <= _TUNED_BITS
    return is_plain and report.source_bytes >= _TUNED_BYTES


def _tuned_if_possible(
    tune_it: Callable[[], PrepareReport], report: PrepareReport, output: Output
) -> PrepareReport:
    """Tune what nobody asked to have tuned; what this machine lacks for it is told, and the first set stays."""
    try:
        return tune_it()
    except (ResourceError, UnsupportedModelError) as error:
        output.note(f"not tuned: {error}; the substitutes that are written work without it")
        return report


def _with_residuals(report: PrepareReport, progress: ProgressLine, output: Output) -> ResidualReport | None:
    from subspec_cli.reporter import Reporter
    from subspec_cli.session.residuals import add_residuals
    from subspec_cli.substitutes.manifest import MANIFEST_NAME, read_manifest
    from subspec_cli.substitutes.prepared_model import PreparedModel

    return add_residuals(
        PreparedModel(report.directory, read_manifest(report.directory / MANIFEST_NAME)),
        progress=lambda state: progress.update(
            f"residuals · layer {state.done_layers}/{state.total_layers}", state.done_bytes, state.total_bytes
        ),
        reporter=Reporter(note=output.note),
    )


def residual_line(report: ResidualReport) -> str:
    """How many bytes the residuals take, and how many bits of a weight are streamed with them."""
    raw = f", {report.raw_share:.0%} of the weights stay raw" if report.raw_share else ""
    size = format_bytes(report.size_bytes)
    return (
        f"residuals: {size}, {report.bits_per_weight:.2f} bits of a weight are streamed in place of 16{raw}"
    )


def progress_share(state: PrepareProgress) -> tuple[int, int]:
    """Bytes done and in all: of the download while it lasts, then of layers and head."""
    download = state.download
    if download is not None and download.done_files < download.total_files:
        return download.done_bytes, download.total_bytes
    return state.done_bytes, state.total_bytes


def progress_text(state: PrepareProgress) -> str:
    """Files or layers, bytes, rate and time left."""
    from subspec_cli.cli.output_progress import rate_text, time_left

    download = state.download
    if download is not None and download.done_files < download.total_files:
        return f"{download_text(download)} · layer {state.done_layers}/{state.total_layers}"
    is_at_head = state.done_layers == state.total_layers and state.done_bytes < state.total_bytes
    parts = ["head" if is_at_head else f"layer {state.done_layers}/{state.total_layers}"]
    parts.append(f"{format_bytes(state.done_bytes)} of {format_bytes(state.total_bytes)}")
    if state.elapsed_s > 0 and state.done_bytes:
        parts.append(rate_text(state.done_bytes / state.elapsed_s))
    parts.append(time_left(state.done_bytes, state.total_bytes, state.elapsed_s))
    return " · ".join(part for part in parts if part)


def download_text(state: DownloadProgress) -> str:
    """Files, bytes, rate and time left."""
    from subspec_cli.cli.output_progress import rate_text, time_left

    parts = [f"file {state.done_files}/{state.total_files}"]
    parts.append(f"{format_bytes(state.done_bytes)} of {format_bytes(state.total_bytes)}")
    if state.elapsed_s > 0 and state.received_bytes:
        parts.append(rate_text(state.received_bytes / state.elapsed_s))
        there_bytes = state.done_bytes - state.received_bytes
        parts.append(time_left(state.received_bytes, state.total_bytes - there_bytes, state.elapsed_s))
    return " · ".join(part for part in parts if part)


def report_lines(report: PrepareReport, model: str) -> list[str]:
    """What was written and where, and the command that uses it."""
    if report.already_prepared:
        first = f"{report.model_id} is already prepared; --force does it again"
    else:
        first = f"prepared {report.model_id} in {format_seconds(report.elapsed_s)}"
    kept = f"{format_bytes(report.substitute_bytes)} of substitutes for {format_bytes(report.source_bytes)}"
    quality = f"{report.bits_per_weight:.2f} bits per weight"
    if report.sqnr_db is not None:
        quality += f" at {report.sqnr_db:.1f} dB"
    budget = "--vram-gb" if has_gpu() else "--memory-gb"
    return [
        f"{first}: {counted(report.layers, 'layer')}, {kept} of weights, {quality}",
        f"in {report.directory}",
        f'next: subspec run --model {shlex.quote(model)} {budget} {_example_gib(report.source_bytes)} "…"',
    ]


def quality_rows(report: PrepareReport) -> list[list[str]]:
    """A row for each kind of matrix, one for all of them, and one for the head: bits per weight, and SQNR."""
    rows = [_quality_row(item) for item in report.kinds]
    total = ["all", str(report.bits), f"{report.bits_per_weight:.2f}", _decibels(report.sqnr_db)]
    if any(item.bits != report.bits for item in report.kinds):
        total[1] = "mixed"
    return [*rows, total] if report.head is None else [*rows, total, _quality_row(report.head)]


def _quality_row(item: KindReport) -> list[str]:
    return [item.kind, str(item.bits), f"{item.bits_per_weight:.2f}", _decibels(item.sqnr_db)]


def output_rows(report: PrepareReport) -> list[list[str]]:
    """A row for each kind of matrix that was tuned: what its outputs lose, and would lose without tuning."""
    return [
        [item.kind, _decibels(item.outputs.sqnr_db), _decibels(item.outputs.plain_sqnr_db)]
        for item in report.kinds
        if item.outputs is not None
    ]


def _decibels(sqnr_db: float | None) -> str:
    return "no loss" if sqnr_db is None else f"{sqnr_db:.1f} dB"


def _example_gib(source_bytes: int) -> str:
    """A first budget to try: half the model's size, in steps of half a GiB."""
    return f"{max(1, math.ceil(source_bytes / GIB)) / 2:g}"
