"""Penalties, biases and grammars on the target's logits, which depend on the tokens before a position.

A `PathState` knows these at one node of a tree: it is made from its parent's by the node's token. So verification
adjusts each row by the tokens on its own path, and plain and speculative decoding pick the same tokens.

Formulas: the repetition penalty of Keskar et al. (CTRL, arXiv 1909.05858) over prompt and answer, as the library's
processor applies it; the presence and frequency penalties of the OpenAI API over the answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from subspec_cli.config import SamplingConfig
from subspec_cli.decoding.constraint import Constraint

Row = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Penalties:
    """Numbers that change logits; the defaults change nothing."""

    repetition: float = 1.0
    """Divides a positive logit of a token that came before, multiplies a negative one."""
    presence: float = 0.0
    """Subtracted once from each token of the answer."""
    frequency: float = 0.0
    """Subtracted for each time that a token is in the answer."""
    bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of these tokens, before the penalties."""

    @property
    def do_nothing(self) -> bool:
        """Whether no logit is changed."""
        return self == NO_PENALTIES


NO_PENALTIES: Final = Penalties()


@dataclass(frozen=True, slots=True)
class PathState:
    """What the penalties know at a node: the tokens of prompt and answer up to it. Arrays are never written to."""

    penalties: Penalties
    seen: NDArray[np.bool_]
    """`[V]`: tokens of prompt and answer."""
    counts: NDArray[np.int32]
    """`[V]`: how often each token is in the answer."""
    constraint: Constraint | None = None
    """What a grammar lets come next; None if anything may."""

    def after(self, *token_ids: int) -> PathState:
        """Return the state behind further tokens of a path: that of a child with one of them, or deeper."""
        seen, counts, constraint = self.seen.copy(), self.counts.copy(), self.constraint
        for token_id in token_ids:
            seen[token_id] = True
            counts[token_id] += 1
            constraint = None if constraint is None else constraint.after(token_id)
        return replace(self, seen=seen, counts=counts, constraint=constraint)

    def adjust(self, logits: Row) -> Row:
        """Return the logits `[V]` of the next token, adjusted by all that is known; the argument stays."""
        row, rule = logits.copy(), self.penalties
        for token_id, bias in rule.bias:
            row[token_id] += bias
        if rule.repetition != 1.0:
            came = row[self.seen]
            row[self.seen] = np.where(came < 0, came * rule.repetition, came / rule.repetition)
        if rule.presence or rule.frequency:
            row -= self.counts * rule.frequency + (self.counts > 0) * rule.presence
        if self.constraint is not None:
            row[~self.constraint.allowed()] = -np.inf
        return row


def penalties_of(sampling: SamplingConfig, biases: tuple[tuple[int, float], ...]) -> Penalties:
    """Return the penalties of the settings; `biases` are theirs, by token id."""
    return Penalties(
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        biases,
    )


def begin_path(
    penalties: Penalties, prompt_ids: Iterable[int], vocab: int, constraint: Constraint | None = None
) -> PathState | None:
    """Return the state behind a prompt; None if there is nothing to adjust."""
    if penalties.do_nothing and constraint is None:
        return None
    seen = np.zeros(vocab, dtype=np.bool_)
    seen[list(prompt_ids)] = True
    return PathState(penalties, seen, np.zeros(vocab, dtype=np.int32), constraint)
