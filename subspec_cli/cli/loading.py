"""Load the model for a command that answers, with progress and the lines that say what was loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from subspec_cli.cli.options import Settings
from subspec_cli.cli.prompts import read_text_file
from subspec_cli.config import Config, RunConfig
from subspec_cli.errors import UsageError

if TYPE_CHECKING:
    from subspec_cli.cli.output import Output
    from subspec_cli.modeling.pretrained import ModelTokenizer
    from subspec_cli.session import Session
    from subspec_cli.session.build import TokenCount

_FIRST_MESSAGE = "Hello"
"""Stands for the first message of a chat."""


def with_system_file(settings: Settings, path: Path | None) -> Config:
    """The settings with the system message that `--system-file` names; raises UsageError beside `--system`."""
    config = settings.config
    if path is None:
        return config
    if settings.flags["run"]["system"] is not None:
        raise UsageError("--system and --system-file are both given", "give one of them")
    return dataclasses.replace(config, run=dataclasses.replace(config.run, system=read_text_file(path)))


def load_session(config: Config, output: Output, prompt: str | None) -> Session:
    """Open the session and say what was loaded. Without a prompt the session is for a chat."""
    from subspec_cli.cli.answer_text import chat_header, note_lines, session_lines
    from subspec_cli.cli.output_progress import ProgressLine
    from subspec_cli.cli.sampling_text import unused_sampling_hint

    with ProgressLine(output) as progress:
        progress.update("loading libraries")
        from subspec_cli.reporter import Reporter
        from subspec_cli.session import open_session

        session = open_session(config, Reporter(progress.update), count=_counting(prompt, config.run))
    header = chat_header(session) if prompt is None else session_lines(session)
    hint = "" if prompt is None else unused_sampling_hint(session)
    for line in (*header, *note_lines(session), hint):
        if line:
            output.note(line)
    return session


def _counting(prompt: str | None, limits: RunConfig) -> TokenCount:
    """Return what counts the tokens that the context must hold.

    Nobody knows the length of a chat, but that its template takes a message is known before weights are read.
    """
    from subspec_cli.planning.request import WantedTokens

    def count(tokenizer: ModelTokenizer) -> WantedTokens | None:
        said = _FIRST_MESSAGE if prompt is None else prompt
        tokens = len(tokenizer.encode_prompt(said, system=limits.system, raw=limits.raw))
        return None if prompt is None else WantedTokens(tokens, limits.max_new_tokens)

    return count
