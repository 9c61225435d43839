"""Read the prompt, and reject bad ones before anything heavy is loaded."""

from __future__ import annotations

import codecs
import os
import stat
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from subspec_cli.errors import UsageError
from subspec_cli.limits import MOST_PROMPT_BYTES
from subspec_cli.units import format_bytes

STANDARD_INPUT = "-"
_HOW = 'give it as an argument, subspec run "…", as --file PATH, or pipe it in'
_PATIENCE_S = 1.0
_WAITING = "waiting for the end of standard input, which is part of the prompt; < /dev/null leaves it out"
# UTF-32's mark for little-endian begins with UTF-16's.
_MARKED_ENCODINGS = (
    ("UTF-32", codecs.BOM_UTF32_LE),
    ("UTF-32", codecs.BOM_UTF32_BE),
    ("UTF-16", codecs.BOM_UTF16_LE),
    ("UTF-16", codecs.BOM_UTF16_BE),
)


def read_prompt(argument: str | None, files: Sequence[Path], note: Callable[[str], None]) -> str | None:
    """The prompt from the argument, files and piped standard input, in this order; None asks for a chat.

    Empty lines separate them, and a file's name heads its text. `-` as argument is standard input alone. `note`
    receives a line if standard input does not end soon, and one if it is used beside an argument or files.

    Raises:
        UsageError: nothing was given, or it is no text.
    """
    said = argument is not None and argument != STANDARD_INPUT
    parts = [_checked(_plain(argument))] if argument is not None and said else []
    parts += [read_named_file(path) for path in files]
    if parts and argument != STANDARD_INPUT:
        piped = _plain(_read_input(note)) if _has_piped_input() else ""
        if piped.strip():
            given = [
                word for word, is_given in (("the argument", said), ("the files", bool(files))) if is_given
            ]
            note(
                f"the prompt is {', '.join(given)} and {format_bytes(len(piped.encode()))} of standard input"
            )
            parts.append(piped)
        return "\n\n".join(parts)
    if sys.stdin is None:
        raise UsageError("no prompt", _HOW)
    if argument == STANDARD_INPUT or not sys.stdin.isatty():
        return "\n\n".join([*parts, _checked(_plain(_read_input(note)))])
    if not sys.stdout.isatty():
        raise UsageError("no prompt, and a chat needs standard output on the terminal too", _HOW)
    return None


def read_named_file(path: Path) -> str:
    """The text of a file under its name, to be part of a prompt; raises UsageError if it is no text."""
    return f"{path.name}:\n{_checked(read_text_file(path), str(path))}"


def read_text_file(path: Path) -> str:
    """The text of a file, decoded as standard input is; raises UsageError if it is no text or cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_PROMPT_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}", "name a text file") from error
    return _plain(_decoded(content, str(path)))


def _has_piped_input() -> bool:
    """Whether standard input is a pipe, a file or a socket; a terminal or /dev/null adds nothing to an argument."""
    if sys.stdin is None:
        return False
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # replaced by an object without a descriptor
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _read_input(note: Callable[[str], None]) -> str:
    # A pipe that somebody inherited and never closes would be waited for in silence.
    waiting = threading.Timer(_PATIENCE_S, note, (_WAITING,))
    waiting.daemon = True
    waiting.start()
    try:
        with suppress(OSError, ValueError):
            os.set_blocking(sys.stdin.fileno(), True)  # a program that shares it may have changed that
        content = sys.stdin.buffer.read(MOST_PROMPT_BYTES + 1)
    except OSError as error:
        raise UsageError(f"standard input cannot be read: {error.strerror or error}", _HOW) from error
    finally:
        waiting.cancel()
    return _decoded(content, "standard input")


def _decoded(content: bytes, source: str) -> str:
    """Text in UTF-8, or in the encoding that its byte order mark names, as PowerShell writes it."""
    if len(content) > MOST_PROMPT_BYTES:
        raise UsageError(f"{source} is longer than {MOST_PROMPT_BYTES >> 20} MiB", "give a shorter text")
    encoding = next((name for name, mark in _MARKED_ENCODINGS if content.startswith(mark)), "UTF-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} is not {encoding} at byte {error.start}", "give UTF-8 text") from error
    if "\0" in text:
        raise UsageError(
            f"{source} is not text: character {text.index(chr(0))} is NUL",
            "give UTF-8 text; UTF-16 needs a byte order mark",
        )
    # One line break ends a text file or an `echo`; it is not part of the prompt.
    return text.removesuffix("\n").removesuffix("\r")


def _plain(text: str) -> str:
    """Text without a byte order mark, its lines ended as models have seen them."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _checked(prompt: str, source: str = "the prompt") -> str:
    if not prompt.strip():
        raise UsageError(f"{source} is empty", _HOW)
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UsageError(
            "the prompt argument is not valid UTF-8", "write it in the terminal's encoding, UTF-8"
        )
    return prompt
