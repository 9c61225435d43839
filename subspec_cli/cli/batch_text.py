"""The texts around a batch job: its progress, its summary and its JSON document."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspec_cli.config import Config
from subspec_cli.units import counted, format_seconds

if TYPE_CHECKING:
    from subspec_cli.serving.batch import BatchProgress, LongestRequest
    from subspec_cli.serving.job import Job
    from subspec_cli.session.description import SessionDescription


def longest_of(job: Job, config: Config) -> LongestRequest | None:
    """The lines for which the context is made; None if the user gave one."""
    if config.memory.context is not None:
        return None
    from subspec_cli.serving.batch import longest_request

    run = config.run
    return longest_request(job, system=run.system, raw=run.raw, answer_tokens=run.max_new_tokens)


def progress_text(state: BatchProgress) -> str:
    """Answers done, tokens, the rate and the time left."""
    from subspec_cli.cli.output_progress import time_left

    done, total = state.written, state.lines - state.known
    parts = (
        f"{state.known + done}/{state.lines} requests",
        f"{state.replicas} of {counted(state.wanted_replicas, 'replica')}" if state.wanted_replicas else "",
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
    if state.wanted_replicas:
        text = f"{text} on {counted(state.wanted_replicas, 'replica')}, {counted(state.restarts, 'restart')}"
    return (
        f"{text}; {counted(left, 'request')} left, the same command goes on" if left else f"{text}; in {path}"
    )


def batch_document(
    state: BatchProgress, about: SessionDescription, peak_memory_bytes: int, path: Path
) -> dict[str, Any]:
    """The document of `batch --json`."""
    from subspec_cli.metrics import tau_of_totals

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
        "replicas": state.wanted_replicas or 1,
        "restarts": state.restarts,
        "parallel": about.plan.sequences,
        "exactness": about.exactness,
        "predicted_tok_per_s": about.plan.prediction.tok_per_s,
        "peak_memory_bytes": peak_memory_bytes,
        "model": about.model_id,
        "revision": about.revision,
    }
