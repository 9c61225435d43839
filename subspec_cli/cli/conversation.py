"""The loop of a chat: messages, commands and answers until the user leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from subspec_cli.cli.answer_text import fullness_warning, reach_line, summary_line
from subspec_cli.cli.interrupts import interrupt_status, is_terminating
from subspec_cli.cli.live import collect_answer, make_view
from subspec_cli.cli.messages import Reader
from subspec_cli.cli.output import Output
from subspec_cli.config import Config
from subspec_cli.errors import PromptRefusedError, UsageError

if TYPE_CHECKING:
    from subspec_cli.session import Chat, Session

_HELP = "/reset clears the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def converse(session: Session, config: Config, output: Output, read: Reader, *, first: str = "") -> None:
    """Read messages and answer them until the user leaves; `first` comes before the first message."""
    conversation = session.chat(config.run.system)
    output.note(reach_line(session))
    output.note(_HELP)
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
        if message.is_typed and line in ("/exit", "/quit"):
            return
        if message.is_typed and _is_command(line):
            _obey(line, conversation, output)
        elif line:
            said = f"{first}\n\n{line}" if first else line
            first = ""
            interrupts = _answer(said, conversation, session, config, output)


def _is_command(line: str) -> bool:
    """Whether a line is one word after one slash; `/etc/hosts` and sentences are messages."""
    return line.startswith("/") and line.count("/") == 1 and len(line.split()) == 1


def _obey(command: str, conversation: Chat, output: Output) -> None:
    if command == "/reset":
        conversation.reset()
        output.note("the conversation is cleared")
    elif command == "/help":
        output.note(_HELP)
    else:
        output.note(f"no command {command}: {_HELP}")


def _answer(line: str, conversation: Chat, session: Session, config: Config, output: Output) -> int:
    """Answer one message. Returns 1 if Ctrl-C stopped the answer, so that another Ctrl-C at the prompt leaves."""
    limits = config.run
    try:
        view = make_view(output, session)
        deltas = conversation.ask(
            line, max_new_tokens=limits.max_new_tokens, stop=limits.stop, on_prefill=view.show_prefill
        )
        answer = collect_answer(deltas, view)
    except (UsageError, PromptRefusedError) as error:  # another message, or /reset, may do
        output.note(f"{error.message}{f': {error.hint}' if error.hint else ''}", style="bold")
        return 0
    if not answer.is_interrupted:
        output.note(summary_line(answer, session))
        if warning := fullness_warning(answer, session):
            output.note(warning, style="bold")
        return 0
    output.note("interrupted", style="bold")
    if is_terminating():
        raise typer.Exit(interrupt_status())
    return 1
