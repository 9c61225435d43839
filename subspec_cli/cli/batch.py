"""`subspec batch`: answer a file of requests, several at a time."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from subspec_cli.cli.batch_on_ray import run_job_on_ray
from subspec_cli.cli.batch_text import batch_document, longest_of, progress_text, summary_text
from subspec_cli.cli.options import JsonOpt, Settings, with_settings
from subspec_cli.cli.ray_options import check_ray
from subspec_cli.config import (
    BatchConfig,
    Config,
    DraftConfig,
    MemoryConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
)
from subspec_cli.errors import IntegrityError, UsageError
from subspec_cli.files.regular_file import refuse_special
from subspec_cli.units import counted, printable

if TYPE_CHECKING:
    from subspec_cli.cli.output import Output
    from subspec_cli.serving.job import Job
    from subspec_cli.session.build import TokenCount

InputArg = Annotated[
    Path,
    typer.Argument(
        metavar="IN.jsonl",
        help='Requests, one a line: {"prompt": "…"}, {"messages": […]}, or the OpenAI batch format.',
        show_default=False,
    ),
]
ResultsArg = Annotated[
    Path,
    typer.Argument(
        metavar="OUT.jsonl",
        help="Results, one a line as each is done; a run that was killed goes on.",
        show_default=False,
    ),
]


@with_settings(
    BatchConfig,
    "as_json",
    ModelConfig,
    RunConfig,
    MemoryConfig,
    DraftConfig,
    SamplingConfig,
    without=("run.plain",),
)
def batch(settings: Settings, requests: InputArg, results: ResultsArg, as_json: JsonOpt = False) -> None:
    """Answer a file of requests, several at a time; each answer is the one that it would be alone."""
    from subspec_cli.cli.output import Output
    from subspec_cli.serving.job import open_job

    _check_files(requests, results)
    check_ray(settings.config.batch.ray, settings.config.batch.replicas)
    output = Output()
    job = open_job(requests)
    run = run_job if settings.config.batch.ray is None else run_job_on_ray
    run(_as_begun(settings.config, results), settings.file, job, results, output, as_json=as_json)


def _as_begun(config: Config, results: Path) -> Config:
    """The settings with the context of the earlier run, where none is given: memory may allow another one now."""
    from subspec_cli.serving.job_results import begun_context

    context = begun_context(results) if config.memory.context is None else None
    if context is None:
        return config
    return dataclasses.replace(config, memory=dataclasses.replace(config.memory, context=context))


def run_job(
    config: Config, file: Path | None, job: Job, path: Path, output: Output, *, as_json: bool
) -> None:
    """Load the model, answer what is not answered yet, and say what was done."""
    from subspec_cli.cli.answer_text import loading_line, session_lines
    from subspec_cli.cli.output_progress import ProgressLine
    from subspec_cli.reporter import Reporter
    from subspec_cli.serving.batch import BatchRun, job_identity
    from subspec_cli.serving.job_results import JobResults
    from subspec_cli.session import open_session

    output.note(loading_line(config, file, f"batch of {counted(job.lines, 'request')}"))
    with ProgressLine(output) as progress:
        progress.update("loading libraries")
        session = open_session(
            config,
            Reporter(progress.update, output.note),
            count=_counting(job, config),
            parallel=config.batch.parallel,
        )
    with (
        session,
        JobResults(
            path, job_identity(job, session.description), fresh_seed=session.description.seed
        ) as results,
        ProgressLine(output) as progress,
    ):
        for line in session_lines(session):
            output.note(line)
        if results.done:
            output.note(f"{counted(results.done, 'record')} of an earlier run are there, the rest follows")
        run = BatchRun(
            session,
            job,
            results,
            lambda state: progress.update(progress_text(state), state.known + state.written, state.lines),
        )
        try:
            run.run()
        finally:
            output.note(summary_text(run.progress, path))
    if as_json:
        output.document(batch_document(run.progress, session.description, session.peak_memory_bytes(), path))


def _check_files(requests: Path, results: Path) -> None:
    """Check the paths now: a bad one would otherwise fail after the model is loaded."""
    hint = "name a file in a directory that you can write: subspec batch IN.jsonl OUT.jsonl"
    name = printable(str(results))
    if name == "-":
        raise UsageError("results go to a file, not to stdout", hint)
    try:
        if results.exists():
            refuse_special(results, results.stat().st_mode)
            if requests.exists() and results.samefile(requests):
                raise UsageError("the results would overwrite the requests", hint)
        # What keeps a second process out lies beside the results, so they have one name.
        if results.is_symlink():
            real = printable(os.path.realpath(results))
            raise UsageError(f"{name} is a link to {real}", f"name that: subspec batch IN.jsonl {real}")
        if not results.parent.is_dir() or not os.access(results.parent, os.W_OK | os.X_OK):
            reason = f"{printable(str(results.parent))} is no directory that you can write"
            raise UsageError(f"{name} cannot be written: {reason}", hint)
        if results.exists() and not os.access(results, os.R_OK | os.W_OK):
            raise UsageError(f"{name} cannot be read and written", hint)
    except IntegrityError as error:
        raise UsageError(error.message, hint) from error
    except OSError as error:
        raise UsageError(f"{name} cannot be written: {error.strerror}", hint) from error


def _counting(job: Job, config: Config) -> TokenCount | None:
    longest = longest_of(job, config)
    return None if longest is None else longest.tokens
