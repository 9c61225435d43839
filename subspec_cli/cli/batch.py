"""`subspec batch`: answer a file of requests, several at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subspec_cli.cli.options import JsonOpt, Settings, with_settings
from subspec_cli.config import (
    BatchConfig,
    Config,
    DraftConfig,
    MemoryConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
)
from subspec_cli.errors import UsageError
from subspec_cli.units import counted, format_seconds

if TYPE_CHECKING:
    from subspec_cli.cli.output import Output
    from subspec_cli.serving.batch import BatchProgress
    from subspec_cli.serving.job import Job
    from subspec_cli.session.build import TokenCount
    from subspec_cli.session.session import Session

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
    output = Output()
    job = open_job(requests)
    run_job(settings.config, settings.file, job, results, output, as_json=as_json)


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
        JobResults(path, job_identity(job, session.description), fresh_seed=session.description.seed) as results,
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
        output.document(_document(run.progress, session, path))


def _check_files(requests: Path, results: Path) -> None:
    """Check the paths now: a bad one would otherwise fail after the model is loaded."""
    if not results.parent.is_dir() or results.is_dir():
        raise UsageError(f"{results} cannot be written", "name a file in a directory that exists")
    if results.exists() and requests.exists() and results.samefile(requests):
        raise UsageError("the results would overwrite the requests", "subspec batch IN.jsonl OUT.jsonl")


def _counting(job: Job, config: Config) -> TokenCount | None:
    if config.memory.context is not None:
        return None
    from subspec_cli.serving.batch import longest_request

    run = config.run
    return longest_request(job, system=run.system, raw=run.raw, answer_tokens=run.max_new_tokens).tokens


def progress_text(state: BatchProgress) -> str:
    """Answers done, tokens, the rate and the time left."""
    from subspec_cli.cli.output_progress import time_left

    done, total = state.written, state.lines - state.known
    parts = (
        f"{state.known + done}/{state.lines} requests",
        f"{state.in_flight} at a time" if state.in_flight else "",
        f"{state.new_tokens:,} tokens",
        f"{state.tok_per_s:.2f} tok/s" if state.new_tokens else "",
        time_left(done, total, state.elapsed_s),
    )
    return " · ".join(part for part in parts if part)


def summary_text(state: BatchProgress, path: Path) -> str:
    """What a run did, in one line."""
    left = state.lines - state.known - state.written
    refused = f", {state.refused} of them refused" if state.refused else ""
    text = (
        f"{counted(state.written, 'request')}{refused}: {counted(state.new_tokens, 'token')} in "
        f"{format_seconds(state.elapsed_s)}, {state.tok_per_s:.2f} tok/s in all"
    )
    return (
        f"{text}; {counted(left, 'request')} left, the same command goes on" if left else f"{text}; in {path}"
    )


def _document(state: BatchProgress, session: Session, path: Path) -> dict[str, Any]:
    from subspec_cli.metrics import tau_of_totals

    about = session.description
    return {
        "results": str(path),
        "requests": state.lines,
        "done_before": state.known,
        "written": state.written,
        "refused": state.refused,
        "new_tokens": state.new_tokens,
        "elapsed_s": state.elapsed_s,
        "tok_per_s": state.tok_per_s,
        "tau": tau_of_totals(state.stats),
        "parallel": about.plan.sequences,
        "exactness": about.exactness,
        "predicted_tok_per_s": about.plan.prediction.tok_per_s,
        "peak_memory_bytes": session.peak_memory_bytes(),
        "model": about.model_id,
        "revision": about.revision,
    }
