"""A batch job's input: one request a line, in the OpenAI batch format, or a bare body such as `{"prompt": …}`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError, field_validator

from subspec_cli.errors import IntegrityError, UsageError
from subspec_cli.files.json_object import parse_json_object
from subspec_cli.files.regular_file import open_regular
from subspec_cli.limits import MOST_PROMPT_BYTES
from subspec_cli.serving.request_body import (
    ChatBody,
    CompletionBody,
    Generation,
    RequestRefusedError,
    refusal_of,
)
from subspec_cli.serving.strict_json import check_characters

_MOST_LINE_BYTES: Final = 2 * MOST_PROMPT_BYTES
_MOST_ID_CHARACTERS: Final = 512
_ENVELOPE: Final = frozenset(("custom_id", "method", "url", "body"))
CHAT_URL, COMPLETION_URL = "/v1/chat/completions", "/v1/completions"
_BODIES: Final[dict[str, type[ChatBody] | type[CompletionBody]]] = {
    CHAT_URL: ChatBody,
    COMPLETION_URL: CompletionBody,
}


class PromptBody(Generation):
    """A bare line: a prompt as `subspec run` takes it."""

    prompt: str

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        return prompt


@dataclass(frozen=True, slots=True)
class JobLine:
    """One line of the input that is not empty."""

    number: int
    """From 1, empty lines included."""
    custom_id: str | None
    """None if the line is so bad that it has none. A bare line without one is called by its number."""
    body: ChatBody | CompletionBody | PromptBody | None
    problem: RequestRefusedError | None
    """Why there is no body."""


@dataclass(frozen=True, slots=True)
class Job:
    """An input file, read once to its end."""

    path: Path
    sha256: str
    lines: int
    """Lines that are not empty."""

    def __iter__(self) -> Iterator[JobLine]:
        """Read the lines one after another; a `custom_id` that came before is a problem."""
        known: set[str] = set()
        for number, data in _lines(self.path):
            line = parse_line(number, data)
            if line.custom_id is not None and line.custom_id in known:
                problem = RequestRefusedError(f"custom_id {line.custom_id!r} came before", "custom_id")
                line = JobLine(number, line.custom_id, None, problem)
            elif line.custom_id is not None:
                known.add(line.custom_id)
            yield line


def open_job(path: Path) -> Job:
    """Read an input to its end; raises UsageError if there is nothing to do or it cannot be read."""
    digest, count = hashlib.sha256(), 0
    try:
        with open_regular(path) as file:
            while data := file.read(1 << 20):
                digest.update(data)
        count = sum(1 for _ in _lines(path))
    except IntegrityError as error:
        raise UsageError(error.message, "name a file of JSON lines, one request a line") from error
    if not count:
        raise UsageError(
            f"{path} holds no request", 'write one JSON object a line, such as {"prompt": "Hello"}'
        )
    return Job(path, digest.hexdigest(), count)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not empty, with their numbers; of one that is too long, what shows that."""
    with path.open("rb") as file:
        number = 0
        while data := file.readline(_MOST_LINE_BYTES + 1):
            number += 1
            rest = data
            while not rest.endswith(b"\n") and (rest := file.readline(_MOST_LINE_BYTES)):
                pass
            if number == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            if data.strip():
                yield number, data


def parse_line(number: int, data: bytes) -> JobLine:
    """Return what a line asks for, or what is wrong with it."""
    custom_id: str | None = None
    try:
        if len(data) > _MOST_LINE_BYTES:
            raise RequestRefusedError(f"the line has more than {_MOST_LINE_BYTES >> 20} MiB")
        values = parse_json_object(data, "the line", UsageError)
        custom_id = _custom_id(values, number)
        check_characters(values, "the line")
        return JobLine(number, custom_id, _body(values), None)
    except UsageError as error:
        problem = RequestRefusedError(error.message)
    except ValidationError as error:
        problem = refusal_of(error)
    except RequestRefusedError as error:
        problem = error
    return JobLine(number, custom_id, None, problem)


def _custom_id(values: dict[str, Any], number: int) -> str:
    found = values.get("custom_id")
    if found is None and "body" not in values:
        return f"line-{number}"
    if not isinstance(found, str) or not 0 < len(found) <= _MOST_ID_CHARACTERS:
        raise RequestRefusedError(
            f"custom_id must be a text of 1 to {_MOST_ID_CHARACTERS} characters", "custom_id"
        )
    return found


def _body(values: dict[str, Any]) -> ChatBody | CompletionBody | PromptBody:
    if "body" not in values and "url" not in values:
        bare = {key: value for key, value in values.items() if key != "custom_id"}
        body: ChatBody | CompletionBody | PromptBody = (
            ChatBody.model_validate(bare) if "messages" in bare else PromptBody.model_validate(bare)
        )
    else:
        body = _enveloped(values)
    if body.stream:
        raise RequestRefusedError("stream: a job's answers are written whole", "stream")
    return body


def _enveloped(values: dict[str, Any]) -> ChatBody | CompletionBody:
    if extra := sorted(set(values) - _ENVELOPE):
        raise RequestRefusedError(f"{extra[0]}: this field is not supported", extra[0])
    if values.get("method", "POST") != "POST":
        raise RequestRefusedError("method must be POST", "method")
    kind = _BODIES.get(str(values.get("url")))
    if kind is None:
        raise RequestRefusedError(f"url must be {' or '.join(_BODIES)}", "url")
    return kind.model_validate(values.get("body"))
