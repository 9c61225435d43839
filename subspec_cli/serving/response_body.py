"""Answers in the form of the OpenAI API: whole, and piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from subspec_cli.decoding.logprobs import TokenLogprobs
from subspec_cli.metrics import FinishReason, GenerationStats
from subspec_cli.serving.orders import AnswerOrder
from subspec_cli.serving.request_body import Generation

if TYPE_CHECKING:
    from subspec_cli.session.answer import TextDelta

Kind = Literal["chat", "completion"]
TokenText = Callable[[int], str]
"""The text of one token alone, special tokens written out."""


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What all pieces of one response begin with."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str
    fingerprint: str
    kind: Kind

    def document(self, *, is_chunk: bool) -> dict[str, Any]:
        """Return the beginning of a document."""
        names = {
            ("chat", False): "chat.completion",
            ("chat", True): "chat.completion.chunk",
            ("completion", False): "text_completion",
            ("completion", True): "text_completion",
        }
        return {
            "id": self.id,
            "object": names[self.kind, is_chunk],
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


@dataclass(slots=True)
class AnswerSoFar:
    """One choice of a response, as it grows."""

    prompt_tokens: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    """None if they were not asked for."""
    tells_ids: bool = False
    """Whether token ids were asked for."""
    finish_reason: FinishReason | None = None
    stats: GenerationStats = field(default_factory=GenerationStats)

    def add(self, piece: TextDelta) -> None:
        """Take the next piece."""
        self.text += piece.text
        self.token_ids.extend(piece.token_ids)
        self.stats, self.finish_reason = piece.stats, piece.finish_reason
        if self.logprobs is not None:
            self.logprobs.extend(piece.logprobs)


def empty_answers(orders: Sequence[AnswerOrder], body: Generation | None) -> list[AnswerSoFar]:
    """Return the answers to the orders of one request, before their first piece."""
    return [
        AnswerSoFar(
            len(order.prompt_ids),
            logprobs=None if order.logprobs is None else [],
            tells_ids=bool(body and body.return_token_ids),
        )
        for order in orders
    ]


def choice_document(kind: Kind, index: int, answer: AnswerSoFar, token_text: TokenText) -> dict[str, Any]:
    """Return one whole choice."""
    ids = {"token_ids": answer.token_ids} if answer.tells_ids else {}
    shared = {"index": index, "finish_reason": answer.finish_reason, **ids}
    if kind == "chat":
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        logprobs = None if answer.logprobs is None else chat_logprobs(answer.logprobs, token_text)
        return {**shared, "message": message, "logprobs": logprobs}
    logprobs = None if answer.logprobs is None else completion_logprobs(answer.logprobs, 0, token_text)
    return {**shared, "text": answer.text, "logprobs": logprobs}


def chat_logprobs(found: Sequence[TokenLogprobs], token_text: TokenText) -> dict[str, Any]:
    """Return log-probabilities as chat completions have them."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = token_text(token_id)
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": data}

    content = [
        {**entry(each.token_id, each.logprob), "top_logprobs": [entry(*item) for item in each.top]}
        for each in found
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(found: Sequence[TokenLogprobs], offset: int, token_text: TokenText) -> dict[str, Any]:
    """Return log-probabilities as completions have them; `offset` is the length of the text before."""
    tokens = [token_text(each.token_id) for each in found]
    offsets = [offset + sum(map(len, tokens[:number])) for number in range(len(tokens))]
    return {
        "tokens": tokens,
        "token_logprobs": [each.logprob for each in found],
        "top_logprobs": [{token_text(token): value for token, value in each.top} for each in found],
        "text_offset": offsets,
    }


def usage_document(answers: Sequence[AnswerSoFar], choices: int) -> dict[str, Any]:
    """Return how many tokens were read and written; `choices` answers belong to each prompt, which counts once."""
    prompts = answers[::choices]
    read = sum(answer.prompt_tokens for answer in prompts)
    cached = sum(answer.stats.prompt_tokens - answer.stats.prefilled_tokens for answer in prompts)
    written = sum(len(answer.token_ids) for answer in answers)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def figures_document(answers: Sequence[AnswerSoFar], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what only subspec tells: how the answers came about, each in the order of the choices."""
    return {**about, "choices": [_figures(answer.stats) for answer in answers]}


def _figures(stats: GenerationStats) -> dict[str, Any]:
    names = ("passes", "tau", "decode_tok_per_s", "ttft_s", "decode_time_s", "streamed_bytes")
    shares = ("link_busy_share", "draft_time_s", "verify_time_s", "wait_time_s", "shadow_hits")
    return {name: getattr(stats, name) for name in (*names, *shares)}


def error_document(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return an error as the API has it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
