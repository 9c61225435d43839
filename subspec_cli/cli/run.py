"""`subspec run`: one answer, or a chat if there is a terminal and no prompt."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from subspec_cli.cli.interrupts import interrupt_status
from subspec_cli.cli.options import Settings, with_settings
from subspec_cli.cli.prompts import read_prompt
from subspec_cli.config import Config, DraftConfig, MemoryConfig, ModelConfig, RunConfig, SamplingConfig
from subspec_cli.errors import UsageError

if TYPE_CHECKING:
    from subspec_cli.cli.output import Output
    from subspec_cli.modeling.pretrained import ModelTokenizer
    from subspec_cli.session import Session
    from subspec_cli.session.build import TokenCount

PromptArg = Annotated[
    str | None,
    typer.Argument(
        metavar="PROMPT",
        help="What to ask. Piped text comes after it; - or no PROMPT takes the piped text alone. Without both, a "
        "chat begins.",
    ),
]
_FIRST_MESSAGE = "Hello"
"""Stands for the first message of a chat."""
JsonOpt = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout, and no text.")]


@with_settings(ModelConfig, RunConfig, MemoryConfig, DraftConfig, SamplingConfig)
def run(settings: Settings, prompt: PromptArg = None, as_json: JsonOpt = False) -> None:
    """Answer a prompt, or chat, with exactly the tokens the 16-bit model alone would give."""
    _start(settings.config, settings.file, prompt, as_json=as_json)


def _start(config: Config, file: Path | None, argument: str | None, *, as_json: bool) -> None:
    """Reject what cannot work, then load the model and answer."""
    from subspec_cli.cli.answer_text import loading_line
    from subspec_cli.cli.output import Output

    output = Output(plain=config.run.plain)
    prompt = read_prompt(argument, output.note)
    if prompt is None and (as_json or config.run.raw):
        raise UsageError(f"{'--json' if as_json else '--raw'} needs a prompt; a chat has neither")
    if argument is not None and config.model.model is None:
        _note_model_name(argument, output)
    output.note(loading_line(config, file))
    with _load(config, output, prompt) as session:
        if prompt is not None:
            _answer(session, prompt, config, output, as_json=as_json)
            return
        from subspec_cli.cli.chat import chat

        chat(session, config, output)


def _note_model_name(argument: str, output: Output) -> None:
    """Say so if the prompt is the name of a prepared model, as other programs take it there."""
    from subspec_cli.substitutes.prepared_names import last_name, prepared_ids

    if any(argument in (model_id, last_name(model_id)) for model_id in prepared_ids()):
        output.note(
            f"{argument} is taken as the prompt; subspec run --model {shlex.quote(argument)} talks to that model"
        )


def _load(config: Config, output: Output, prompt: str | None) -> Session:
    from subspec_cli.cli.answer_text import session_lines
    from subspec_cli.cli.output_progress import ProgressLine

    with ProgressLine(output) as progress:
        progress.update("loading libraries")
        from subspec_cli.reporter import Reporter
        from subspec_cli.session import open_session

        session = open_session(config, Reporter(progress.update), count=_counting(prompt, config.run))
    for line in session_lines(session, config):
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


def _answer(session: Session, prompt: str, config: Config, output: Output, *, as_json: bool) -> None:
    from subspec_cli.cli.answer_text import answer_document, comparison_of, summary_line
    from subspec_cli.cli.comparison_text import comparison_line
    from subspec_cli.cli.live import View, collect_answer, make_view

    limits = config.run
    prompt_ids = session.encode_prompt(prompt, system=limits.system, raw=limits.raw)
    view = View() if as_json else make_view(output, session)
    deltas = session.generate(
        prompt_ids, max_new_tokens=limits.max_new_tokens, stop=limits.stop, on_prefill=view.show_prefill
    )
    answer = collect_answer(deltas, view)
    if as_json:
        output.document(answer_document(answer, session, config))
    if answer.stats.passes:
        output.note(comparison_line(comparison_of(answer, session)))
    output.note(summary_line(answer, session))
    if answer.is_interrupted:
        raise typer.Exit(interrupt_status())
