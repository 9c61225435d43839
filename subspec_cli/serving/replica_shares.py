"""What each of several replicas takes of its machine: threads, memory and the disk's rate. No Ray here."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from subspec_cli.config import Config
from subspec_cli.errors import ResourceError, UsageError
from subspec_cli.planning.request import DEFAULT_SHARE
from subspec_cli.serving.replica import Place, Share
from subspec_cli.units import GIB, format_bytes, printable
from subspec_cli.versions import __version__

_LEAST_GIB: Final = 0.01


def check_places(places: Sequence[Place]) -> list[str]:
    """Check what can be seen before a model is loaded; return notes. Raises UsageError for another version."""
    for place in places:
        if place.version != __version__:
            raise UsageError(
                f"subspec {place.version} is installed on {printable(place.host)}, {__version__} here",
                f"pip install subspec-cli=={__version__} there",
            )
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


def share_of(number: int, places: Mapping[int, Place], config: Config, threads: int) -> Share:
    """Return what a replica takes, of all that have a place; raises ResourceError if the budgets exceed a machine.

    A budget that the user gave is each replica's own; one that nobody gave is an equal part of what is free.
    """
    place = places[number]
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
