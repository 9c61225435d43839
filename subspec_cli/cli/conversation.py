"""The loop of a chat: messages, commands and answers until the user leaves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from subspec_cli.cli.answer_text import chat_line, continue_hint, fullness_warning
from subspec_cli.cli.chat_commands import (
    CONTINUE,
    EXIT,
    RETRY,
    ChatState,
    is_command,
    lone_command,
    obey,
)
from subspec_cli.cli.interrupts import interrupt_status, is_terminating
from subspec_cli.cli.keyboard import held_keys
from subspec_cli.cli.live import View, collect_answer, make_view
from subspec_cli.cli.messages import Message, Reader
from subspec_cli.cli.output import Output
from subspec_cli.errors import PromptRefusedError, UsageError

if TYPE_CHECKING:
    from subspec_cli.session import Session, TextDelta


def converse(session: Session, output: Output, read: Reader, *, first: str = "") -> None:
    """Read messages and answer them until the user leaves; `first` comes before the first message."""
    config = session.description.config
    state = ChatState(session, session.chat(config.run.system), config, config.run.system, first)
    interrupts = 0
    while interrupts < 2:
        try:
            message = read()
        except EOFError:
            output.end_line()
            return
        except UnicodeDecodeError as error:
            output.note(f"that message is not UTF-8 at byte {error.start}; not sent", style="bold")
            continue
        except KeyboardInterrupt:
            if is_terminating():
                raise
            interrupts += 1
            output.end_line()
            if interrupts == 1:
                output.note("Ctrl-C again, Ctrl-D or /exit leaves")
            continue
        if lone_command(message) in EXIT:
            return
        interrupts = _reply(message, state, output) if message.text else 0


def _reply(message: Message, state: ChatState, output: Output) -> int:
    """Answer a message or obey a command. Returns 1 if Ctrl-C stopped an answer, so that another one leaves."""
    command = lone_command(message)
    if command == RETRY:
        return _retry(state, output)
    if command == CONTINUE:
        return _continue(state, output)
    if is_command(message):
        output.note(obey(message.text, state))
        return 0
    said = f"{state.first}\n\n{message.text}" if state.first else message.text
    state.first = ""
    return _ask(said, state, output)


def _retry(state: ChatState, output: Output) -> int:
    """Ask the last question again: one that was answered with the next noise, or one that was refused."""
    if not state.question:
        output.note("nothing was asked yet")
        return 0
    before = state.chat.messages
    if len(before) > 1 and before[-2]["content"] == state.question:
        state.chat.replace_messages(before[:-2])
        if state.config.sampling.is_greedy:
            output.note("at temperature 0 the answer is the same: /set temperature 0.7 varies it")
    interrupts = _ask(state.question, state, output)
    if len(state.chat.messages) < len(before):  # refused
        state.chat.replace_messages(before)
    return interrupts


def _ask(said: str, state: ChatState, output: Output) -> int:
    """Answer one message; returns as `_reply`."""
    limits, view = state.config.run, make_view(output, state.session)
    state.question = said
    deltas = state.chat.ask(
        said, max_new_tokens=limits.max_new_tokens, stop=limits.stop, on_prefill=view.show_prefill
    )
    return _answer(deltas, view, state, output)


def _continue(state: ChatState, output: Output) -> int:
    """Go on with the last answer. A terminal shows its unfinished row again, so that no word has a seam."""
    view = make_view(output, state.session)
    view.resume(state.chat.unfinished or "")
    deltas = state.chat.resume(max_new_tokens=state.config.run.max_new_tokens, on_prefill=view.show_prefill)
    return _answer(deltas, view, state, output)


def _answer(deltas: Iterator[TextDelta], view: View, state: ChatState, output: Output) -> int:
    """Show an answer and the lines after it. Returns 1 if Ctrl-C stopped it."""
    session = state.session
    try:
        with held_keys(output):
            answer = collect_answer(deltas, view)
    except (UsageError, PromptRefusedError) as error:  # another message, or /reset, may do
        output.note(f"{error.message}{f': {error.hint}' if error.hint else ''}", style="bold")
        return 0
    if answer.stats.new_tokens:
        output.note(chat_line(answer, session))
    if answer.is_interrupted and is_terminating():
        output.note("interrupted", style="bold")
        raise typer.Exit(interrupt_status())
    if hint := continue_hint(answer, session, len(state.chat.messages) // 2):
        output.note(hint, style="bold")
    if not answer.is_interrupted and (warning := fullness_warning(answer, session)):
        output.note(warning, style="bold")
    return int(answer.is_interrupted)
