"""Read the prompt, and reject bad ones before anything heavy is loaded."""

from __future__ import annotations

import codecs
import os
import stat
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from subspec_cli.errors import UsageError
from subspec_cli.limits import MOST_PROMPT_BYTES
from subspec_cli.units import format_bytes

STANDARD_INPUT = "-"
_HOW = 'give it as an argument, subspec run "…", or pipe it in'
_PATIENCE_S = 1.0
_WAITING = "waiting for the end of standard input, which is part of the prompt; < /dev/null leaves it out"
# UTF-32's mark for little-endian begins with UTF-16's.
_MARKED_ENCODINGS = (
    ("UTF-32", codecs.BOM_UTF32_LE),
    ("UTF-32", codecs.BOM_UTF32_BE),
    ("UTF-16", codecs.BOM_UTF16_LE),
    ("UTF-16", codecs.BOM_UTF16_BE),
)


def read_prompt(argument: str | None, note: Callable[[str], None]) -> str | None:
    """The prompt from the argument, piped standard input, or both; None asks for a chat.

    Piped text comes after the argument, with an empty line between. `-` is standard input alone. `note` receives a
    line if standard input does not end soon, and one if it is used beside an argument.
    """
    if argument is not None and argument != STANDARD_INPUT:
        prompt = _checked(_plain(argument))
        piped = _plain(_read_input(note)) if _has_piped_input() else ""
        if not piped.strip():
            return prompt
        note(f"the prompt is the argument and {format_bytes(len(piped.encode()))} of standard input")
        return f"{prompt}\n\n{piped}"
    if sys.stdin is None:
        raise UsageError("no prompt", _HOW)
    if argument == STANDARD_INPUT or not sys.stdin.isatty():
        return _checked(_plain(_read_input(note)))
    if not sys.stdout.isatty():
        raise UsageError("no prompt, and a chat needs standard output on the terminal too", _HOW)
    return None


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
    if len(content) > MOST_PROMPT_BYTES:
        raise UsageError(f"the prompt on standard input is longer than {MOST_PROMPT_BYTES >> 20} MiB")
    # One line break ends a text file or an `echo`; it is not part of the prompt.
    return _decoded(content).removesuffix("\n").removesuffix("\r")


def _decoded(content: bytes) -> str:
    """Text in UTF-8, or in the encoding that its byte order mark names, as PowerShell writes it."""
    encoding = next((name for name, mark in _MARKED_ENCODINGS if content.startswith(mark)), "UTF-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not {encoding} at byte {error.start}", "pipe UTF-8 text"
        ) from error
    if "\0" in text:
        raise UsageError(
            f"standard input is not text: character {text.index(chr(0))} is NUL",
            "pipe UTF-8 text; UTF-16 needs a byte order mark",
        )
    return text


def _plain(text: str) -> str:
    """Text without a byte order mark, its lines ended as models have seen them."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _checked(prompt: str) -> str:
    if not prompt.strip():
        raise UsageError("the prompt is empty", _HOW)
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UsageError(
            "the prompt argument is not valid UTF-8", "write it in the terminal's encoding, UTF-8"
        )
    return prompt
