"""`subspec run`: one answer, or a chat if there is a terminal and no prompt."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from subspec_cli.cli.chat import begin_chat
from subspec_cli.cli.interrupts import interrupt_status
from subspec_cli.cli.loading import load_session, with_system_file
from subspec_cli.cli.options import FilesOpt, Settings, SystemFileOpt, with_settings
from subspec_cli.cli.prompts import read_prompt
from subspec_cli.config import Config, DraftConfig, MemoryConfig, ModelConfig, RunConfig, SamplingConfig
from subspec_cli.errors import UsageError

if TYPE_CHECKING:
    from subspec_cli.cli.output import Output
    from subspec_cli.session import Session

_LEAST_PASSES: Final = 3
"""Passes below which an answer is too short to say how good a prediction was."""
PromptArg = Annotated[
    str | None,
    typer.Argument(
        metavar="PROMPT",
        help="What to ask. Text of --file and piped text come after it; - or no PROMPT takes the piped text. "
        "With none of them, a chat begins.",
    ),
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout, and no text.")]


@with_settings(ModelConfig, RunConfig, MemoryConfig, DraftConfig, SamplingConfig)
def run(
    settings: Settings,
    prompt: PromptArg = None,
    files: FilesOpt = None,
    system_file: SystemFileOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Answer a prompt with exactly the tokens the 16-bit model alone would give."""
    from subspec_cli.cli.output import Output

    config = with_system_file(settings, system_file)
    output = Output(plain=config.run.plain)
    text = read_prompt(prompt, files or [], output.note)
    if prompt is not None and config.model.model is None:
        _note_model_name(prompt, output)
    if text is not None:
        return _start(config, settings.file, text, output, as_json=as_json)
    if as_json or config.run.raw:
        raise UsageError(f"{'--json' if as_json else '--raw'} needs a prompt; a chat has neither")
    return begin_chat(config, settings.file, output)


def _start(config: Config, file: Path | None, prompt: str, output: Output, *, as_json: bool) -> None:
    """Load the model and answer."""
    from subspec_cli.cli.answer_text import loading_line

    output.note(loading_line(config, file))
    with load_session(config, output, prompt) as session:
        _answer(session, prompt, config, output, as_json=as_json)


def _note_model_name(argument: str, output: Output) -> None:
    """Say so if the prompt is the name of a prepared model, as other programs take it there."""
    from subspec_cli.substitutes.prepared_names import last_name, prepared_ids

    if any(argument in (model_id, last_name(model_id)) for model_id in prepared_ids()):
        output.note(
            f"{argument} is taken as the prompt; subspec run --model {shlex.quote(argument)} talks to that model"
        )


def _answer(session: Session, prompt: str, config: Config, output: Output, *, as_json: bool) -> None:
    from subspec_cli.cli.answer_text import answer_document, comparison_of, summary_line
    from subspec_cli.cli.comparison_text import comparison_line, prediction_note
    from subspec_cli.cli.live import View, collect_answer, make_view

    limits = config.run
    prompt_ids = session.encode_prompt(prompt, system=limits.system, raw=limits.raw)
    view = View() if as_json else make_view(output, session)
    deltas = session.generate(
        prompt_ids, max_new_tokens=limits.max_new_tokens, stop=limits.stop, on_prefill=view.show_prefill
    )
    answer = collect_answer(deltas, view)
    if as_json:
        output.document(answer_document(answer, session))
    if answer.stats.passes:
        comparison = comparison_of(answer, session)
        output.note(comparison_line(comparison))
        if (note := prediction_note(comparison)) and answer.stats.passes >= _LEAST_PASSES:
            output.note(note)
    output.note(summary_line(answer, session))
    if answer.is_interrupted:
        raise typer.Exit(interrupt_status())
