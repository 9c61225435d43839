"""The table of `subspec models list`: fitted to a terminal, or whole and separated by tabs for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from subspec_cli.units import format_bytes

if TYPE_CHECKING:
    from subspec_cli.substitutes.inventory import StoredModel, Target

HEADERS: Final = ("model", "revision", "substitutes", "state", "target", "size", "last used")
TAB_HEADERS: Final = (
    "model",
    "revision",
    "substitutes",
    "state",
    "target_bytes",
    "substitute_bytes",
    "last_used",
    "directory",
)
_SPARED: Final = ("revision", "target", "last used", "substitutes")
"""Columns that a narrow terminal does not get, the first to go first; --json has them."""
_REVISION_LETTERS: Final = 12
_LEAST_NAME_LETTERS: Final = 20
_MOST_NAME_LETTERS: Final = 60
_GAP, _EDGES = 3, 2  # of the table's style


def fitted_table(stored: Sequence[StoredModel], width: int) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of at most `width` columns, the last row the total; columns go before names get short."""
    total = ["all", "", "", "", "", format_bytes(sum(item.size_bytes for item in stored)), ""]
    table = [list(HEADERS), *(_row(item) for item in stored), total]
    for spared in _SPARED:
        if _name_room(table, width) >= _LEAST_NAME_LETTERS:
            break
        place = table[0].index(spared)
        table = [[*row[:place], *row[place + 1 :]] for row in table]
    room = min(max(_name_room(table, width), 2), _MOST_NAME_LETTERS)
    headers, *rows = [[_shortened(row[0], room), *row[1:]] for row in table]
    return headers, rows


def tab_rows(stored: Sequence[StoredModel]) -> list[list[str]]:
    """Names of columns and one row for each set, with nothing shortened; sizes in bytes, times in UTC."""
    return [list(TAB_HEADERS), *(_tab_row(item) for item in stored)]


def label(stored: StoredModel) -> str:
    """Width and optimizer of the substitutes, and `+residual`; why they cannot be read, if that is so."""
    if stored.manifest is None:
        return stored.problem
    return stored.manifest.settings.label + ("+residual" if stored.has_residuals else "")


def _name_room(table: Sequence[Sequence[str]], width: int) -> int:
    """Columns that are left for the first cell."""
    others = sum(max(len(row[place]) for row in table) for place in range(1, len(table[0])))
    return width - _EDGES - others - _GAP * (len(table[0]) - 1)


def _shortened(name: str, room: int) -> str:
    """The end of a name that is too long, which tells models apart."""
    return name if len(name) <= room else f"…{name[1 - room :]}"


def _row(stored: StoredModel) -> list[str]:
    target, used_s = stored.target(), stored.last_used_s
    return [
        stored.model_id,
        stored.manifest.commit[:_REVISION_LETTERS] if stored.manifest else "-",
        label(stored) if stored.manifest else "-",
        stored.state,
        "not here" if target is None else _target_text(target),
        format_bytes(stored.size_bytes),
        "never" if used_s is None else f"{datetime.fromtimestamp(used_s):%Y-%m-%d %H:%M}",
    ]


def _target_text(target: Target) -> str:
    return format_bytes(target.size_bytes) + (" (8-bit)" if target.bits == 8 else "")


def _tab_row(stored: StoredModel) -> list[str]:
    target, used_s = stored.target(), stored.last_used_s
    return [
        stored.model_id,
        stored.manifest.commit if stored.manifest else "",
        label(stored),
        stored.state,
        "" if target is None else str(target.size_bytes),
        str(stored.size_bytes),
        "" if used_s is None else f"{datetime.fromtimestamp(used_s, UTC):%Y-%m-%dT%H:%M:%SZ}",
        str(stored.directory),
    ]
