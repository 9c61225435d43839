"""The loop of a chat: messages, commands and answers until the user leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from subspec_cli.cli.answer_text import chat_line, fullness_warning
from subspec_cli.cli.chat_commands import EXIT, RETRY, ChatState, is_command, obey
from subspec_cli.cli.interrupts import interrupt_status, is_terminating
from subspec_cli.cli.live import collect_answer, make_view
from subspec_cli.cli.messages import Reader
from subspec_cli.cli.output import Output
from subspec_cli.errors import PromptRefusedError, UsageError

if TYPE_CHECKING:
    from subspec_cli.session import Session


def converse(session: Session, output: Output, read: Reader, *, first: str = "") -> None:
    """Read messages and answer them until the user leaves; `first` comes before the first message."""
    config = session.description.config
    state = ChatState(session, session.chat(config.run.system), config, config.run.system)
    interrupts = 0
    while interrupts < 2:
        try:
            message = read()
        except EOFError:
            output.note("")
            return
        except UnicodeDecodeError as error:
            output.note(f"that message is not UTF-8 at byte {error.start}; not sent", style="bold")
            continue
        except KeyboardInterrupt:
            if is_terminating():
                raise
            interrupts += 1
            output.note("" if interrupts > 1 else "\nCtrl-C again, Ctrl-D or /exit leaves")
            continue
        interrupts = 0
        line = message.text
        if message.is_typed and line in EXIT:
            return
        if message.is_typed and line == RETRY:
            interrupts = _retry(state, output)
        elif is_command(message):
            output.note(obey(line, state))
        elif line:
            said = f"{first}\n\n{line}" if first else line
            first = ""
            interrupts = _answer(said, state, output)


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
    interrupts = _answer(state.question, state, output)
    if len(state.chat.messages) < len(before):  # refused
        state.chat.replace_messages(before)
    return interrupts


def _answer(said: str, state: ChatState, output: Output) -> int:
    """Answer one message. Returns 1 if Ctrl-C stopped the answer, so that another Ctrl-C at the prompt leaves."""
    limits, session = state.config.run, state.session
    state.question = said
    try:
        view = make_view(output, session)
        deltas = state.chat.ask(
            said, max_new_tokens=limits.max_new_tokens, stop=limits.stop, on_prefill=view.show_prefill
        )
        answer = collect_answer(deltas, view)
    except (UsageError, PromptRefusedError) as error:  # another message, or /reset, may do
        output.note(f"{error.message}{f': {error.hint}' if error.hint else ''}", style="bold")
        return 0
    if not answer.is_interrupted:
        output.note(chat_line(answer, session))
        if warning := fullness_warning(answer, session):
            output.note(warning, style="bold")
        return 0
    output.note("interrupted", style="bold")
    if is_terminating():
        raise typer.Exit(interrupt_status())
    return 1
