"""From the body of a request to the answers that it asks for, under the settings of a session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from subspec_cli.config import SamplingConfig
from subspec_cli.errors import PromptRefusedError, UnsupportedModelError, UsageError
from subspec_cli.serving.request_body import ChatBody, CompletionBody, Generation, RequestRefusedError

if TYPE_CHECKING:
    from subspec_cli.session.answer import BegunAnswer
    from subspec_cli.session.session import Session

COMPLETION_TOKENS: Final = 16
"""Longest answer of `/v1/completions` where the request does not say, as in the OpenAI API."""
MOST_ANSWERS: Final = 2048
"""Most answers to one request: as many prompts as the OpenAI API takes."""
_LEAST_PROMPT_LIMIT: Final = 1 << 16
_CHARACTERS_A_TOKEN: Final = 32
"""Texts with more than so many characters for each token of the context are not even counted.

Hardly a text has more than 8, and to count the tokens of one takes hundreds of bytes a token.
"""
_SAMPLING_FIELDS: Final = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


@dataclass(frozen=True, slots=True)
class AnswerOrder:
    """One answer to give. Its tokens depend on nothing else than this and the model."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingConfig
    seed: int
    choice: int
    """Number among the answers to one prompt."""
    max_new_tokens: int
    stop: tuple[str, ...]
    logprobs: int | None
    schema: dict[str, Any] | bool | None = None
    """JSON schema that the answer follows; `True` is any object."""

    def begin(self, session: Session) -> BegunAnswer:
        """Begin the answer; raises UsageError if the context has no room for it."""
        return session.begin_by(
            self.prompt_ids,
            self.sampling,
            seed=self.seed,
            choice=self.choice,
            stop=self.stop,
            logprobs=self.logprobs,
            schema=self.schema,
        )


class OrderMaker:
    """Makes orders from bodies. What a body leaves out is the session's setting.

    Bodies may come from several threads: one at a time is turned into tokens.
    """

    def __init__(self, session: Session, *, answer_tokens: int | None) -> None:
        """`answer_tokens` is the longest answer of a conversation where the request does not say.

        None is as many tokens as the context holds.
        """
        self._session = session
        self._answer_tokens = answer_tokens
        self._encoding = Lock()

    def of_chat(self, body: ChatBody, seed: int) -> list[AnswerOrder]:
        """Return the answers to a conversation; raises RequestRefusedError."""
        if body.messages[-1].role == "assistant":
            raise RequestRefusedError("messages: the last one is the assistant's own", "messages")
        return self._orders([self.conversation(body.turns)], body, seed, self._answer_tokens)

    def of_completion(self, body: CompletionBody, seed: int) -> list[AnswerOrder]:
        """Return the answers to bare prompts, each with its choices together; raises RequestRefusedError."""
        wanted = len(body.prompts) * (body.n or 1)
        if wanted > MOST_ANSWERS:
            raise RequestRefusedError(
                f"the request wants {wanted} answers, at most {MOST_ANSWERS} are given to one", "prompt"
            )
        prompts = [self._prompt_ids(prompt) for prompt in body.prompts]
        return self._orders(prompts, body, seed, COMPLETION_TOKENS)

    def of_prompt(self, text: str, body: Generation, seed: int) -> list[AnswerOrder]:
        """Return the answers to a prompt as `subspec run` takes it, with the settings' system message."""
        run = self._session.description.config.run
        self._check_size(len(text))
        prompt = self._encoded(
            "prompt", lambda: self._session.encode_prompt(text, system=run.system, raw=run.raw)
        )
        return self._orders([prompt], body, seed, self._answer_tokens)

    def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text; raises RequestRefusedError."""
        tokenizer = self._session.loaded.tokenizer
        self._check_size(len(text))
        return self._encoded("prompt", lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def conversation(self, turns: Sequence[dict[str, str]]) -> list[int]:
        """Return the token ids of a conversation up to the answer; raises RequestRefusedError."""
        self._check_size(sum(len(turn["content"]) for turn in turns))
        return self._encoded("messages", lambda: self._session.encode_messages(turns))

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones written out; raises RequestRefusedError."""
        return self._session.loaded.tokenizer.decode(self._known(token_ids, "tokens"), special=True)

    def _prompt_ids(self, prompt: str | list[int]) -> Sequence[int]:
        if isinstance(prompt, str):
            return self.tokenize(prompt, add_special_tokens=True)
        return self._known(prompt, "prompt")

    def _known(self, token_ids: Sequence[int], param: str) -> Sequence[int]:
        vocab = self._session.loaded.math.geometry.vocab
        wrong = next((token_id for token_id in token_ids if not 0 <= token_id < vocab), None)
        if wrong is not None:
            raise RequestRefusedError(
                f"{param}: the model has no token {wrong}, only 0 to {vocab - 1}", param
            )
        return token_ids

    def _check_size(self, characters: int) -> None:
        context = self._session.description.context_tokens
        if characters > most_characters(context):
            raise RequestRefusedError(
                f"the prompt has {characters:,} characters, the context holds {context:,} tokens: "
                f"texts of more than {most_characters(context):,} characters are not read",
                code="context_length_exceeded",
            )

    def _encoded(self, param: str, encode: Callable[[], list[int]]) -> list[int]:
        try:
            with self._encoding:
                return encode()
        except (UsageError, PromptRefusedError) as error:
            raise RequestRefusedError(error.message, param) from error

    def _orders(
        self, prompts: Sequence[Sequence[int]], body: Generation, seed: int, tokens: int | None
    ) -> list[AnswerOrder]:
        config, context = self._session.description.config, self._session.description.context_tokens
        choices = body.n or 1
        first = AnswerOrder(
            (),
            sampling_of(body, config.sampling),
            seed,
            0,
            (tokens or context) if body.token_limit is None else body.token_limit,
            config.run.stop if body.stops is None else body.stops,
            body.told_logprobs,
            body.grammar,
        )
        orders = [
            replace(first, prompt_ids=tuple(prompt), choice=choice)
            for prompt in prompts
            for choice in range(choices)
        ]
        for order in orders[::choices]:
            self._check(order)
        return orders

    def _check(self, order: AnswerOrder) -> None:
        """Refuse now what could not begin later."""
        context = self._session.description.context_tokens
        tokens = len(order.prompt_ids)
        if not tokens:
            raise RequestRefusedError("the prompt is empty")
        if tokens >= context:
            raise RequestRefusedError(
                f"the prompt has {tokens} tokens, the context holds {context}, one of them for an answer",
                code="context_length_exceeded",
            )
        self._begin(replace(order, schema=None), "logit_bias")
        if order.schema is not None:
            self._begin(order, "response_format")

    def _begin(self, order: AnswerOrder, param: str) -> None:
        try:
            order.begin(self._session)
        except (UsageError, UnsupportedModelError) as error:
            raise RequestRefusedError(error.message, param) from error


def most_characters(context: int) -> int:
    """Return the longest text that is turned into tokens for a context."""
    return max(_LEAST_PROMPT_LIMIT, _CHARACTERS_A_TOKEN * context)


def sampling_of(body: Generation, base: SamplingConfig) -> SamplingConfig:
    """Return the settings with the values of a request."""
    given: dict[str, Any] = {
        name: float(value) for name in _SAMPLING_FIELDS if (value := getattr(body, name)) is not None
    }
    if body.top_k is not None:
        given["top_k"] = max(0, body.top_k)
    if body.logit_bias is not None:
        given["logit_bias"] = tuple(body.logit_bias.items())
    return replace(base, **given)
