"""The commands of a chat, such as /set or /save, and what each answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from subspec_cli.cli.answer_text import session_lines
from subspec_cli.cli.messages import FENCE, Message
from subspec_cli.cli.output import as_json
from subspec_cli.config import Config, SamplingConfig, settings_of
from subspec_cli.config_file import with_setting
from subspec_cli.errors import ResourceError, SubspecError, UsageError
from subspec_cli.files.atomic_write import atomic_write
from subspec_cli.files.json_object import parse_json_object
from subspec_cli.limits import MOST_PROMPT_BYTES
from subspec_cli.units import counted

if TYPE_CHECKING:
    from subspec_cli.session import Chat, Session

EXIT: Final = ("/exit", "/quit")
RETRY: Final = "/retry"
CONTINUE: Final = "/continue"
_COMMAND: Final = re.compile(r"/[A-Za-z]+!?(\s|$)")
_RUN_SETTINGS: Final = ("max_new_tokens",)
_SAMPLING_SETTINGS: Final = tuple(
    name for name in settings_of(SamplingConfig) if name not in ("source", "logit_bias")
)
_HELP: Final = f"""\
/reset           clear the conversation
/drop            forget the oldest turns
/retry           ask the question again
/continue        go on with an answer
                 that was cut short
/system TEXT     set the system message
/set NAME VALUE  as temperature 0.7
/save FILE       keep it; /save! anew
/load FILE       go on with a saved one
/info            show model and plan
/exit            leave, as Ctrl-D
Ctrl-C stops an answer. Ctrl-J breaks
a line, {FENCE} holds several."""


@dataclass
class ChatState:
    """What the commands of a chat change."""

    session: Session
    chat: Chat
    config: Config
    system: str | None
    first: str = ""
    """Text before the next message."""
    question: str = ""
    """The last message that was asked, perhaps in vain."""


def is_command(message: Message) -> bool:
    """Whether a message begins with one word after a slash, and was typed; `/etc/hosts` is a message."""
    return message.is_typed and bool(_COMMAND.match(message.text))


def lone_command(message: Message) -> str:
    """The command that a message is, if nothing follows it; else an empty text."""
    name, argument = _split(message.text) if is_command(message) else ("", "")
    return "" if argument else name


def obey(line: str, state: ChatState) -> str:
    """Do what a command says. Returns the line for the user, also if it cannot be done."""
    name, argument = _split(line)
    act = _ACTS.get(name)
    try:
        if name in (*EXIT, RETRY, CONTINUE):  # the loop obeys them where nothing follows
            _take_nothing(name, argument)
        if act is None:
            raise UsageError(f"no command {name}", f"/help lists them; {FENCE}{name}{FENCE} sends it")
        return act(state, argument)
    except SubspecError as error:
        return f"{error.message}{f': {error.hint}' if error.hint else ''}"


def _split(line: str) -> tuple[str, str]:
    """The name of a command in small letters, and what follows it."""
    name, *rest = line.split(maxsplit=1)
    return name.lower(), rest[0] if rest else ""


def _help(state: ChatState, argument: str) -> str:  # noqa: ARG001 - as every command
    return _HELP


def _info(state: ChatState, argument: str) -> str:
    _take_nothing("/info", argument)
    return "\n".join(session_lines(state.session))


def _reset(state: ChatState, argument: str) -> str:
    _take_nothing("/reset", argument)
    state.chat.reset()
    return "the conversation is cleared"


def _drop(state: ChatState, argument: str) -> str:
    """Forget the oldest question with its answer, and more until half of the context is free.

    The last turn stays if others can go, so that its answer can go on.
    """
    _take_nothing("/drop", argument)
    kept, held = list(state.chat.messages), state.session.description.context_tokens
    if not kept:
        return "nothing was said that could be dropped"
    dropped = 0
    while kept and (not dropped or (len(kept) > 2 and _tokens(kept, state) > held // 2)):
        del kept[:2]
        dropped += 1
    state.chat.replace_messages(kept)
    turns = "the oldest turn is" if dropped == 1 else f"the {dropped} oldest turns are"
    return f"{turns} dropped · context {_tokens(kept, state):,} of {held:,}"


def _system(state: ChatState, argument: str) -> str:
    if not argument:
        return f"the system message is: {state.system}" if state.system else "no system message was given"
    state.system = argument
    state.chat.set_system(argument)
    return "the system message is changed"


def _set(state: ChatState, argument: str) -> str:
    name, _, text = argument.partition(" ")
    key = name.replace("-", "_")
    if key not in (*_SAMPLING_SETTINGS, *_RUN_SETTINGS):
        names = ", ".join((*_SAMPLING_SETTINGS, *_RUN_SETTINGS))
        raise UsageError(f"/set takes {names}", "/set temperature 0.7")
    if not text:
        return f"{key} is {getattr(state.config.sampling if key in _SAMPLING_SETTINGS else state.config.run, key)}"
    section = "sampling" if key in _SAMPLING_SETTINGS else "run"
    state.config = with_setting(state.config, section, key, _value(text))
    if key in _SAMPLING_SETTINGS:
        state.session.set_sampling(state.config.sampling)
    return f"{key} is {text}"


def _save(state: ChatState, argument: str) -> str:
    return _write(state, argument, replaces=False)


def _replace(state: ChatState, argument: str) -> str:
    return _write(state, argument, replaces=True)


def _write(state: ChatState, argument: str, *, replaces: bool) -> str:
    path = _path("/save", argument)
    if path.exists() and not replaces:
        raise UsageError(f"{path} exists", f"/save! {argument} replaces it")
    system = [{"role": "system", "content": state.system}] if state.system is not None else []
    messages = [*system, *state.chat.messages]
    if not path.parent.is_dir():
        raise UsageError(f"there is no directory {path.parent}")
    try:
        atomic_write(path, as_json({"messages": messages}, indent=1).encode() + b"\n")
    except ResourceError as error:
        raise UsageError(error.message, "/save takes another file") from error
    return f"{counted(len(messages), 'message')} in {path}"


def _load(state: ChatState, argument: str) -> str:
    path = _path("/load", argument)
    try:
        with path.open("rb") as file:
            content = file.read(MOST_PROMPT_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    if len(content) > MOST_PROMPT_BYTES:
        raise UsageError(f"{path} is longer than {MOST_PROMPT_BYTES >> 20} MiB")
    messages = parse_json_object(content, str(path), UsageError).get("messages")
    system, turns = _checked(messages, path)
    state.chat.replace_messages(turns)
    state.question = turns[-2]["content"] if turns else ""
    if system is not None:
        state.system = system
        state.chat.set_system(system)
    held = state.session.description.context_tokens
    return f"{counted(len(turns), 'message')} of {path} · context {_tokens(turns, state):,} of {held:,}"


def _checked(messages: Any, path: Path) -> tuple[str | None, list[dict[str, str]]]:  # noqa: ANN401 - of a file
    """The system message and the turns of a saved conversation."""
    hint = "/save writes such a file"
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise UsageError(f"{path} has no list of messages, each with a role and a content", hint)
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else None
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise UsageError(f"{path} has messages that are not user and assistant in turn", hint)
    return system, turns


def _is_message(message: Any) -> bool:  # noqa: ANN401 - of a file
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _tokens(messages: list[dict[str, str]], state: ChatState) -> int:
    return len(state.session.encode_messages(messages, system=state.system)) if messages else 0


def _value(text: str) -> object:
    """A number as in JSON, else the text, which the setting's own rule then refuses."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _path(command: str, argument: str) -> Path:
    if not argument:
        raise UsageError(f"{command} needs a file", f"{command} chat.json")
    return Path(argument).expanduser()


def _take_nothing(command: str, argument: str) -> None:
    if argument:
        raise UsageError(
            f"{command} takes nothing after it", f"{FENCE}{command} …{FENCE} sends it as a message"
        )


_ACTS: Final[dict[str, Callable[[ChatState, str], str]]] = {
    "/help": _help,
    "/info": _info,
    "/reset": _reset,
    "/drop": _drop,
    "/system": _system,
    "/set": _set,
    "/save": _save,
    "/save!": _replace,
    "/load": _load,
}
