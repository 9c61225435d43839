"""Answers in the form of the OpenAI API: whole, and piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from subspec_cli.decoding.logprobs import TokenLogprobs
from subspec_cli.decoding.text_offsets import BytesTokenizer, TextOffsets
from subspec_cli.metrics import FinishReason, GenerationStats
from subspec_cli.serving.orders import AnswerOrder
from subspec_cli.serving.request_body import Generation

if TYPE_CHECKING:
    from subspec_cli.session.answer import TextDelta

Kind = Literal["chat", "completion"]


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
    offsets: TextOffsets | None = None
    """None where nothing tells where tokens begin."""
    token_offsets: list[int] = field(default_factory=list)
    """Where the tokens of `logprobs` begin in the text."""
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
        if self.offsets is not None:
            self.token_offsets.extend(self.offsets.add(each.token_id) for each in piece.logprobs)


def empty_answers(
    orders: Sequence[AnswerOrder], body: Generation | None, tokenizer: BytesTokenizer
) -> list[AnswerSoFar]:
    """Return the answers to the orders of one request, before their first piece."""
    return [
        AnswerSoFar(
            len(order.prompt_ids),
            logprobs=None if order.logprobs is None else [],
            offsets=None if order.logprobs is None else TextOffsets(tokenizer),
            tells_ids=bool(body and body.return_token_ids),
        )
        for order in orders
    ]


def choice_document(kind: Kind, index: int, answer: AnswerSoFar, tokenizer: BytesTokenizer) -> dict[str, Any]:
    """Return one whole choice."""
    ids = {"token_ids": answer.token_ids} if answer.tells_ids else {}
    shared = {"index": index, "finish_reason": answer.finish_reason, **ids}
    logprobs = None if answer.logprobs is None else logprobs_document(kind, answer, 0, tokenizer)
    if kind == "chat":
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {**shared, "message": message, "logprobs": logprobs}
    return {**shared, "text": answer.text, "logprobs": logprobs}


def logprobs_document(
    kind: Kind, answer: AnswerSoFar, first: int, tokenizer: BytesTokenizer
) -> dict[str, Any]:
    """Return the log-probabilities of an answer from its token of number `first` on."""
    found = (answer.logprobs or [])[first:]
    if kind == "chat":
        # The first token may have less text than among others, such as no leading space.
        shown = (
            n
            for n, each in enumerate(answer.logprobs or [])
            if not tokenizer.drops(each.token_id, special=False)
        )
        begins = next(shown, None)
        content = []
        for number, each in enumerate(found, start=first):
            entry, *top = (
                _entry(*item, tokenizer, begins_text=number == begins)
                for item in ((each.token_id, each.logprob), *each.top)
            )
            content.append({**entry, "top_logprobs": top})
        return {"content": content, "refusal": None}
    top = list[dict[str, float]]()
    for each in found:
        top.append({})
        for token_id, logprob in each.top:  # likeliest first, which of two tokens with one name is told
            top[-1].setdefault(_name(tokenizer.token_bytes(token_id)), logprob)
    return {
        "tokens": [_name(tokenizer.token_bytes(each.token_id)) for each in found],
        "token_logprobs": [each.logprob for each in found],
        "top_logprobs": top,
        "text_offset": answer.token_offsets[first:],
    }


def _entry(token_id: int, logprob: float, tokenizer: BytesTokenizer, *, begins_text: bool) -> dict[str, Any]:
    """Return what a chat tells of one token. A token that the text does not show has no bytes."""
    data, is_shown = tokenizer.token_bytes(token_id), not tokenizer.drops(token_id, special=False)
    if begins_text and is_shown and "\ufffd" not in (shown := tokenizer.decode([token_id])):
        data = shown.encode()
    return {"token": _name(data), "logprob": logprob, "bytes": list(data) if is_shown else None}


def _name(data: bytes) -> str:
    """Return the name of a token: its text, or the bytes of a part of a character as the OpenAI API writes them."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


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
