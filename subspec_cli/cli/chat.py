"""`subspec chat`: a conversation with the model, on a terminal or line by line from a pipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from subspec_cli.cli.loading import load_session, with_system_file
from subspec_cli.cli.messages import Reader, read_lines
from subspec_cli.cli.options import FilesOpt, Settings, SystemFileOpt, with_settings
from subspec_cli.cli.prompts import read_named_file
from subspec_cli.config import Config, DraftConfig, MemoryConfig, ModelConfig, RunConfig, SamplingConfig
from subspec_cli.errors import UsageError

if TYPE_CHECKING:
    from subspec_cli.cli.output import Output


@with_settings(ModelConfig, RunConfig, MemoryConfig, DraftConfig, SamplingConfig, without=("run.raw",))
def chat(settings: Settings, files: FilesOpt = None, system_file: SystemFileOpt = None) -> None:
    """Talk with the model; each answer has exactly the tokens the 16-bit model alone would give."""
    import sys

    from subspec_cli.cli.output import Output

    config = with_system_file(settings, system_file)
    if sys.stdin is None:
        raise UsageError("a chat needs standard input", 'subspec run "…" answers one prompt')
    # A chat has a template, also where the settings file asks `run` for bare text.
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, raw=False))
    first = "\n\n".join(read_named_file(path) for path in files or [])
    begin_chat(config, settings.file, Output(plain=config.run.plain), first=first)


def begin_chat(config: Config, file: Path | None, output: Output, *, first: str = "") -> None:
    """Load the model and hold a conversation; `first` comes before the first message.

    Tokens are chosen as the model's own files say, where the user says nothing.
    """
    from subspec_cli.cli.answer_text import loading_line
    from subspec_cli.cli.keyboard import held_keys

    if not output.is_animated:  # else the line of progress says so, and leaves the screen again
        output.note(loading_line(config, file))
    reader = make_reader(output)
    if config.sampling.source is None:
        config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, source="model"))
    with held_keys(output):
        session = load_session(config, output, None)
    with session:
        from subspec_cli.cli.conversation import converse

        converse(session, output, reader, first=first)


def make_reader(output: Output) -> Reader:
    """The line editor if the terminal can redraw lines, else a reader of plain lines.

    Call it before the memory of a model is counted, so that the editor's libraries are no part of it.
    """
    if output.can_edit:
        from subspec_cli.cli.line_editor import LineEditor, history_file

        return LineEditor(history_file()).read
    return lambda: read_lines(output.ask)
