"""OpenMP's settings, which its library reads once, when PyTorch loads it. No torch here."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from subspec_cli.streaming.processors import Processors, usable_processors


def set_openmp_defaults(
    environment: MutableMapping[str, str] = os.environ, processors: Processors | None = None
) -> None:
    """Set what a run needs of OpenMP, before PyTorch is imported.

    Threads that wait spin for microseconds, not for milliseconds, or a draft step takes ten times as long whenever
    another program wants a core; the user's own value wins. OpenMP must grant the threads that PyTorch asks for: with
    fewer, oneDNN's products leave a part of their results unwritten. A quota of processor time counts as cores,
    unless the user names a number of threads. Calling this again changes nothing.
    """
    environment.setdefault("GOMP_SPINCOUNT", "2000")
    environment["OMP_DYNAMIC"] = "false"
    processors = processors or usable_processors()
    wanted = _number(environment.get("OMP_NUM_THREADS", "").partition(",")[0])
    limit = _number(environment.get("OMP_THREAD_LIMIT", ""))
    threads = wanted or processors.threads
    if limit is not None:
        threads = min(threads, limit)
    if limit is not None or (wanted is None and processors.quota is not None):
        environment["OMP_NUM_THREADS"] = str(threads)


def _number(text: str) -> int | None:
    """Return a positive number; None for anything else, which OpenMP ignores too."""
    text = text.strip()
    return int(text) if text.isdecimal() and int(text) > 0 else None
