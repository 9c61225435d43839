"""Bytes and seconds: parse what users write and format what users read. GiB = 2**30 bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Final

from subspec_cli.errors import UsageError

GIB = 1 << 30
MIB = 1 << 20
SIZE_WORDS: Final = (
    "a size above 0: GiB as a number, such as 8, or with MB, MiB, GB or GiB, such as 500MB or 1.5GiB"
)
"""What `parse_size_gib` takes, for messages."""
_UNIT_BYTES: Final = {"": GIB, "mb": 10**6, "mib": MIB, "gb": 10**9, "gib": GIB}
_SIZE = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?) ?(|[mg]i?b)", re.IGNORECASE | re.ASCII)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def parse_size_gib(text: str) -> float:
    """Parse a size such as `500MB`, `1.5GiB` or `8`, a bare number of GiB, and return GiB.

    Raises ValueError for anything else; the caller knows which option to name.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    number, unit = match.groups()
    return float(number) * _UNIT_BYTES[unit.lower()] / GIB


def gib_to_bytes(gib: float, option: str) -> int:
    """Convert a budget in GiB to bytes; raises UsageError, which names `option`, unless it is positive and finite."""
    if not math.isfinite(gib) or gib <= 0 or gib > 1e6:
        raise UsageError(f"{option} {gib:g} is no budget", f"give GiB as a positive number: {option} 8")
    return int(gib * GIB)


def format_bytes(size_bytes: float, rounding: Callable[[float], int] | None = None) -> str:
    """Format bytes as a short text in binary units: 14.2 MiB.

    `rounding` replaces rounding to the nearest: `math.ceil` for what must be enough, `math.floor` for what is too
    little, so that the two texts always differ.
    """
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            digits = 0 if unit == "B" else 1 if value >= 10 else 2
            if rounding is not None:
                value = rounding(value * 10**digits) / 10**digits
            return f"{value:.{digits}f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """Format seconds as 850 ms, 12.3 s or 4:05."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_work_time(seconds: float) -> str:
    """Format the time of a step or pass with three digits: 0.42 ms, 60.4 ms, 2.03 s."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.2f} s"


def plural(count: float, noun: str) -> str:
    """Return a noun as it stands after a count: 1 token, 2 tokens, 0 passes."""
    return noun if count == 1 else f"{noun}es" if noun.endswith("s") else f"{noun}s"


def counted(count: int, noun: str) -> str:
    """Return a count and its noun: 1 token, 2 tokens."""
    return f"{count} {plural(count, noun)}"


def printable(text: str) -> str:
    """Make foreign text safe for a terminal: C0, C1 and bidirectional controls become escapes."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text)
