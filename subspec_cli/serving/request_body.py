"""The bodies of requests in the form of the OpenAI API, checked field by field.

Whatever could change the text of an answer is either done as asked or refused: nothing is ignored. Fields that cannot
change it are accepted. null is the same as leaving a field out, as clients send it for what they do not set.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from subspec_cli.setting_rules import MOST_BIAS

MOST_CHOICES: Final = 16
MOST_STOPS: Final = 16
MOST_TOP_LOGPROBS: Final = 20
_MOST_MESSAGES: Final = 10_000
_MOST_FIELDS: Final = 100
_MOST_BIASES: Final = 10_000
_MOST_SEED: Final = 2**63 - 1
_MOST_TOKENS: Final = 2**31
_MOST_NAME: Final = 100
"""Characters of a field's name that an error repeats."""
_TYPE_NAMES: Final = frozenset(("str", "int", "bool", "constrained-str", "function-before"))
"""What pydantic calls the members of a choice of types."""


class RequestRefusedError(Exception):
    """A request that is not answered, and why."""

    def __init__(self, message: str, param: str | None = None, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """The field at fault."""
        self.code = code


class _Strict(BaseModel):
    """Unknown fields and values of other types are refused.

    Each fault takes a kilobyte: lists are given up at the first one, and what has no other bound gets one.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, values: Any) -> Any:  # noqa: ANN401 - of any type, from JSON
        if isinstance(values, dict) and len(values) > _MOST_FIELDS:
            raise ValueError(f"there are {len(values)} fields, at most {_MOST_FIELDS} are read")
        return values


def _not_supported(reason: str, *nothing: object) -> BeforeValidator:
    """A field of the API that is only accepted where it asks for nothing: null, or a value of `nothing`."""

    def check(value: Any) -> None:  # noqa: ANN401 - of any type, from JSON
        if value is not None and not any(type(value) is type(each) and value == each for each in nothing):
            raise ValueError(reason)

    return BeforeValidator(check)


def _few_biases(values: Any) -> Any:  # noqa: ANN401 - of any type, from JSON
    if isinstance(values, dict) and len(values) > _MOST_BIASES:
        raise ValueError(f"there are {len(values)} tokens, at most {_MOST_BIASES} can have a bias")
    return values


_NO_TOOLS = _not_supported("tool calls are not supported", [])
_NO_AUDIO = _not_supported("only text is supported")
Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: Annotated[None, _not_supported("names of speakers are not supported", "")] = None
    refusal: Annotated[None, _not_supported("refusals are not supported", "")] = None
    tool_calls: Annotated[None, _NO_TOOLS] = None
    function_call: Annotated[None, _NO_TOOLS] = None
    audio: Annotated[None, _NO_AUDIO] = None
    annotations: Annotated[None, _not_supported("annotations are not supported", [])] = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError("content is missing")
        return self

    def as_turn(self) -> dict[str, str]:
        """Return the turn as a chat template takes it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content or ())
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    """How an answer is streamed."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """With `include_usage`: whether every piece says what the answer took so far; vLLM's field."""
    include_obfuscation: Annotated[None, _not_supported("padding of a stream is not supported", False)] = None


class JsonSchema(_Strict):
    """A schema that the answer is to follow."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextFormat(_Strict):
    """Any text."""

    type: Literal["text"]


class JsonFormat(_Strict):
    """A JSON object."""

    type: Literal["json_object"]


class SchemaFormat(_Strict):
    """JSON by a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class Generation(_Strict):
    """What both kinds of requests take."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] | None = None
    response_format: Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")] | None = (
        None
    )
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: str | Annotated[list[Text], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=0, le=_MOST_SEED)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6)] | None = None
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^\d{1,9}$")],
                Annotated[float, Field(ge=-MOST_BIAS, le=MOST_BIAS)],
            ],
            BeforeValidator(_few_biases),
        ]
        | None
    ) = None
    return_token_ids: bool | None = None
    cache_prompt: bool | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        return self

    @property
    def stops(self) -> tuple[str, ...] | None:
        """The stop strings; None if the request names none."""
        if self.stop is None:
            return None
        return tuple(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop))

    @property
    def token_limit(self) -> int | None:
        """The longest answer, if the request says so."""
        return self.max_tokens or self.max_completion_tokens

    @property
    def told_logprobs(self) -> int | None:
        """Likeliest tokens to tell beside each token; None tells no log-probabilities."""
        return None

    @property
    def grammar(self) -> dict[str, Any] | bool | None:
        """The JSON schema that the answer must follow, `True` is any object; None if it is free."""
        match self.response_format:
            case JsonFormat():
                return True
            case SchemaFormat(json_schema=found):
                return {} if found.schema_ is None else found.schema_
        return None


class ChatBody(Generation):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    tools: Annotated[None, _NO_TOOLS] = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[None, _NO_TOOLS] = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    audio: Annotated[None, _NO_AUDIO] = None
    prediction: Annotated[None, _not_supported("predicted outputs are not supported")] = None
    reasoning_effort: Annotated[None, _not_supported("a reasoning effort is not supported")] = None
    verbosity: Annotated[None, _not_supported("a verbosity is not supported")] = None
    web_search_options: Annotated[None, _not_supported("web search is not supported")] = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def told_logprobs(self) -> int | None:
        """Likeliest tokens to tell beside each token; None tells no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def turns(self) -> list[dict[str, str]]:
        """The conversation as a chat template takes it."""
        return [message.as_turn() for message in self.messages]


class CompletionBody(Generation):
    """`POST /v1/completions`."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(fail_fast=True)]
        | Annotated[list[TokenIds], Field(fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    best_of: Literal[1] | None = None
    echo: Annotated[None, _not_supported("echo is not supported", False)] = None
    suffix: Annotated[None, _not_supported("a suffix is not supported", "")] = None

    @property
    def told_logprobs(self) -> int | None:
        """Likeliest tokens to tell beside each token; None tells no log-probabilities."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(each, int) for each in self.prompt):
            return [[each for each in self.prompt if isinstance(each, int)]]
        return [each for each in self.prompt if not isinstance(each, int)]


class TokenizeBody(_Strict):
    """`POST /tokenize`: a text as `prompt` or `content`, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: (
        Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES, fail_fast=True)] | None
    ) = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if sum(each is not None for each in (self.prompt, self.content, self.messages)) != 1:
            raise ValueError("give one of prompt, content and messages")
        return self

    @property
    def text(self) -> str:
        """The text, if there is no conversation."""
        return self.prompt or self.content or ""


class DetokenizeBody(_Strict):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: TokenIds


def refusal_of(error: ValidationError) -> RequestRefusedError:
    """Return the first fault of a body, in words."""
    errors = error.errors(include_url=False, include_context=False)
    return refusal_in([(each["loc"], each["msg"], each["type"]) for each in errors])


def refusal_in(faults: Sequence[tuple[Sequence[int | str], str, str]]) -> RequestRefusedError:
    """Return the fault of a body, by place, message and kind; of a choice of types the longest place says most."""
    place, message, kind = max(faults, key=lambda fault: len(fault[0]))
    # A field that is not known may be called as a type is.
    known = place[:-1] if kind == "extra_forbidden" else place
    parts = [part for before, part in pairwise((None, *known)) if not _is_type_name(before, part)]
    name = ".".join(str(part)[:_MOST_NAME] for part in (*parts, *place[len(known) :]))
    words = message.removeprefix("Value error, ")
    if kind == "extra_forbidden":
        words = "this field is not supported"
    elif kind == "missing":
        words = "this field is missing"
    return RequestRefusedError(f"{name}: {words}" if name else words, name or None)


def _is_type_name(before: int | str | None, part: int | str | None) -> bool:
    """Whether a part of a place names the type that was tried, not a field."""
    return before == "response_format" or (isinstance(part, str) and ("[" in part or part in _TYPE_NAMES))
