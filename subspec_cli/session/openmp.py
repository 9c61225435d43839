"""OpenMP's settings, which its library reads once, when PyTorch loads it. No torch here."""

from __future__ import annotations

import os
from collections.abc import MutableMapping


def set_openmp_defaults(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what a run needs of OpenMP, before PyTorch is imported.

    Threads that wait spin for microseconds, not for milliseconds, or a draft step takes ten times as long whenever
    another program wants a core; the user's own value wins. OpenMP must grant the threads that PyTorch asks for: with
    fewer, oneDNN's products leave a part of their results unwritten.
    """
    environment.setdefault("GOMP_SPINCOUNT", "2000")
    environment["OMP_DYNAMIC"] = "false"
    limit = environment.get("OMP_THREAD_LIMIT", "")
    if limit.isdecimal() and int(limit) > 0:
        wanted = environment.get("OMP_NUM_THREADS", "")
        threads = int(wanted) if wanted.isdecimal() and int(wanted) > 0 else (os.cpu_count() or 1)
        environment["OMP_NUM_THREADS"] = str(min(threads, int(limit)))
