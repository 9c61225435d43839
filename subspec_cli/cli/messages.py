"""The messages of a chat, and how they are read line by line."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

PROMPT = "> "
CONTINUATION = ". "
FENCE = '"""'
"""Opens and closes a message of several lines."""


class Message(NamedTuple):
    """What the user entered, without spaces around it."""

    text: str
    is_typed: bool
    """Whether it was typed as one line. Only then it may be a command: pasted text never is."""


Reader = Callable[[], Message]
"""Returns the next message. Raises EOFError when the user leaves, KeyboardInterrupt, UnicodeDecodeError."""


def read_lines(ask: Callable[[str], str]) -> Message:
    """Read one line, or lines from one fence to the next."""
    text = ask(PROMPT)
    while is_open(text):
        text = f"{text}\n{ask(CONTINUATION)}"
    return as_message(text)


def is_open(text: str) -> bool:
    """Whether a fence begins the text and no fence has closed it."""
    said = text.strip()
    return said.startswith(FENCE) and not (said.endswith(FENCE) and len(said) >= 2 * len(FENCE))


def as_message(text: str, *, is_pasted: bool = False) -> Message:
    """The message in what was entered, without its fences.

    Raises:
        UnicodeDecodeError: the terminal sent bytes that are not UTF-8.
    """
    text.encode("utf-8", "surrogateescape").decode("utf-8")
    said = text.strip()
    is_fenced = said.startswith(FENCE) and not is_open(said)
    if is_fenced:
        said = said[len(FENCE) : -len(FENCE)].strip()
    return Message(said, not (is_pasted or is_fenced or "\n" in said))
