"""What drafting has learned from verified trees: how often the target agrees, and how fast the run is.

A history outlives answers. It is fed with outcomes alone and reads no clock, so equal runs learn the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from subspec_cli.decoding.tree import TokenTree
from subspec_cli.decoding.verification import VerifyResult

_RATE_MEMORY: Final = 0.8
"""Weight that tokens and time of earlier rounds keep when a new one comes in."""
_YIELD_WEIGHT: Final = 0.1
"""Weight of a new observation of what a draft step adds."""
_SHARE_WEIGHT: Final = 0.02
"""Weight of a new observation of the chances of a node's children."""
_EXPONENTS: Final = 2.0 ** np.arange(-4, 2.5, 0.5)
"""Exponents of the draft's guesses that are compared; 1 believes them."""
_DISBELIEF_COST: Final = 0.5
"""What an exponent of two or of a half costs before anything is observed, in nats; a multiple costs its square."""
_PRIOR_WEIGHT: Final = 8.0
"""Choices that were found among the draft's tokens before anything is observed."""
_MEMORY: Final = 0.99
"""Weight that older choices keep when a new one comes in."""
_LEAST_LOG_PROB: Final = -40.0
"""Less likely guesses count as this, so that no choice is impossible."""


class Ranking(NamedTuple):
    """The children that the draft found for a node, and which of them the target chose."""

    log_probs: tuple[float, ...]
    """The draft's own, given the node."""
    chosen: int | None
    """None if it is another token."""


class Calibration:
    """Chances of the draft's guesses, by what the target chose.

    A good substitute errs by little, so its runner-up is hardly ever right; a worse one errs by more. The exponent
    under which the guesses explain the choices best tells how much. All exponents count, by how well they do.
    """

    def __init__(self) -> None:
        self._fit: NDArray[np.float64] = -_DISBELIEF_COST * np.log2(_EXPONENTS) ** 2
        """Log-likelihood of the choices under each exponent."""
        self._found = self._choices = _PRIOR_WEIGHT

    def copy(self) -> Calibration:
        """Return one that has learned the same, and learns by itself from here on."""
        other = Calibration()
        other._fit, other._found, other._choices = self._fit, self._found, self._choices
        return other

    def shares(self, log_probs: Sequence[float]) -> list[float]:
        """Return the chances of a node's children, given the node, from the draft's guesses."""
        weights = np.exp(self._fit - self._fit.max())
        weights *= self._found / self._choices / weights.sum()
        shares: list[float] = (weights @ np.exp(_tempered(log_probs))).tolist()
        return shares

    def observe(self, ranking: Ranking) -> None:
        """Record what the target chose below a node, whether or not it was in the tree."""
        self._choices = _MEMORY * self._choices + 1
        self._found *= _MEMORY
        if ranking.chosen is not None:
            self._found += 1
            self._fit = _MEMORY * self._fit + _tempered(ranking.log_probs)[:, ranking.chosen]


def _tempered(log_probs: Sequence[float]) -> NDArray[np.float64]:
    """Return the log-probabilities `[exponents, children]` of guesses under each exponent."""
    scaled = _EXPONENTS[:, None] * np.maximum(np.asarray(log_probs), _LEAST_LOG_PROB)
    scaled -= scaled.max(axis=1, keepdims=True)
    found: NDArray[np.float64] = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    return found


class History:
    """Running averages of the outcomes of draft steps and passes."""

    def __init__(self) -> None:
        self.calibration = Calibration()
        self.child_shares: tuple[float, ...] = (0.8, 0.1, 0.05)
        """Mean chance of a node's best, second and third child, given that the target reaches the node."""
        self.step_yield = 0.9
        """Mean chance that a draft step adds, per chance of the nodes it expands."""
        self.passes_without_draft = 0
        """Passes over a root alone since the last drafted tree."""
        self._recent_tokens = 0.0
        self._recent_s = 0.0

    def tokens_per_s(self, expected_tokens: float, round_s: float) -> float:
        """Return the run's rate over recent rounds and one more that is expected to give these tokens."""
        return (expected_tokens + self._recent_tokens) / (round_s + self._recent_s)

    def gain(self, chance: float) -> float:
        """Return the tokens that expanding nodes of this total chance is likely to add."""
        return self.step_yield * chance

    def learn_child_shares(self, shares: Sequence[float]) -> None:
        """Record the chances of a node's children given the node, best first."""
        found = (*shares, 0.0, 0.0, 0.0)
        self.child_shares = tuple(
            mean + _SHARE_WEIGHT * (share - mean)
            for mean, share in zip(self.child_shares, found, strict=False)
        )

    def learn_yield(self, gained: float) -> None:
        """Record the chance that a draft step added, per chance of the nodes it expanded."""
        self.step_yield += _YIELD_WEIGHT * (min(gained, 1.0) - self.step_yield)

    def observe(
        self,
        tree: TokenTree,
        result: VerifyResult,
        rankings: Sequence[Ranking],
        *,
        round_s: float,
    ) -> None:
        """Learn from a verified tree, with its share of what its pass and the draft steps before it cost.

        Every child that the draft found for a node on the target's path is evidence, in the tree or not: the target's
        token says whether it was right. `rankings` are those of the path.
        """
        self.passes_without_draft = 0 if len(tree) > 1 else self.passes_without_draft + 1
        self._recent_tokens = _RATE_MEMORY * self._recent_tokens + len(result.token_ids)
        self._recent_s = _RATE_MEMORY * self._recent_s + round_s
        for ranking in rankings:
            self.calibration.observe(ranking)
