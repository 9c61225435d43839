"""From tokens to the text of an answer: where it ends, and no text beyond a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from subspec_cli.decoding.detokenizer import Detokenizer, Tokenizer
from subspec_cli.metrics import FinishReason


class StopRule(Protocol):
    """Decides token by token whether an answer ends."""

    def feed(self, token_id: int) -> FinishReason | None:
        """Take the next token; return the finish reason if it is the last."""
        ...


class AnswerText:
    """Stop rule and text of one answer: EOS ids, stop strings, a token limit.

    An answer ends with the first token after which a stop string is in its text, or in its text with special tokens
    written out. What is before the string is shown, without special tokens. Plain and speculative decoding both feed
    it token by token, so both end at the same token with the same text. Text that may still change, or that may be
    the beginning of a stop string, is held back.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, eos_ids: Collection[int], stop: Sequence[str], max_new_tokens: int
    ) -> None:
        assert max_new_tokens >= 1
        self._tokenizer = tokenizer
        self._eos_ids = frozenset(eos_ids)
        self._stop = tuple(stop)
        self._left = max_new_tokens
        self._ids: list[int] = []
        self._detokenizer = Detokenizer(tokenizer)
        self._visible = _Searched(self._stop)
        self._written_out = _WrittenOut(tokenizer, self._stop)
        self._held = ""
        self._ready = ""
        self._released = 0

    def feed(self, token_id: int) -> FinishReason | None:
        """Take the next token; return `stop` or `length` if it is the last."""
        self._left -= 1
        ends = token_id in self._eos_ids
        if not ends:
            self._ids.append(token_id)
            self._held += self._visible.extend(self._detokenizer.push(token_id))
        if self._stop and self._cut_at_stop(token_id, ends=ends):
            return "stop"
        if ends or self._left == 0:
            self._finish(self._decode(self._ids))
            return "stop" if ends else "length"
        self._release()
        return None

    def take(self) -> str:
        """Return the text that became certain since the last call."""
        text, self._ready = self._ready, ""
        return text

    def _cut_at_stop(self, token_id: int, *, ends: bool) -> bool:
        """End the text before a stop string that the newest token completes, if there is one."""
        texts = []
        at = None if ends else self._visible.find(self._detokenizer.pending())
        if at is not None:
            texts.append(self._decode(self._ids)[:at])
        at = self._written_out.find(token_id, self._visible.settled)
        if at is not None:
            texts.append(self._text_before(at, [*self._ids, token_id] if ends else self._ids))
        if texts:
            self._finish(min(texts, key=len))
        return bool(texts)

    def _text_before(self, at: int, token_ids: Sequence[int]) -> str:
        """Return the text without special tokens that ends at character `at` of the text with them."""
        written = self._decode(token_ids, special=True)
        for count in range(len(token_ids) - 1, -1, -1):
            before = self._decode(token_ids[:count], special=True)
            if len(before) <= at:
                break
        text, first = self._decode(token_ids[:count]), token_ids[count]
        if first in self._eos_ids or self._tokenizer.drops(first, special=False):
            return text
        return text + written[len(before) : at]

    def _decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        return self._tokenizer.decode(token_ids, special=special)

    def _release(self) -> None:
        limit = self._visible.settled
        if self._stop:
            limit = min(self._visible.free, self._written_out.visible_free)
        cut = limit - self._released
        self._ready, self._held = self._ready + self._held[:cut], self._held[cut:]
        self._released = limit

    def _finish(self, text: str) -> None:
        """Release the rest of the answer's whole text."""
        self._ready += text[self._released :]
        self._held = ""


class _Searched:
    """A text that grows, and the stop strings in it."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._kept = max((len(text) for text in stop), default=1) - 1
        self._tail = ""
        self.settled = 0
        """Characters that can no longer change."""

    def extend(self, piece: str) -> str:
        """Add a settled piece of text, and return it."""
        self._tail = self._tail[max(len(self._tail) - self._kept, 0) :] + piece
        self.settled += len(piece)
        return piece

    def find(self, pending: str) -> int | None:
        """Return where the first stop string begins that ends in the last piece or in the unsettled text after it."""
        text = self._tail + pending
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        return self.settled - len(self._tail) + min(found) if found else None

    @property
    def free(self) -> int:
        """Characters before the first place where the settled text may begin a stop string."""
        return self.settled - max((_overlap(self._tail, stop) for stop in self._stop), default=0)


class _WrittenOut:
    """The text of an answer with special tokens written out, beside the text without them."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer, special=True)
        self._text = _Searched(stop)
        self._borders = [(0, 0)]
        """After a token: characters of this text, and settled characters without special tokens."""

    def find(self, token_id: int, visible: int) -> int | None:
        """Take the next token, after which `visible` characters are settled without special tokens.

        Return where the first stop string begins that this token completes; None if there is none.
        """
        self._text.extend(self._detokenizer.push(token_id))
        pending = self._detokenizer.pending()
        self._borders.append((self._text.settled + len(pending), visible))
        return self._text.find(pending)

    @property
    def visible_free(self) -> int:
        """Characters without special tokens before the first place that may begin a stop string."""
        free = self._text.free
        last = max(number for number, (written, _) in enumerate(self._borders) if written <= free)
        del self._borders[:last]
        return self._borders[0][1]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop`."""
    at = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0
