"""Costs that were probed on this machine, kept as small JSON files. Losing them costs a new probe only. No torch."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.errors import IntegrityError, ResourceError, SubspecError
from subspec_cli.files.atomic_write import atomic_write
from subspec_cli.files.home import make_home_directory, subspec_home
from subspec_cli.files.json_object import parse_json_object
from subspec_cli.files.regular_file import read_small_file
from subspec_cli.planning.costs import MachineCosts
from subspec_cli.substitutes.settings import SubstituteSettings
from subspec_cli.versions import library_versions

_MOST_BYTES: Final = 1 << 20
_FORMAT: Final = 3


def known_costs(about: dict[str, Any]) -> MachineCosts | None:
    """Return the kept costs; None if there are none or they cannot be read."""
    values = read_probe(about)
    try:
        return None if values is None else MachineCosts.from_dict(values)
    except (KeyError, TypeError, ValueError, AssertionError, AttributeError):
        return None


def keep_costs(about: dict[str, Any], costs: MachineCosts) -> None:
    """Keep costs for the next run."""
    write_probe(about, costs.as_dict())


def probe_subject(
    geometry: ModelGeometry, settings: SubstituteSettings, device: str, directory: Path
) -> dict[str, Any]:
    """Return everything that costs depend on: machine, threads, libraries, disk, model shapes, substitutes."""
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


def read_probe(about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what was kept for exactly this machine and model; None if nothing usable is there."""
    path = _path(about)
    try:
        document = parse_json_object(read_small_file(path, _MOST_BYTES), str(path), IntegrityError)
    except (SubspecError, OSError):
        return None
    costs = document.get("costs")
    return costs if document.get("about") == _plain(about) and isinstance(costs, dict) else None


def write_probe(about: Mapping[str, Any], costs: Mapping[str, Any]) -> None:
    """Keep costs. If the home directory cannot be written, the next run probes again."""
    path = _path(about)
    document = {"about": _plain(about), "costs": costs}
    with contextlib.suppress(ResourceError):
        make_home_directory(path.parent)
        atomic_write(path, json.dumps(document, indent=1).encode() + b"\n")


def _path(about: Mapping[str, Any]) -> Path:
    text = json.dumps({"format": _FORMAT, **about}, sort_keys=True)
    return subspec_home() / "probes" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def _plain(about: Mapping[str, Any]) -> Any:  # noqa: ANN401 - JSON
    return json.loads(json.dumps({"format": _FORMAT, **about}))
