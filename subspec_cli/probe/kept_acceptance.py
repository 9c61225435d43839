"""What the target accepted of drafts, kept between runs by model, substitutes and temperature. No torch.

Several processes may end at once: each adds its counts to what the file holds then, under a lock. Losing the counts
costs a plan that assumes them again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from subspec_cli.config import SamplingConfig
from subspec_cli.errors import BusyError, IntegrityError, SubspecError
from subspec_cli.files.atomic_write import atomic_write
from subspec_cli.files.home import make_home_directory, subspec_home
from subspec_cli.files.json_object import parse_json_object
from subspec_cli.files.lock import directory_lock
from subspec_cli.files.regular_file import read_small_file
from subspec_cli.planning.acceptance import Acceptance
from subspec_cli.substitutes.settings import SubstituteSettings

_FORMAT: Final = 1
_MOST_BYTES: Final = 1 << 16
_TEMPERATURES: Final = (0.5, 0.85)
"""Upper ends of the classes of temperature above 0, the last of which has none."""
_WAIT_S: Final = 2.0
"""Longest wait for other processes, which hold the lock for milliseconds."""
_POLL_S: Final = 0.02


def acceptance_subject(
    model_id: str, commit: str, settings: SubstituteSettings, sampling: SamplingConfig
) -> dict[str, Any]:
    """Return what acceptance depends on most: the model, its substitutes, and how far tokens are drawn by chance."""
    return {
        "model": model_id,
        "commit": commit,
        "bits": settings.bits,
        "optimizer": settings.optimizer,
        "overrides": [list(item) for item in settings.overrides],
        "temperature": _temperature_class(sampling),
    }


def _temperature_class(sampling: SamplingConfig) -> str:
    if sampling.is_greedy:
        return "greedy"
    ends = (f"up to {end}" for end in _TEMPERATURES if sampling.temperature <= end)
    return next(ends, f"above {_TEMPERATURES[-1]}")


def kept_acceptance(about: Mapping[str, Any]) -> Acceptance | None:
    """Return the counts of earlier runs; None if there are none, or they cannot be read."""
    try:
        path = _path(about)
        document = parse_json_object(read_small_file(path, _MOST_BYTES), str(path), IntegrityError)
        if document.get("about") != _with_format(about):
            return None
        return Acceptance.from_dict(document["acceptance"])
    except (SubspecError, OSError, KeyError, TypeError, ValueError):
        return None


def keep_acceptance(about: Mapping[str, Any], found: Acceptance) -> None:
    """Add the counts of a run to those of earlier ones.

    Raises ResourceError, IntegrityError or BusyError if they cannot be written.
    """
    path = _path(about)
    make_home_directory(path.parent)
    until = time.monotonic() + _WAIT_S
    while True:
        try:
            with directory_lock(path.parent):
                total = (kept_acceptance(about) or Acceptance()).then(found)
                document = {"about": _with_format(about), "acceptance": total.as_dict()}
                atomic_write(path, json.dumps(document, allow_nan=False).encode() + b"\n")
                return
        except BusyError:
            if time.monotonic() >= until:
                raise
            time.sleep(_POLL_S)


def _path(about: Mapping[str, Any]) -> Path:
    text = json.dumps(_with_format(about), sort_keys=True)
    return subspec_home() / "acceptance" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def _with_format(about: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": _FORMAT, **about}
