"""Bytes and seconds: parse what users write and format what users read. GiB = 2**30 bytes."""

from __future__ import annotations

import math
import re

from subspec_cli.errors import UsageError

GIB = 1 << 30
MIB = 1 << 20
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def gib_to_bytes(gib: float, option: str) -> int:
    """Convert a budget in GiB to bytes; raises UsageError, which names `option`, unless it is positive and finite."""
    if not math.isfinite(gib) or gib <= 0 or gib > 1e6:
        raise UsageError(f"{option} {gib:g} is no budget", f"give GiB as a positive number: {option} 8")
    return int(gib * GIB)


def format_bytes(size_bytes: float) -> str:
    """Format bytes as a short text in binary units: 14.2 MiB."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.{1 if value >= 10 else 2}f} {unit}"
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


def plural(count: float, noun: str) -> str:
    """Return a noun as it stands after a count: 1 token, 2 tokens, 0 passes."""
    return noun if count == 1 else f"{noun}es" if noun.endswith("s") else f"{noun}s"


def counted(count: int, noun: str) -> str:
    """Return a count and its noun: 1 token, 2 tokens."""
    return f"{count} {plural(count, noun)}"


def printable(text: str) -> str:
    """Make foreign text safe for a terminal: C0, C1 and bidirectional controls become escapes."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text)
