"""What each of several replicas takes of its machine: threads, memory and the disk's rate. No Ray here."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Final

from subspec_cli.config import Config
from subspec_cli.errors import ResourceError, UsageError
from subspec_cli.planning.request import DEFAULT_SHARE
from subspec_cli.serving.replica import Place, Share
from subspec_cli.units import GIB, format_bytes, printable
from subspec_cli.versions import __version__

_LEAST_GIB: Final = 0.01


class Placement:
    """Where the replicas of one model are, and whose turn it is to load it.

    On each machine one replica loads first, alone: it may prepare the model, and times the machine undisturbed. The
    others find what it has kept.
    """

    def __init__(self, config: Config, replicas: int, wanted_threads: str | None) -> None:
        """`config` names the device; `wanted_threads` is the user's OMP_NUM_THREADS."""
        self._config = config
        self._replicas = replicas
        self._wanted_threads = wanted_threads
        self._places: dict[Hashable, Place] = {}
        self._threads: int | None = None
        """None until every replica has a place for the first time."""
        self._free_bytes: dict[str, int] = {}
        """By machine, before the first replica took any."""
        self._loading: dict[Hashable, str] = {}
        self._loaded: set[str] = set()
        """Machines on which a replica has loaded the model."""

    def place(self, replica: Hashable, place: Place) -> list[str]:
        """Note where a replica is; return what a user should know. Raises UsageError for another version there."""
        free_bytes = self._free_bytes.setdefault(place.machine, place.free_bytes)
        self._places[replica] = dataclasses.replace(place, free_bytes=free_bytes)
        if self._threads is not None or len(self._places) < self._replicas:
            check_versions([place])
            return []
        places = list(self._places.values())
        check_versions(places)
        self._threads = common_threads(places, self._wanted_threads)
        return unlike_places(places)

    def share(self, replica: Hashable) -> Share | None:
        """Return what a replica may load the model with, once it is its turn; None before."""
        machine = self._places[replica].machine
        if self._threads is None or (machine in self._loading.values() and machine not in self._loaded):
            return None
        share = share_of(replica, self._places, self._config, self._threads)
        self._loading[replica] = machine
        return share

    def loaded(self, replica: Hashable) -> None:
        """Note that a replica has loaded the model."""
        self._loaded.add(self._loading.pop(replica))

    def lost(self, replica: Hashable) -> None:
        """Forget a replica that died."""
        self._places.pop(replica, None)
        self._loading.pop(replica, None)

    def forget_one_beyond(self, replica: Hashable) -> None:
        """Forget a replica on the machine of this one if there are more than wanted: which one died is not known."""
        machine = self._places[replica].machine
        if len(self._places) > self._replicas:
            old = (key for key, place in self._places.items() if place.machine == machine and key != replica)
            self.lost(next(old, next(iter(self._places))))


def check_versions(places: Sequence[Place]) -> None:
    """Raise UsageError if another version of subspec is installed anywhere."""
    for place in places:
        if place.version != __version__:
            raise UsageError(
                f"subspec {place.version} is installed on {printable(place.host)}, {__version__} here",
                f"pip install subspec-cli=={__version__} there",
            )


def unlike_places(places: Sequence[Place]) -> list[str]:
    """Return a note if processors or GPUs differ."""
    kinds = {place.processor: place.host for place in places}
    if len(kinds) == 1:
        return []
    hosts = " and ".join(sorted(printable(host) for host in kinds.values()))
    return [
        f"{hosts} have other processors or GPUs: an answer may differ by a rounding where another gives it"
    ]


def common_threads(places: Sequence[Place], wanted: str | None) -> int:
    """Return the threads of every replica, the same for all: sums are rounded alike only then.

    `wanted` is the user's OMP_NUM_THREADS. Without it each machine's threads are divided among its replicas, and the
    fewest are taken.
    """
    if wanted is not None and wanted.strip().isdecimal() and int(wanted) > 0:
        return int(wanted)
    sharers = Counter(place.machine for place in places)
    return max(1, min(place.threads // sharers[place.machine] for place in places))


def share_of(replica: Hashable, places: Mapping[Hashable, Place], config: Config, threads: int) -> Share:
    """Return what a replica takes, of all that have a place; raises ResourceError if the budgets exceed a machine.

    A budget that the user gave is each replica's own; one that nobody gave is an equal part of what is free.
    """
    place = places[replica]
    here = [each for each in places.values() if each.machine == place.machine]
    sharers, memory = len(here), config.memory
    if sharers == 1:
        return Share(config, threads, 1)
    on_cpu, free_bytes = memory.device == "cpu", min(each.free_bytes for each in here)
    given = memory.memory_gib if on_cpu else memory.ram_gb
    option = "--memory-gb" if on_cpu else "--ram-gb"
    if given is not None and given * sharers * GIB > place.total_bytes:
        raise ResourceError(
            f"{sharers} replicas of {format_bytes(given * GIB)} are more than {printable(place.host)} has: "
            f"{format_bytes(place.total_bytes)}",
            f"{option} {place.total_bytes * DEFAULT_SHARE / sharers / GIB:.2f} leaves a quarter to others",
        )
    if given is None:
        part = max(_LEAST_GIB, free_bytes * DEFAULT_SHARE / sharers / GIB)
        own = (
            dataclasses.replace(memory, memory_gib=part)
            if on_cpu
            else dataclasses.replace(memory, ram_gb=part)
        )
        config = dataclasses.replace(config, memory=own)
    return Share(config, threads, sharers)
