"""One replica of a model in a process of its own, which answers lines of a job. No Ray here."""

from __future__ import annotations

import os
import platform
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from subspec_cli.config import Config
from subspec_cli.errors import SubspecError, UsageError
from subspec_cli.serving.job import JobLine
from subspec_cli.units import printable
from subspec_cli.versions import __version__

if TYPE_CHECKING:
    from subspec_cli.reporter import Reporter
    from subspec_cli.serving.batch import LongestRequest
    from subspec_cli.serving.line_answers import LineAnswerer, LineResult
    from subspec_cli.session.description import SessionDescription
    from subspec_cli.session.session import Session

_REPORT_S: Final = 1.0
"""A replica says after so long how far it is, if no line is done before."""
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a replica runs, read before anything heavy is imported."""

    host: str
    machine: str
    """Same for all replicas on one machine, also in several containers, which share its disks."""
    processor: str
    """Processor and GPUs, which decide how sums are rounded."""
    threads: int
    """Threads that the machine can run at the same time."""
    free_bytes: int
    """Host memory that can be allocated."""
    total_bytes: int
    version: str = __version__


@dataclass(frozen=True, slots=True)
class Share:
    """What a replica takes of its machine."""

    config: Config
    """The settings, with the replica's own budgets."""
    threads: int
    sharers: int
    """Replicas on the machine."""


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """What a replica says once it has loaded the model."""

    place: Place
    description: SessionDescription

    @property
    def parallel(self) -> int:
        """Answers at a time."""
        return self.description.plan.sequences

    def check_like(self, other: ReplicaFacts) -> None:
        """Raise UsageError unless every answer is the same here and there."""
        about, there = self.description, other.description
        least = min(about.context_tokens, there.context_tokens)
        pairs = [
            ("revision", about.revision, there.revision, "--revision REV names one"),
            ("dtype", about.dtype, there.dtype, ""),
            ("device", about.device, there.device, "--device cpu or cuda names one"),
            ("exactness", about.exactness, there.exactness, "leave out the node that is not exact"),
            ("context", about.context_tokens, there.context_tokens, f"--context {least} fixes it"),
            ("threads", about.threads, there.threads, "OMP_NUM_THREADS=N fixes them"),
            ("libraries", about.versions, there.versions, "install the same versions on both"),
        ]
        for what, found, wanted, hint in pairs:
            if found != wanted:
                raise UsageError(
                    f"the replicas on {printable(self.place.host)} and {printable(other.place.host)} differ in "
                    f"{what}: {found} and {wanted}",
                    hint,
                )


@dataclass(frozen=True, slots=True)
class WorkDone:
    """What a replica has done since it was last asked."""

    results: tuple[LineResult, ...]
    in_flight: int
    open_tokens: int
    """Tokens of lines that are not done."""
    peak_memory_bytes: int


class Replica:
    """A session that answers lines. Its methods are called one after another, from another process."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._answerer: LineAnswerer | None = None

    def place(self) -> Place:
        """Say where this is."""
        return this_place()

    def open(self, share: Share, longest: LongestRequest | None, parallel: int) -> ReplicaFacts:
        """Load the model, and prepare it before if this node has not. Raises what both raise."""
        self._session = open_replica(share, longest, parallel)
        return ReplicaFacts(this_place(), self._session.description)

    def work(self, lines: list[JobLine], job_sha256: str, seed: int) -> WorkDone:
        """Take lines, and go on until one of all lines is done, at most for a second; at once if there is none."""
        session = self._session
        assert session is not None
        if self._answerer is None:
            from subspec_cli.serving.line_answers import LineAnswerer

            self._answerer = LineAnswerer(session, job_sha256, seed)
        answerer, done, until_s = self._answerer, list[Any](), time.monotonic() + _REPORT_S
        for line in lines:
            answerer.add(line)
        while not (done or answerer.is_idle or time.monotonic() > until_s):
            answerer.let_join()
            done = answerer.round()
        return WorkDone(tuple(done), answerer.in_flight, answerer.open_tokens, session.peak_memory_bytes())


def this_place() -> Place:
    """Return where this process runs."""
    from subspec_cli.streaming.host_memory import host_memory
    from subspec_cli.streaming.processors import gpu_models, processor_model, usable_processors

    host, memory = socket.gethostname(), host_memory()
    name, flags = processor_model()
    try:
        machine = _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        machine = f"{platform.system()} {host}"
    return Place(
        host,
        machine,
        ", ".join((name, " ".join(flags), *gpu_models())),
        usable_processors().threads,
        memory.free_bytes,
        memory.limit_bytes,
    )


def open_replica(
    share: Share, longest: LongestRequest | None, parallel: int, reporter: Reporter | None = None
) -> Session:
    """Open the session of a replica; the model is prepared first where it is not. Errors name the host."""
    # Ray sets this to the CPUs that an actor was given; OpenMP reads it when torch is imported.
    os.environ["OMP_NUM_THREADS"] = str(share.threads)
    from subspec_cli.reporter import SILENT
    from subspec_cli.session import open_session

    reporter = reporter or SILENT
    try:
        _prepare_if_needed(share.config, reporter)
        return open_session(
            share.config,
            reporter,
            count=None if longest is None else longest.tokens,
            parallel=parallel,
            sharers=share.sharers,
        )
    except SubspecError as error:
        error.message = f"on {printable(socket.gethostname())}: {error.message}"
        if os.path.isabs(share.config.model.model or ""):
            error.hint = error.hint or "a model in a directory must be at the same path on every node"
        raise


def _prepare_if_needed(config: Config, reporter: Reporter) -> None:
    """Write the substitutes of a model that this node has not prepared, downloading what is missing."""
    from subspec_cli.hub.model_name import parse_model_name
    from subspec_cli.substitutes.prepared_names import full_name, prepared_ids

    model = config.model.model
    assert model is not None
    if parse_model_name(full_name(model)).model_id in prepared_ids():
        return
    from subspec_cli.session.prepare import prepare
    from subspec_cli.setting_rules import DEFAULT_BITS
    from subspec_cli.substitutes.settings import SubstituteSettings

    chosen = config.substitute
    bits = config.model.bits or chosen.bits or DEFAULT_BITS
    prepare(
        model,
        SubstituteSettings(bits, chosen.optimizer, chosen.overrides),
        revision=config.model.revision,
        progress=lambda _: None,
        reporter=reporter,
    )
