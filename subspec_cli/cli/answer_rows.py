"""Rows of an answer while it is generated: wrapped by words, with Markdown's parts marked and nothing removed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

from subspec_cli.cli.wrapping import wrapped

Style = Literal["text", "strong", "heading", "code", "mark"]


class Span(NamedTuple):
    """A part of a row that looks alike."""

    text: str
    style: Style


Row = tuple[Span, ...]

_TAB: Final = "    "
_FENCE: Final = re.compile(r" *(?P<fence>`{3,}|~{3,})(?P<info>.*)")
_HEADING: Final = re.compile(r" {0,3}#{1,6} ")
_HANGING: Final = re.compile(r" *((?:[-*+•]|\d{1,3}[.)]) +|(?:> ?)+)?")
_INLINE: Final = re.compile(r"`+|\*\*")


class AnswerRows:
    """Cuts an answer into rows. A row is given out when no later text can change it, code when its line is complete.

    Markdown is only coloured: every character stays, so what is copied from the screen is the answer.
    """

    def __init__(self) -> None:
        self._line = ""
        """The unfinished row, or line of code."""
        self._begins_line = True
        self._indent = 0
        self._fence = ""
        """What ends the block of code; empty outside of one."""
        self._inline = _Inline()

    def feed(self, text: str, width: int) -> list[Row]:
        """Take the next piece of the answer, and return the rows that it completes."""
        *lines, last = (self._line + text).split("\n")
        rows: list[Row] = []
        for line in lines:
            self._line = line
            rows += self._full_rows(width)
            rows.append(self.unfinished())
            self._end_line()
        self._line = last
        return rows + self._full_rows(width)

    def unfinished(self) -> Row:
        """Return the row that is not full yet; empty where none is begun."""
        if self._is_code:
            return (Span(self._line, "mark" if _FENCE.match(self._line) else "code"),) if self._line else ()
        return self._styled(self._line, self._inline.copy())

    @property
    def _is_code(self) -> bool:
        return bool(self._fence) or (self._begins_line and _opens(self._line) != "")

    def _full_rows(self, width: int) -> list[Row]:
        """Take the full rows off the unfinished line."""
        if self._is_code:
            return []
        self._line = self._line.replace("\t", _TAB)
        if self._begins_line:
            hanging = _HANGING.match(self._line)
            self._indent = min(hanging.end() if hanging else 0, width // 2)
            texts = wrapped(self._line, width, indent=self._indent)
        else:
            texts = wrapped(self._line, width - self._indent)
        rows = []
        for text in texts[:-1]:
            rows.append(self._styled(text, self._inline))
            self._begins_line = False
        self._line = texts[-1]
        return rows

    def _styled(self, text: str, inline: _Inline) -> Row:
        if not text.rstrip():
            return ()
        if self._begins_line:
            inline.is_heading = bool(_HEADING.match(text))
        indent = () if self._begins_line else (Span(" " * self._indent, "text"),)
        return (*indent, *inline.spans(text.rstrip(" ")))

    def _end_line(self) -> None:
        opened = _opens(self._line)
        if not self._fence:
            self._fence = opened if self._begins_line else ""
        elif _closes(self._line, self._fence):
            self._fence = ""
        self._line, self._begins_line, self._inline = "", True, _Inline()


class _Inline:
    """Which marks are open within a line."""

    def __init__(self, code: str = "", *, is_strong: bool = False, is_heading: bool = False) -> None:
        self._code, self._is_strong, self.is_heading = code, is_strong, is_heading

    def copy(self) -> _Inline:
        """Return another one with the same marks open."""
        return _Inline(self._code, is_strong=self._is_strong, is_heading=self.is_heading)

    def spans(self, text: str) -> Iterator[Span]:
        """Cut a row at its marks; marks stay open beyond it."""
        done = 0
        for match in _INLINE.finditer(text):
            mark = match.group()
            if mark == "**" and (self._code or not self._toggles_strong(text, match)):
                continue
            if mark != "**" and self._code not in ("", mark):
                continue
            yield from self._span(text[done : match.start()])
            yield Span(mark, "mark")
            done = match.end()
            if mark == "**":
                self._is_strong = not self._is_strong
            else:
                self._code = "" if self._code else mark
        yield from self._span(text[done:])

    def _span(self, text: str) -> Iterator[Span]:
        if text:
            yield Span(
                text,
                "code"
                if self._code
                else "heading"
                if self.is_heading
                else "strong"
                if self._is_strong
                else "text",
            )

    def _toggles_strong(self, text: str, match: re.Match[str]) -> bool:
        """Whether two asterisks open or close strong text, and are no operator."""
        before, after = text[: match.start()][-1:], text[match.end() :][:1]
        return before not in ("", " ") if self._is_strong else after not in ("", " ") and not before.isalnum()


def _opens(line: str) -> str:
    """The fence that a line opens a block of code with; empty if it opens none."""
    match = _FENCE.fullmatch(line)
    if match is None or (match["fence"][0] == "`" and "`" in match["info"]):
        return ""
    return match["fence"]


def _closes(line: str, fence: str) -> bool:
    said = line.strip()
    return len(said) >= len(fence) and set(said) == {fence[0]}
