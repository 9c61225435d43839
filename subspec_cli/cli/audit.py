"""`subspec audit`: compare answers and logits with the library's own forward."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from subspec_cli.cli.options import JsonOpt, Settings, with_settings
from subspec_cli.config import AuditConfig, Config, MemoryConfig, ModelConfig
from subspec_cli.errors import NotIdenticalError, UsageError

if TYPE_CHECKING:
    from subspec_cli.bench.audit import AuditProgress

ModelArg = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="Hub id, local directory or demo; it must be prepared.",
        show_default="the model used last",
    ),
]


@with_settings(AuditConfig, ModelConfig, MemoryConfig, without=("memory.reprobe",))
def audit(
    settings: Settings,
    model: ModelArg = None,  # noqa: ARG001 - it is config.model.model
    as_json: JsonOpt = False,
) -> None:
    """Compare MODEL's greedy answers and logits with transformers, in float32 and in the model's own type.

    The library's weights take memory beyond the budget; where they do not fit, one layer is loaded at a time.
    """
    questions = settings.config.audit.questions
    if questions is not None and not Path(questions).is_file():
        raise UsageError(f"--questions {questions}: no such file", "leave it out for the shipped sample")
    _audit(settings.config, settings.file, as_json=as_json)


def _audit(config: Config, file: Path | None, *, as_json: bool) -> None:
    from subspec_cli.cli.answer_text import loading_line
    from subspec_cli.cli.output import Output
    from subspec_cli.cli.output_progress import ProgressLine

    output = Output(plain=config.run.plain)
    output.note(loading_line(config, file, "audit"))
    with ProgressLine(output) as progress:
        progress.update("loading libraries")
        from subspec_cli.session.openmp import set_openmp_defaults

        set_openmp_defaults()
        from subspec_cli.bench.audit import run_audit

        report = run_audit(
            config,
            progress=lambda state: progress.update(progress_text(state), state.done, state.total or None),
        )
    if as_json:
        from subspec_cli.cli.documents import audit_document

        output.document(audit_document(report))
    else:
        from subspec_cli.cli.audit_text import HEADERS, answer_cells, audit_lines, total_cells

        output.table(HEADERS, [*map(answer_cells, report.answers), total_cells(report)])
        for line in audit_lines(report):
            output.result(line)
    if report.problems:
        raise NotIdenticalError("; ".join(report.problems), "--json holds every row: please report it")


def progress_text(state: AuditProgress) -> str:
    """The stage, how much of it is done, its rate and the time left."""
    from subspec_cli.cli.output_progress import time_left

    if not state.total:
        return state.stage
    rate = f"{state.done / state.elapsed_s:.2f}/s" if state.done and state.elapsed_s > 0 else ""
    left = time_left(state.done, state.total, state.elapsed_s)
    return " · ".join(part for part in (f"{state.stage} {state.done}/{state.total}", rate, left) if part)
