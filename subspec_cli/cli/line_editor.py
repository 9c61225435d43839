"""The line editor of a chat: pastes, messages of several lines, lasting history. The only door to prompt_toolkit."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from prompt_toolkit import PromptSession
from prompt_toolkit.history import History
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import Output as Screen
from prompt_toolkit.output import create_output

from subspec_cli.cli.messages import CONTINUATION, PROMPT, Message, as_message, is_open
from subspec_cli.errors import ResourceError
from subspec_cli.files.home import make_home_directory, subspec_home

_READ_BYTES: Final = 1 << 20
"""History that is read: the end of the file."""
_MOST_KEPT_CHARACTERS: Final = 20_000
"""Longer messages, pasted documents, are not kept."""


class LineEditor:
    """Edits one message at a time on the terminal, drawn on stderr.

    `history` is the file that keeps messages; None keeps them for this chat only. `keys` and `screen` replace the
    terminal.
    """

    def __init__(
        self, history: Path | None, *, keys: Input | None = None, screen: Screen | None = None
    ) -> None:
        self._is_pasted = False
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=CONTINUATION,
            reserve_space_for_menu=0,
            key_bindings=self._bindings(),
            history=_KeptHistory(history),
            input=keys,
            output=screen or create_output(stdout=sys.stderr),
        )

    def read(self) -> Message:
        """Read a message; errors are those of `messages.Reader`."""
        self._is_pasted = False
        text = self._session.prompt()
        return as_message(text, is_pasted=self._is_pasted)

    def _bindings(self) -> KeyBindings:
        bindings = KeyBindings()

        @bindings.add(Keys.BracketedPaste)
        def _paste(event: KeyPressEvent) -> None:
            self._is_pasted = True
            event.current_buffer.insert_text(event.data.replace("\r\n", "\n").replace("\r", "\n"))

        @bindings.add(Keys.ControlJ)
        @bindings.add(Keys.Escape, Keys.ControlM)
        def _break_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @bindings.add(Keys.ControlM)
        def _enter(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if is_open(buffer.text):
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        return bindings


class _KeptHistory(History):
    """History in a file of JSON lines that only its user may read; where it cannot be written, of this chat."""

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self._path = path

    def load_history_strings(self) -> Iterable[str]:
        """The messages kept, newest first."""
        if self._path is None:
            return
        try:
            with self._path.open("rb") as file:
                size_bytes = file.seek(0, os.SEEK_END)
                file.seek(max(0, size_bytes - _READ_BYTES))
                lines = file.read(_READ_BYTES).splitlines()
        except OSError:
            return
        for line in reversed(lines):
            with suppress(ValueError):  # cut off, or no text of ours
                entry = json.loads(line)
                if isinstance(entry, str):
                    yield entry

    def store_string(self, string: str) -> None:
        """Add a message to the file."""
        if self._path is None or len(string) > _MOST_KEPT_CHARACTERS:
            return
        with suppress(OSError):
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with open(handle, "ab") as file:
                file.write(json.dumps(string).encode() + b"\n")


def history_file() -> Path | None:
    """The file of the user's history; None where nothing can be kept."""
    try:
        home = subspec_home()
        make_home_directory(home)
    except ResourceError:
        return None
    return home / "chat-history.jsonl"
