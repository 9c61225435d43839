"""JSON by a schema, as masks over the vocabulary: the states of llguidance's matcher."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cached_property, lru_cache
from typing import Any, Final

import llguidance
import numpy as np
from numpy.typing import NDArray

from subspec_cli.errors import UnsupportedModelError, UsageError
from subspec_cli.modeling.finite_schema import has_finite_answer

_OPTIONS: Final[Any] = {"whitespace_flexible": True, "whitespace_pattern": r"( |\n {0,24})?"}
"""One space, or a new line that is indented: a small model may write spaces without end."""
_CANNOT_GO_ON: Final = (
    "the answer cannot go on by its schema: nothing may come next, or the schema is too complex"
)
_KEPT_GRAMMARS: Final = 4
"""Latest schemas whose first states are kept."""


class JsonGrammars:
    """Makes the first states of grammars for one tokenizer."""

    def __init__(self, tokenizer_json: str | None, vocab: int, end_ids: Collection[int]) -> None:
        """Index the vocabulary, which takes about a second and 600 bytes a token.

        Raises UnsupportedModelError if the tokenizer is none of the tokenizers library, or if nothing ends an answer.
        """
        if tokenizer_json is None:
            raise UnsupportedModelError("the model's tokenizer has no form that a grammar can be applied to")
        if not end_ids:
            raise UnsupportedModelError("nothing ends an answer of this model, so JSON would not end either")
        try:
            self._tokenizer = llguidance.LLTokenizer(tokenizer_json, n_vocab=vocab, eos_token=sorted(end_ids))
        except (ValueError, RuntimeError) as error:
            raise UnsupportedModelError(
                f"no grammar can be applied to the model's tokenizer: {error}"
            ) from error
        self._vocab = vocab
        self._end_ids = tuple(sorted(end_ids))
        # A request's schema is checked when it comes, and begins each of its choices later.
        self._compiled = lru_cache(maxsize=_KEPT_GRAMMARS)(self._compile)

    def first_state(self, schema: dict[str, Any] | bool) -> GrammarState:
        """Return the state before an answer that follows a JSON schema; `True` is any object.

        Raises UsageError for a schema that cannot be followed.
        """
        return self._compiled(json.dumps({"type": "object"} if schema is True else schema))

    def _compile(self, schema: str) -> GrammarState:
        if not has_finite_answer(json.loads(schema)):
            raise UsageError(
                "the schema cannot be followed: it refers to itself, so no answer to it ever ends"
            )
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_OPTIONS)
        except ValueError as error:
            raise UsageError(f"the schema cannot be followed: {_reason(str(error))}") from error
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise UsageError(f"the schema cannot be followed: {_reason(matcher.get_error())}")
        return GrammarState(matcher, self._vocab, self._end_ids)


def _reason(error: str) -> str:
    """Return an error without what it quotes: a pattern, or the parser's state, which holds schema and answer."""
    first, *rest = error.split("\n")
    if first.endswith(":") and rest and rest[-1].startswith("error: "):
        first = f"{first} {rest[-1].removeprefix('error: ')}"
    return " ".join(first.split()).partition(": (")[0][:300]


class GrammarState:
    """A grammar behind some tokens. Nothing changes it."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab: int, end_ids: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._vocab = vocab
        self._end_ids = end_ids

    @cached_property
    def failure(self) -> str | None:
        """Why the grammar cannot go on; None if it can. What its parser says holds the answer."""
        return _CANNOT_GO_ON if self._matcher.get_error() else None

    def after(self, token_id: int) -> GrammarState:
        """Return the state behind one more token, which must be an allowed one."""
        matcher = self._matcher.deep_copy()
        matcher.consume_token(token_id)
        return GrammarState(matcher, self._vocab, self._end_ids)

    def allowed(self) -> NDArray[np.bool_]:
        """Return a mask `[V]` of the tokens that may come next; the tokens that end an answer if no other may."""
        words = np.zeros(-(-self._vocab // 32), dtype=np.int32)
        if self.failure is None:
            matcher = self._matcher.deep_copy()  # computing a mask moves the matcher's lexer
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        mask = np.unpackbits(words.view(np.uint8), bitorder="little")[: self._vocab].astype(np.bool_)
        if not mask.any():
            mask[list(self._end_ids)] = True
        return mask
