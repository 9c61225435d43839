"""`subspec batch --ray`: a job over several replicas."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from subspec_cli.cli.batch_text import batch_document, longest_of, progress_text, summary_text
from subspec_cli.cli.ray_options import named_model, on_device
from subspec_cli.config import Config
from subspec_cli.units import counted

if TYPE_CHECKING:
    from subspec_cli.cli.output import Output
    from subspec_cli.cli.output_progress import ProgressLine
    from subspec_cli.serving.batch import BatchProgress
    from subspec_cli.serving.dispatch import Dispatcher
    from subspec_cli.serving.job import Job


def run_job_on_ray(
    config: Config, file: Path | None, job: Job, path: Path, output: Output, *, as_json: bool
) -> None:
    """Start the replicas, have them answer what is not answered yet, and say what was done."""
    from subspec_cli.cli.answer_text import loading_line
    from subspec_cli.cli.output_progress import ProgressLine

    address = str(config.batch.ray)
    config = named_model(config)
    output.note(loading_line(config, file, f"batch of {counted(job.lines, 'request')} on Ray ({address})"))
    with ProgressLine(output) as progress:
        progress.update("connecting to Ray")
        from subspec_cli.serving.dispatch import Dispatcher
        from subspec_cli.serving.ray_cluster import ray_cluster

        with ray_cluster(address, config.batch.replicas, config.memory.device) as cluster:
            from subspec_cli.serving.ray_pool import RayPool, ReplicaOrder

            order = ReplicaOrder(
                on_device(config, cluster.device), longest_of(job, config), config.batch.parallel, job.sha256
            )
            with RayPool(cluster, order, output.note) as pool:
                dispatcher = Dispatcher(pool, cluster.replicas, lambda state: _show(state, progress))
                _run(dispatcher, job, path, output)
                document = batch_document(
                    dispatcher.progress, dispatcher.about.description, dispatcher.peak_memory_bytes, path
                )
    if as_json:
        output.document(document)


def _run(dispatcher: Dispatcher, job: Job, path: Path, output: Output) -> None:
    from subspec_cli.cli.answer_text import description_lines
    from subspec_cli.serving.batch import job_identity
    from subspec_cli.serving.job_results import JobResults

    about = dispatcher.start().description
    for line in description_lines(about):
        output.note(line)
    with JobResults(path, job_identity(job, about), fresh_seed=about.seed) as results:
        if results.done:
            output.note(f"{counted(results.done, 'record')} of an earlier run are there, the rest follows")
        try:
            dispatcher.run(job, results)
        finally:
            output.note(summary_text(dispatcher.progress, path))


def _show(state: BatchProgress, progress: ProgressLine) -> None:
    if not state.lines:
        ready = f"{state.replicas} of {counted(state.wanted_replicas, 'replica')} ready"
        progress.update(f"loading the model: {ready}")
        return
    progress.update(progress_text(state), state.known + state.written, state.lines)
