"""Wrap text by words into rows of a terminal, counted in cells."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import Final, NamedTuple, TextIO

_USUAL_WIDTH: Final = 80
_ZERO_WIDTH: Final = frozenset(("Mn", "Me", "Cf"))
_JOINER: Final = "\u200d"
_AS_EMOJI: Final = "\ufe0f"
_SKIN_TONES: Final = ("\U0001f3fb", "\U0001f3ff")
_REGIONAL: Final = ("\U0001f1e6", "\U0001f1ff")
_HANGUL: Final = ("\uac00", "\ud7a3")
_FINAL_JAMO: Final = ("\u1160", "\u11ff")
# No row begins with these in East Asian text, and none ends with the second group.
_NO_START: Final = frozenset(
    "、。，．・：；？！ー々）］｝」』】〉》〕…‥%,.:;?!)]}ぁぃぅぇぉっゃゅょァィゥェォッャュョ"  # noqa: RUF001
)
_NO_END: Final = frozenset("（［｛「『【〈《〔")  # noqa: RUF001


class _Atom(NamedTuple):
    """A word, or a character that stands for one, and the spaces after it."""

    text: str
    spaces: str


def cells(text: str) -> int:
    """Cells that a text takes at most: a terminal that joins a sequence of emoji shows it in fewer.

    So a row never grows beyond the width, whatever a terminal knows of emoji.
    """
    return sum(map(_char_cells, text))


def wrapped(line: str, width: int, *, indent: int = 0, folds: bool = True) -> list[str]:
    """A line as rows of at most `width` cells, broken between words. As the line grows, only its last row changes.

    Rows after the first have room for `indent` spaces, which are not in them. A word longer than a row is cut if
    `folds`, else left whole. Spaces where a row ends are dropped, but for those of the last row.
    """
    rows: list[str] = []
    row, room = line[: len(line) - len(line.lstrip(" "))], width
    spaces = ""
    for atom in _atoms(line[len(row) :]):
        if row and cells(row) + len(spaces) + cells(atom.text) > room and (row.strip() or rows):
            rows.append(row)
            row, spaces, room = "", "", width - indent
        row += spaces + atom.text
        spaces = atom.spaces
        while folds and cells(row) > room and (head := _head(row, room)) != row:
            rows.append(head)
            row, room = row[len(head) :], width - indent
    return [*rows, row + spaces]


def wrapped_text(text: str, width: int) -> str:
    """Lines wrapped by words. A path longer than a row is left whole, for the terminal to wrap."""
    return "\n".join(row for line in text.split("\n") for row in wrapped(line, width, folds=False))


def terminal_width(stream: TextIO) -> int:
    """Columns of the terminal that a stream writes to; COLUMNS replaces them."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(stream.fileno()).columns or _USUAL_WIDTH
    except (OSError, ValueError):
        return _USUAL_WIDTH


def _head(text: str, room: int) -> str:
    """The longest beginning of at most `room` cells, or the first character, whole with what belongs to it."""
    head, used = "", 0
    for cluster in _clusters(text):
        used += cells(cluster)
        if head and used > room:
            return head
        head += cluster
    return head


def _atoms(text: str) -> Iterator[_Atom]:
    """Cut a text where rows may begin: after spaces, and around wide characters but Hangul."""
    atom, spaces = "", ""
    stands_alone = False
    for cluster in _clusters(text):
        if cluster == " ":
            spaces += cluster
            continue
        wide = _stands_alone(cluster[0])
        joins = not spaces and (
            (stands_alone and cluster[0] in _NO_START)
            or atom[-1:] in _NO_END
            or not (stands_alone or wide)
            or (wide and cluster[0] in _NO_START)
        )
        if atom and not joins:
            yield _Atom(atom, spaces)
            atom = ""
        atom, spaces, stands_alone = atom + cluster, "", wide or (stands_alone and joins)
    if atom or spaces:
        yield _Atom(atom, spaces)


def _clusters(text: str) -> Iterator[str]:
    """Characters with the marks, joiners and colours that belong to them; pairs of letters of a flag."""
    cluster = ""
    for char in text:
        joins = cluster and (
            unicodedata.category(char) in ("Mn", "Me", "Mc", "Cf")
            or cluster[-1] == _JOINER
            or _within(char, _SKIN_TONES)
            or _within(char, _FINAL_JAMO)
            or (len(cluster) == 1 and _within(cluster, _REGIONAL) and _within(char, _REGIONAL))
        )
        if cluster and not joins:
            yield cluster
            cluster = ""
        cluster += char
    if cluster:
        yield cluster


def _stands_alone(char: str) -> bool:
    return _char_cells(char) == 2 and not _within(char, _HANGUL)


@lru_cache(maxsize=4096)
def _char_cells(char: str) -> int:
    if char == _AS_EMOJI:  # makes a narrow character wide
        return 1
    if unicodedata.category(char) in _ZERO_WIDTH or _within(char, _FINAL_JAMO):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _within(char: str, borders: tuple[str, str]) -> bool:
    return borders[0] <= char <= borders[1]
