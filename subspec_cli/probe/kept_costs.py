"""Costs that were probed on this machine, kept as small JSON files. Losing them costs a new probe only. No torch.

A disk may have been busy when it was probed, and may be slower or faster on another day. On the CPU it is the link,
and each run keeps the rate at which its passes read. Where that is not what was probed, it takes its place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.errors import IntegrityError, ResourceError, SubspecError
from subspec_cli.files.atomic_write import atomic_write
from subspec_cli.files.home import make_home_directory, subspec_home
from subspec_cli.files.json_object import parse_json_object
from subspec_cli.files.regular_file import read_small_file
from subspec_cli.planning.costs import MachineCosts, snapped
from subspec_cli.probe.kept_rates import forget_rate, kept_rate, streaming
from subspec_cli.streaming.processors import gpu_models, processor_model, usable_processors
from subspec_cli.substitutes.settings import SubstituteSettings
from subspec_cli.versions import library_versions

_MOST_BYTES: Final = 1 << 20
_FORMAT: Final = 6
_SAME_LINK: Final = math.log(1.15)
"""Disks swing that much from run to run, and plans are to repeat."""
_SPEED_VARIABLES: Final = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OMP_PLACES",
    "OMP_PROC_BIND",
    "OMP_WAIT_POLICY",
    "GOMP_CPU_AFFINITY",
    "GOMP_SPINCOUNT",
    "CUDA_VISIBLE_DEVICES",
)
"""With these users choose another instruction set, other threads or another GPU."""


def known_costs(about: dict[str, Any]) -> MachineCosts | None:
    """Return the kept costs with the link as the last run had it; None if there are none or they cannot be read."""
    try:
        values = read_probe(about)
        if values is None:
            return None
        costs = MachineCosts.from_dict(values)
    except (ResourceError, KeyError, TypeError, ValueError, AssertionError, AttributeError):
        return None
    return costs if about["device"] != "cpu" else _with_link(costs, kept_rate(streaming(about["disk"])))


def keep_costs(about: dict[str, Any], costs: MachineCosts) -> None:
    """Keep costs for the next run; raises ResourceError or IntegrityError if they cannot be written."""
    write_probe(about, costs.as_dict())
    forget_rate(streaming(about["disk"]))


def _with_link(costs: MachineCosts, bytes_per_s: float | None) -> MachineCosts:
    """Return the costs of a CPU whose passes read at this rate; small differences change nothing."""
    if bytes_per_s is None or abs(math.log(bytes_per_s / costs.link_bytes_per_s)) < _SAME_LINK:
        return costs
    rate = snapped(bytes_per_s)
    return replace(costs, link_bytes_per_s=rate, pageable_bytes_per_s=rate, disk_bytes_per_s=rate)


def probe_subject(
    geometry: ModelGeometry,
    settings: SubstituteSettings,
    device: str,
    directory: Path,
    *,
    rebuilds: bool = False,
) -> dict[str, Any]:
    """Return everything that costs depend on: machine, threads, libraries, disk, model shapes, substitutes.

    Environment variables are read as they are. `plan` and `run` find the same costs, because both set OpenMP's first.
    """
    name, instructions = processor_model()
    return {
        "processor": name,
        "instructions": instructions,
        "processors": dataclasses.asdict(usable_processors()),
        "environment": {name: os.environ.get(name, "") for name in _SPEED_VARIABLES},
        "device": device,
        "gpus": gpu_models() if device == "cuda" else [],
        "torch": library_versions()["torch"],
        "compiles": find_spec("numba") is not None,
        "disk": directory.stat().st_dev,
        "geometry": dataclasses.asdict(geometry),
        "substitutes": {"bits": settings.bits, "overrides": list(settings.overrides)},
        **({"rebuilds": True, "numba": find_spec("numba") is not None} if rebuilds else {}),
    }


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
    """Keep costs. Raises ResourceError or IntegrityError if they cannot be written."""
    path = _path(about)
    document = {"about": _plain(about), "costs": costs}
    make_home_directory(path.parent)
    atomic_write(path, json.dumps(document, indent=1).encode() + b"\n")


def _path(about: Mapping[str, Any]) -> Path:
    text = json.dumps({"format": _FORMAT, **about}, sort_keys=True)
    return subspec_home() / "probes" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def _plain(about: Mapping[str, Any]) -> Any:  # noqa: ANN401 - JSON
    return json.loads(json.dumps({"format": _FORMAT, **about}))
