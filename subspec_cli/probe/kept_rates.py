"""How fast earlier work was, kept as small files: the latest download, preparation and streaming. No torch."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Final

from subspec_cli.errors import IntegrityError, SubspecError
from subspec_cli.files.atomic_write import atomic_write
from subspec_cli.files.home import make_home_directory, subspec_home
from subspec_cli.files.json_object import parse_json_object
from subspec_cli.files.regular_file import read_small_file

DOWNLOAD: Final = "download"
_MOST_BYTES: Final = 1 << 12
_LEAST_BYTES: Final = 4 << 20
"""Fewer bytes say more about how work begins than about its rate."""
_FIELD: Final = "bytes_per_s"


def preparing(optimizer: str) -> str:
    """Return the name of the rate at which 16-bit layers are quantized."""
    return f"prepare-{optimizer}"


def streaming(disk: int) -> str:
    """Return the name of the rate at which passes read weights from a device, past the page cache."""
    return f"stream-{disk}"


def keep_rate(name: str, done_bytes: float, seconds: float) -> None:
    """Keep the rate of some work, in place of the last one; a home that cannot be written is no reason to fail."""
    if done_bytes < _LEAST_BYTES or seconds <= 0:
        return
    with suppress(SubspecError):  # the next plan shows sizes without times
        path = _path(name)
        make_home_directory(path.parent)
        atomic_write(path, json.dumps({_FIELD: done_bytes / seconds}).encode() + b"\n")


def kept_rate(name: str) -> float | None:
    """Return the rate of the last such work in bytes per second; None if there was none or it cannot be read."""
    try:
        path = _path(name)
        rate = parse_json_object(read_small_file(path, _MOST_BYTES), str(path), IntegrityError).get(_FIELD)
    except (SubspecError, OSError):
        return None
    return float(rate) if isinstance(rate, int | float) and 0 < rate < math.inf else None


def forget_rate(name: str) -> None:
    """Keep no rate of this name."""
    with suppress(SubspecError, OSError):
        _path(name).unlink(missing_ok=True)


def _path(name: str) -> Path:
    return subspec_home() / "rates" / f"{name}.json"
