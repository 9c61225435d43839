"""From tokens to text: whole characters, stop strings that span tokens, and no text beyond a stop."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final, Protocol

from subspec_cli.metrics import FinishReason

_UNFINISHED: Final = "\N{REPLACEMENT CHARACTER}"
_MOST_HELD_TOKENS: Final = 12
"""Tokens after which an unfinished character counts as invalid and is shown as it is."""


class Tokenizer(Protocol):
    """The part of a tokenizer that detokenization needs."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens without special tokens."""
        ...


class StopRule(Protocol):
    """Decides token by token whether an answer ends."""

    def feed(self, token_id: int) -> FinishReason | None:
        """Take the next token; return the finish reason if it is the last."""
        ...


class Detokenizer:
    """Turns a growing token sequence into pieces of text that never need to be retracted.

    It decodes a short window twice, without and with the new token, because a token's text can depend on its
    neighbours. It holds a piece back while the piece ends in the middle of a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0
        self._shown = 0

    def push(self, token_id: int) -> str:
        """Return the text that this token completes, which may be empty."""
        self._ids.append(token_id)
        if not self._piece().endswith(_UNFINISHED):
            return self.flush()
        if len(self._ids) - self._shown <= _MOST_HELD_TOKENS:
            return ""
        return self._show(self._last_border())

    def flush(self) -> str:
        """Return the text that is still held back."""
        return self._show(len(self._ids))

    def _piece(self, end: int | None = None) -> str:
        """Return the text of the tokens before `end` that was not shown yet."""
        before = self._tokenizer.decode(self._ids[self._context : self._shown])
        return self._tokenizer.decode(self._ids[self._context : end])[len(before) :]

    def _show(self, end: int) -> str:
        piece = self._piece(end)
        self._context, self._shown = self._shown, end
        return piece

    def _last_border(self) -> int:
        """Return a border between characters before the last one, which has at most three tokens so far."""
        end, whole = len(self._ids), self._piece()
        for border in range(end - 3, end):
            if self._piece(border) + self._tokenizer.decode(self._ids[border:]) == whole:
                return border
        return end


class AnswerText:
    """Stop rule and text of one answer: EOS ids, stop strings, a token limit.

    Plain and speculative decoding both feed it token by token, so both end at the same token with the same text. Text
    that may be the beginning of a stop string is held back.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, eos_ids: Collection[int], stop: Sequence[str], max_new_tokens: int
    ) -> None:
        assert max_new_tokens >= 1
        self._detokenizer = Detokenizer(tokenizer)
        self._eos_ids = frozenset(eos_ids)
        self._stop = tuple(stop)
        self._left = max_new_tokens
        self._held = ""
        self._ready = ""

    def feed(self, token_id: int) -> FinishReason | None:
        """Take the next token; return `stop` or `length` if it is the last."""
        self._left -= 1
        if token_id in self._eos_ids:
            return self._finish("stop")
        self._held += self._detokenizer.push(token_id)
        if self._cut_at_stop():
            return "stop"
        if self._left == 0:
            return self._finish("length")
        self._release()
        return None

    def take(self) -> str:
        """Return the text that became certain since the last call."""
        text, self._ready = self._ready, ""
        return text

    def _finish(self, reason: FinishReason) -> FinishReason:
        self._held += self._detokenizer.flush()
        if self._cut_at_stop():
            return "stop"
        self._ready += self._held
        self._held = ""
        return reason

    def _cut_at_stop(self) -> bool:
        found = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        if not found:
            return False
        self._ready += self._held[: min(found)]
        self._held = ""
        return True

    def _release(self) -> None:
        keep = max((_overlap(self._held, text) for text in self._stop), default=0)
        cut = len(self._held) - keep
        self._ready += self._held[:cut]
        self._held = self._held[cut:]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
