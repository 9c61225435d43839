"""Two records of the same suite beside each other, and the settings in which two records differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from subspec_cli.bench.figures import FIGURES, PEER_FIGURES, Figure, Spread
from subspec_cli.errors import UsageError

_FILES: Final = ("resume", "plot")
"""Settings that say where answers come from and figures go to, not what they are."""
_MACHINE: Final = ("host", "cpu", "cores", "processor_quota", "gpus")
"""Fields of a record that say where it was made."""


@dataclass(frozen=True, slots=True)
class ComparedFigure:
    """One figure of one row in two records."""

    category: str
    figure: Figure
    first: Spread | Literal["void"] | None
    second: Spread | Literal["void"] | None

    @property
    def ratio(self) -> float | None:
        """The second median over the first; None unless both were measured."""
        if isinstance(self.first, Spread) and isinstance(self.second, Spread) and self.first.median:
            return self.second.median / self.first.median
        return None

    @property
    def overlap(self) -> bool | None:
        """Whether the ranges overlap; None unless both were repeated, because one figure has no range."""
        if not isinstance(self.first, Spread) or not isinstance(self.second, Spread):
            return None
        if any(spread.least == spread.most for spread in (self.first, self.second)):
            return None
        return self.first.least <= self.second.most and self.second.least <= self.first.most


def compare_records(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[ComparedFigure, ...]:
    """Compare the rows that both records have. Raises UsageError if they asked different questions."""
    suites = first.get("suite"), second.get("suite")
    if suites[0] != suites[1]:
        raise UsageError(f"the records are of other suites: {suites[0]} and {suites[1]}")
    if first.get("questions_sha256") != second.get("questions_sha256"):
        raise UsageError("the records are of other questions", "give both the same --limit and --questions")
    rows = {row["category"]: row for row in second["rows"]}
    return tuple(
        ComparedFigure(row["category"], figure, _spread(row, figure), _spread(rows[row["category"]], figure))
        for row in first["rows"]
        if row["category"] in rows
        for figure in FIGURES
        if figure not in PEER_FIGURES or _spread(row, figure) or _spread(rows[row["category"]], figure)
    )


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return settings, versions and parts of the machine that differ, as `name: one and other`."""
    one, other = dict(_settings(first)), dict(_settings(second))
    return [
        f"{name}: {one.get(name)} and {other.get(name)}"
        for name in dict.fromkeys((*one, *other))
        if one.get(name) != other.get(name)
    ]


def _settings(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in ("suite", "questions_sha256"):
        yield key, document.get(key)
    for section, values in document.get("config", {}).items():
        for key, value in values.items():
            if section == "bench" and key in _FILES:
                continue
            # As JSON has it, because one of the two may come from a file.
            yield f"{section}.{key}", json.loads(json.dumps(value, default=str))
    for name, version in document.get("versions", {}).items():
        yield f"version of {name}", version
    for field in _MACHINE:
        yield field, document.get("record", {}).get(field)


def _spread(row: Mapping[str, Any], figure: Figure) -> Spread | Literal["void"] | None:
    if figure in row["void"]:
        return "void"
    return Spread(row[figure], *row["spread"][figure]) if figure in row["spread"] else None
