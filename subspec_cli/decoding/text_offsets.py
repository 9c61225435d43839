"""Where the tokens of an answer begin in its text."""

from __future__ import annotations

import codecs
from typing import Protocol

from subspec_cli.decoding.detokenizer import Detokenizer, Tokenizer


class BytesTokenizer(Tokenizer, Protocol):
    """A tokenizer that also knows the bytes of a token."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token among others; of a special token those of its name."""
        ...


class TextOffsets:
    """Where each token of an answer begins in its text, in characters.

    Parts of one character share its place. A token without text has the place of the next one.
    """

    def __init__(self, tokenizer: BytesTokenizer) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)
        self._is_empty = True
        self._settled = 0
        self._characters = _Characters()
        """Behind the settled text."""

    def add(self, token_id: int) -> int:
        """Take the next token; return where it begins."""
        tokenizer = self._tokenizer
        if tokenizer.drops(token_id, special=False):
            return self._settled + self._characters.count
        begins = self._begins(token_id, tokenizer.token_bytes(token_id))
        is_first, self._is_empty = self._is_empty, False
        return 0 if is_first else begins

    def _begins(self, token_id: int, data: bytes) -> int:
        tokenizer = self._tokenizer
        if tokenizer.settling == "whole characters":
            return self._characters.add(data)
        is_known = tokenizer.settling != "at the end"
        piece = self._detokenizer.push(token_id) if is_known else data.decode(errors="replace")
        if not piece and tokenizer.byte_of(token_id) is not None:
            return self._settled + self._characters.add(data)
        before, self._settled = self._settled, self._settled + len(piece)
        self._characters = _Characters()
        # A token may have less text at the beginning of an answer, such as no leading space.
        return max(before, self._settled - len(data.decode(errors="replace")))


class _Characters:
    """Counts the characters of a text that comes in bytes."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.count = 0
        """Without an unfinished last one."""

    def add(self, data: bytes) -> int:
        """Take bytes; return the number of the character that the first of them belongs to."""
        self.count += len(self._utf8.decode(data[:1]))
        is_unfinished = bool(self._utf8.getstate()[0])
        begins = self.count - (bool(data) and not is_unfinished)
        self.count += len(self._utf8.decode(data[1:]))
        return begins
