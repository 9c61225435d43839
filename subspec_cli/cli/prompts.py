"""Read the prompt, and reject bad ones before anything heavy is loaded."""

from __future__ import annotations

import sys

from subspec_cli.errors import UsageError
from subspec_cli.limits import MOST_PROMPT_BYTES

_HOW = 'give it as an argument, subspec run "…", or pipe it in'


def read_prompt(argument: str | None) -> str | None:
    """The prompt from the argument, else from piped standard input; None asks for a chat."""
    if argument is not None:
        return _checked(argument)
    if sys.stdin is None:
        raise UsageError("no prompt", _HOW)
    if not sys.stdin.isatty():
        return _checked(_read_piped())
    if not sys.stdout.isatty():
        raise UsageError("no prompt, and a chat needs standard output on the terminal too", _HOW)
    return None


def _read_piped() -> str:
    content = sys.stdin.buffer.read(MOST_PROMPT_BYTES + 1)
    if len(content) > MOST_PROMPT_BYTES:
        raise UsageError(f"the prompt on standard input is longer than {MOST_PROMPT_BYTES >> 20} MiB")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8 at byte {error.start}", "pipe UTF-8 text") from error
    # One line break ends a text file or an `echo`; it is not part of the prompt.
    return text.removesuffix("\n").removesuffix("\r")


def _checked(prompt: str) -> str:
    if not prompt.strip():
        raise UsageError("the prompt is empty", _HOW)
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UsageError(
            "the prompt argument is not valid UTF-8", "write it in the terminal's encoding, UTF-8"
        )
    return prompt
