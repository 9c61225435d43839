"""What was timed on this machine, kept by machine and model: a small JSON file each, which may be lost."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from subspec_cli.errors import IntegrityError, ResourceError, SubspecError
from subspec_cli.store.files import atomic_write, read_small_file
from subspec_cli.store.home import make_home_directory, subspec_home
from subspec_cli.store.json_object import parse_json_object

_MOST_BYTES: Final = 1 << 20
_FORMAT: Final = 2


def read_probe(about: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was kept for exactly this machine and model; None if nothing usable is there."""
    path = _path(about)
    try:
        document = parse_json_object(read_small_file(path, _MOST_BYTES), str(path), IntegrityError)
    except (SubspecError, OSError):
        return None
    costs = document.get("costs")
    return costs if document.get("about") == _plain(about) and isinstance(costs, dict) else None


def write_probe(about: Mapping[str, Any], costs: Mapping[str, Any]) -> None:
    """Keep it; where the home cannot be written, it is timed again the next time."""
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
