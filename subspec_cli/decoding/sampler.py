"""One pure function picks every token, greedy or sampled: `sample_token(sampler, logits_row, position)`.

Sampling uses the Gumbel-max trick: argmax of filtered logits / temperature + Gumbel noise is an exact draw from the
filtered softmax. The noise is a counter-based function of (seed, choice, position), so plain and speculative decoding
draw the same token from the same logits, alone or beside other requests. The draft adds the same noise to its own
logits to predict the target's draw ("coupling without communication", Daliri et al.).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.random import Generator, Philox
from numpy.typing import NDArray

from subspec_cli.config import SamplingConfig
from subspec_cli.decoding.penalties import PathState
from subspec_cli.limits import NOISE_ROWS, SEED_BITS

Row = NDArray[np.float64]
_LEAST_TEMPERATURE: Final = 1e-200
"""Smallest divisor by which a float32 logit stays finite in float64. Unequal logits then outweigh any noise."""


@dataclass(frozen=True, slots=True)
class Filters:
    """Top-k, then top-p over the tokens that are left, then min-p. 0, 1 and 0 switch them off."""

    top_k: int
    top_p: float
    min_p: float = 0.0


class Sampler(Protocol):
    """Picks the token for a position from one row of logits. `V` is the size of the vocabulary."""

    @property
    def temperature(self) -> float:
        """Divisor of the logits; 1 if the scores are the logits themselves."""
        ...

    @property
    def filters(self) -> Filters | None:
        """Which tokens may be drawn; None if all may."""
        ...

    def scores(self, logits: Row, position: int) -> Row:
        """Return `[V]` scores whose argmax is the token; -inf where a filter forbids a token."""
        ...

    def noise(self, position: int, vocab: int) -> Row | None:
        """Return the noise `[V]` that is added to the scaled logits of a position; None if there is none."""
        ...


def sample_token(sampler: Sampler, logits: Row, position: int, state: PathState | None = None) -> int:
    """Return the token for `position`: the first argmax of the scores, behind the path that `state` knows."""
    row = logits if state is None else state.adjust(logits)
    return int(np.argmax(sampler.scores(row, position)))


class GreedySampler:
    """Picks the most likely token; ties go to the lowest id."""

    temperature = 1.0
    filters = None

    def scores(self, logits: Row, position: int) -> Row:  # noqa: ARG002
        """Return the logits themselves."""
        return logits

    def noise(self, position: int, vocab: int) -> Row | None:  # noqa: ARG002
        """Return None."""
        return None


class GumbelSampler:
    """Samples exactly at a temperature, with top-k and top-p."""

    def __init__(self, sampling: SamplingConfig, seed: int, choice: int) -> None:
        assert sampling.temperature > 0
        self.temperature = max(sampling.temperature, _LEAST_TEMPERATURE)
        filters = Filters(sampling.top_k, sampling.top_p, sampling.min_p)
        self.filters = None if filters == Filters(0, 1.0) else filters
        self._seed = seed
        self._choice = choice
        self._noise: OrderedDict[int, Row] = OrderedDict()

    def scores(self, logits: Row, position: int) -> Row:
        """Return filtered logits / temperature + the noise of `position`."""
        scaled = logits / self.temperature
        scores = scaled + self.noise(position, len(logits))
        if self.filters is None:
            return scores
        keep = allowed_tokens(scaled, self.filters)
        return np.where(keep, scores, -np.inf)

    def noise(self, position: int, vocab: int) -> Row:
        """Return standard Gumbel noise `[V]`; the noise of the last positions is cached."""
        if position not in self._noise:
            self._noise[position] = gumbel_noise(self._seed, self._choice, position, vocab)
            if len(self._noise) > NOISE_ROWS:
                self._noise.popitem(last=False)
        return self._noise[position]


def make_sampler(sampling: SamplingConfig, seed: int, choice: int = 0) -> Sampler:
    """Return the sampler of one answer; `choice` is its number among the answers to one request."""
    return GreedySampler() if sampling.is_greedy else GumbelSampler(sampling, seed, choice)


def derived_seed(seed: int, number: int) -> int:
    """Return the seed of a request that has none of its own, by its number under another seed.

    Number 0 has that seed itself, so a program's first request equals one that names the seed.
    """
    return seed if number == 0 else _hashed_seed(f"subspec request {number} of seed {seed}")


def named_seed(seed: int, name: str) -> int:
    """Return the seed of a request that has none of its own, by its name in a job with another seed."""
    return _hashed_seed(f"subspec request named {name} of seed {seed}")


def _hashed_seed(text: str) -> int:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) >> (64 - SEED_BITS)


def gumbel_noise(seed: int, choice: int, position: int, vocab: int) -> Row:
    """Return the standard Gumbel noise `[vocab]` of one position, the same on every machine.

    Philox with key = seed and counter = (choice, position). Distinct counters never share a block, because the
    generator moves only the lowest of the four counter words.
    """
    bits = Philox(key=seed, counter=[0, position, choice, 0])
    uniform = Generator(bits).random(vocab)
    # random() may return 0; the smallest positive double replaces it, far below any value that can be drawn.
    return -np.log(-np.log(np.maximum(uniform, np.finfo(np.float64).tiny)))


def allowed_tokens(scaled: Row, filters: Filters) -> NDArray[np.bool_]:
    """Return a mask `[V]` of the tokens that top-k, top-p and min-p keep; ties in the order (-logit, token id).

    Among the tokens that top-k leaves, top-p keeps the shortest prefix of that order whose probability reaches
    `top_p`. Min-p keeps what is at least that share as likely as the best. The decision uses one float64 row, so it
    does not depend on the rows that were computed beside it.
    """
    top_k, top_p = filters.top_k, filters.top_p
    keep = np.ones(len(scaled), dtype=np.bool_)
    if 0 < top_k < len(scaled):
        keep = _most_likely(scaled, top_k)
    if top_p < 1.0:
        with np.errstate(invalid="ignore"):  # a damaged draft row keeps no token
            weights = np.where(keep, np.exp(scaled - scaled.max()), 0.0)
            probabilities = weights / weights.sum()
        # Tokens below this bound weigh less than 1 - top_p together: never in the prefix, so never sorted.
        candidates = np.flatnonzero(probabilities >= (1.0 - top_p) / len(scaled))
        order = candidates[np.lexsort((candidates, -scaled[candidates]))]
        reached = int(np.searchsorted(np.cumsum(probabilities[order]), top_p))
        keep = np.zeros(len(scaled), dtype=np.bool_)
        keep[order[: reached + 1]] = True
    if filters.min_p > 0.0:
        keep &= scaled >= scaled.max() + np.log(filters.min_p)
    return keep


def _most_likely(scaled: Row, count: int) -> NDArray[np.bool_]:
    threshold = np.partition(scaled, -count)[-count]
    keep: NDArray[np.bool_] = scaled > threshold
    ties = np.flatnonzero(scaled == threshold)
    keep[ties[: count - int(keep.sum())]] = True
    return keep
