"""N-gram lookup (prompt lookup) for the draft model: what followed the same few tokens before.

A draft step of a few rows costs hardly more than one of a single row, but drafting is a chain: each token waits for
the one before. So the likeliest node is expanded together with the tokens that followed its last tokens earlier in
the prompt or the answer. Where the draft agrees, one step has made several levels. A wrong guess costs its row. How
often guesses are right is counted, so that they are made only where they pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

LONGEST: Final = 3
"""Most tokens of context that are looked up; longer matches come first."""
_MEMORY: Final = 0.95
"""Weight that older outcomes keep when a new one comes in."""
_PRIOR: Final = (0.3, 4.0)
"""Share and weight of right guesses before any was tried."""


@dataclass(frozen=True, slots=True)
class Guess:
    """A token to try, and the chance that the draft agrees, given that it agreed so far."""

    token_id: int
    chance: float
    order: int
    """Tokens of context that were matched."""


class NGramLookup:
    """The latest continuation of every run of up to three tokens, and the hit rates of guesses."""

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], int] = {}
        self._learned = 0
        self._tried = [_PRIOR[1]] * (LONGEST + 1)
        self._right = [_PRIOR[0] * _PRIOR[1]] * (LONGEST + 1)

    def forget(self) -> None:
        """Drop the text and keep the hit rates: another answer begins."""
        self._next.clear()
        self._learned = 0

    def learn(self, token_ids: Sequence[int]) -> None:
        """Index what was added to the text since the last call; `token_ids` is the whole text."""
        for end in range(max(1, self._learned), len(token_ids)):
            for order in range(1, min(LONGEST, end) + 1):
                self._next[tuple(token_ids[end - order : end])] = token_ids[end]
        self._learned = len(token_ids)

    def guesses(self, context: Sequence[int], count: int) -> list[Guess]:
        """Return up to `count` tokens that may follow `context`, one after another."""
        tail: list[int] = list(context[-LONGEST:])
        found: list[Guess] = []
        while len(found) < count and (guess := self._guess(tail)) is not None:
            found.append(guess)
            tail = [*tail, guess.token_id][-LONGEST:]
        return found

    def observe(self, guess: Guess, *, right: bool) -> None:
        """Record whether the draft agreed with a guess whose predecessors were right."""
        self._tried[guess.order] = self._tried[guess.order] * _MEMORY + 1.0
        self._right[guess.order] = self._right[guess.order] * _MEMORY + (1.0 if right else 0.0)

    def _guess(self, tail: Sequence[int]) -> Guess | None:
        for order in range(len(tail), 0, -1):
            token_id = self._next.get(tuple(tail[-order:]))
            if token_id is not None:
                return Guess(token_id, self._right[order] / self._tried[order], order)
        return None
