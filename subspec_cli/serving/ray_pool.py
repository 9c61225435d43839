"""Replicas as Ray actors: they are placed, load the model, answer, and are replaced when they die."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import ray
from ray.exceptions import RayError, RayTaskError

from subspec_cli.config import Config
from subspec_cli.serving.batch import LongestRequest
from subspec_cli.serving.dispatch import Answered, Event, Lost, Ready
from subspec_cli.serving.job import JobLine
from subspec_cli.serving.ray_cluster import Cluster
from subspec_cli.serving.replica import Place, Replica, ReplicaFacts, WorkDone
from subspec_cli.serving.replica_shares import Placement
from subspec_cli.units import counted, format_seconds, printable

_WAIT_S: Final = 0.5
"""Time after which the command shows its progress again."""


@dataclass(frozen=True, slots=True)
class ReplicaOrder:
    """What all replicas of a job are opened with."""

    config: Config
    """With a name of the model, and with a device."""
    longest: LongestRequest | None
    parallel: int
    job_sha256: str


class RayPool:
    """The replicas of one job. Use as a context manager."""

    def __init__(self, cluster: Cluster, order: ReplicaOrder, note: Callable[[str], None]) -> None:
        self._cluster = cluster
        self._order = order
        self._note = note
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, int] = {}
        """Replica by the reference of what Ray will return."""
        self._placement = Placement(order.config, cluster.replicas, os.environ.get("OMP_NUM_THREADS"))
        self._unopened: list[int] = []
        """Replicas that have a place and wait for their turn to load the model."""
        self._began_s: dict[int, float] = {}
        self._noted: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._actors.values():
            ray.kill(actor)

    def start(self, replica: int) -> None:
        """Have Ray place a replica."""
        self._began_s[replica] = time.monotonic()
        # Not Ray's own restarts: the dispatcher must know what a dead replica held, and how often one died.
        actor = ray.remote(Replica).options(max_restarts=0, **self._cluster.actor_options).remote()
        self._actors[replica] = actor
        self._calls[actor.place.remote()] = replica

    def work(self, replica: int, lines: list[JobLine], seed: int) -> None:
        """Hand lines to a replica."""
        reference = self._actors[replica].work.remote(lines, self._order.job_sha256, seed)
        self._calls[reference] = replica

    def events(self) -> list[Event]:
        """Return what has happened, after waiting a moment; raises what every replica would fail with."""
        waiting = list(self._calls)
        ready, _ = ray.wait(waiting, num_returns=1, timeout=_WAIT_S)
        if ready:
            ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        events = [event for reference in ready if (event := self._event(reference)) is not None]
        self._open_placed()
        return events

    def _event(self, reference: Any) -> Event | None:  # noqa: ANN401 - Ray's
        replica = self._calls.pop(reference, None)
        if replica is None:  # it died meanwhile
            return None
        try:
            value = ray.get(reference)
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            return self._lost(replica, error)
        match value:
            case Place():
                self._place(replica, value)
            case ReplicaFacts():
                return self._ready(replica, value)
            case WorkDone():
                return Answered(
                    replica, value.results, value.in_flight, value.open_tokens, value.peak_memory_bytes
                )
        return None

    def _place(self, replica: int, place: Place) -> None:
        for note in self._placement.place(replica, place):
            self._note(note)
        self._unopened.append(replica)

    def _open_placed(self) -> None:
        """Let replicas load the model whose turn it is."""
        for replica in list(self._unopened):
            share = self._placement.share(replica)
            if share is not None:
                self._unopened.remove(replica)
                opening = self._actors[replica].open.remote(share, self._order.longest, self._order.parallel)
                self._calls[opening] = replica

    def _ready(self, replica: int, facts: ReplicaFacts) -> Ready:
        plan, host = facts.description.plan, printable(facts.place.host)
        self._placement.loaded(replica)
        took = format_seconds(time.monotonic() - self._began_s[replica])
        self._note(
            f"replica {replica + 1} is ready on {host} after {took}: {plan.resident_layers} resident + "
            f"{plan.streamed_layers} streamed layers, {counted(facts.description.threads, 'thread')}"
        )
        for note in facts.description.notes:
            if (text := f"note: {host}: {note}") not in self._noted:
                self._noted.add(text)
                self._note(text)
        return Ready(replica, facts)

    def _lost(self, replica: int, error: RayError) -> Lost:
        reason = _reason(error)
        self._note(f"replica {replica + 1} died and is started again: {reason}")
        ray.kill(self._actors.pop(replica))
        self._placement.lost(replica)
        self._unopened = [each for each in self._unopened if each != replica]
        self._calls = {reference: each for reference, each in self._calls.items() if each != replica}
        return Lost(replica, reason)


def _reason(error: RayError) -> str:
    """Return the part of Ray's paragraphs that a user can use."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = next((line for line in reversed(lines) if "died" in line or "Error" in line), "it has died")
    detail = found.partition("Worker exit detail: ")[2] or found
    return printable(detail.partition(" Some common causes")[0])[:300]
