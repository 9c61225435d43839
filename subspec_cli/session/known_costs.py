"""Costs that were probed before on this machine, for this model's shapes. No torch."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path
from typing import Any

from subspec_cli.placement.costs import MachineCosts
from subspec_cli.placement.geometry import ModelGeometry
from subspec_cli.store.manifest import SubstituteSettings
from subspec_cli.store.probes import read_probe, write_probe
from subspec_cli.versions import library_versions


def known_costs(about: dict[str, Any]) -> MachineCosts | None:
    """What was kept; None if nothing was, or nothing that can be read."""
    values = read_probe(about)
    try:
        return None if values is None else MachineCosts.from_dict(values)
    except (KeyError, TypeError, ValueError, AssertionError, AttributeError):
        return None


def keep_costs(about: dict[str, Any], costs: MachineCosts) -> None:
    """Keep them for the next run."""
    write_probe(about, costs.as_dict())


def probe_subject(
    geometry: ModelGeometry, settings: SubstituteSettings, device: str, directory: Path
) -> dict[str, Any]:
    """All that costs depend on: machine, threads, libraries, disk, the shapes of the model, its substitutes."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "device": device,
        "torch": library_versions()["torch"],
        "disk": directory.stat().st_dev,
        "geometry": dataclasses.asdict(geometry),
        "substitutes": {"bits": settings.bits, "overrides": list(settings.overrides)},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
