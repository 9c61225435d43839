"""Pieces of text from a growing run of tokens: joined they are what the tokenizer decodes from all of them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Final, Protocol

from subspec_cli.modeling.settling import Settling

_UNFINISHED: Final = "\N{REPLACEMENT CHARACTER}"
_MOST_NEW_TOKENS: Final = 16
"""Tokens after which the window moves on."""
_CONTEXTS: Final = (8, 16, 32)
"""Last tokens of a window that may begin the next one; the first that has enough text is taken."""
_LEAST_CONTEXT: Final = 4
"""Characters that a context must have. A character has at most 4 bytes, so a context that begins within one is in
step before it ends; and what a decoder does to the beginning of a text is done within the context."""


class Tokenizer(Protocol):
    """The part of a tokenizer that detokenization needs."""

    @property
    def settling(self) -> Settling:
        """When the text of a token is settled."""
        ...

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of tokens; special tokens have one only if `special`."""
        ...

    def drops(self, token_id: int, *, special: bool) -> bool:
        """Whether decoding is the same without this token."""
        ...

    def byte_of(self, token_id: int) -> int | None:
        """Return the byte that a token of a byte run stands for; None for other tokens."""
        ...


class Detokenizer:
    """Turns tokens into pieces of text that never need to be retracted.

    It decodes a window: a context of settled tokens, and the tokens since. The window moves on every few tokens, so
    the work per token does not grow with the answer. Two things stay in the window as long as they may change: a run
    of byte tokens that is valid so far, and all text of a decoder of which nothing is known.
    """

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        """`special`: write special tokens out."""
        self._tokenizer = tokenizer
        self._special = special
        self._window: list[int] = []
        self._context_tokens = 0
        self._shown = 0  # characters of the window's text
        self._pending: str | None = ""
        self._run = _ByteRun()

    def push(self, token_id: int) -> str:
        """Return the text that this token settles, which may be empty."""
        known = self._tokenizer.settling != "at the end"
        if known and self._tokenizer.drops(token_id, special=self._special):
            return ""
        self._window.append(token_id)
        self._pending = None
        byte = self._tokenizer.byte_of(token_id)
        if not known or not self._run.settles(token_id, byte):
            return ""
        text = self._decode(self._window)
        settled = self._settled(text)
        piece, self._pending = settled[self._shown :], text[len(settled) :]
        self._shown = len(settled)
        if len(self._window) - self._context_tokens >= _MOST_NEW_TOKENS:
            self._move_on()
        return piece

    def pending(self) -> str:
        """Return the text that is not settled, as it is if no token follows."""
        if self._pending is None:
            self._pending = self._decode(self._window)[self._shown :]
        return self._pending

    def _settled(self, text: str) -> str:
        return text.removesuffix(_UNFINISHED) if self._tokenizer.settling == "whole characters" else text

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, special=self._special)

    def _move_on(self) -> None:
        """Begin a window with a context after which tokens decode as after all tokens so far."""
        if self._run.spoilers:
            return self._begin_with(self._run.spoilers, self._decode(self._run.spoilers))
        for count in _CONTEXTS:
            text = self._settled(self._decode(self._window[-count:]))
            if len(text) >= _LEAST_CONTEXT:
                return self._begin_with(self._window[-count:], text)
        return None

    def _begin_with(self, context: Sequence[int], text: str) -> None:
        self._window, self._context_tokens, self._shown = list(context), len(context), len(text)


class _ByteRun:
    """The run of byte tokens that the newest token belongs to."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._unfinished: list[int] = []
        self.spoilers: list[int] = []
        """Tokens that make any run with them invalid; empty while the run may be valid."""

    def settles(self, token_id: int, byte: int | None) -> bool:
        """Take the next token, and the byte that it stands for; return whether all text so far is settled."""
        if byte is None:
            self._utf8.reset()
            self._unfinished, self.spoilers = [], []
        elif not self.spoilers:
            self._unfinished.append(token_id)
            try:
                if self._utf8.decode(bytes([byte])):
                    self._unfinished = []
            except UnicodeDecodeError:
                self.spoilers = self._unfinished
        return byte is None or bool(self.spoilers)
