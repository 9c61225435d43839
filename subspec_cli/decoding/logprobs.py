"""Log-probabilities of emitted tokens, from the target's raw logits: before penalties, temperature and filters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from subspec_cli.decoding.sampler import Row


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One emitted token, and the likeliest tokens at its place."""

    token_id: int
    logprob: float
    """Natural logarithm of the token's probability."""
    top: tuple[tuple[int, float], ...]
    """Token ids and their log-probabilities, likeliest first; equal ones in the order of their ids."""


def token_logprobs(logits: Row, token_id: int, count: int) -> TokenLogprobs:
    """Return the log-probability of a token by the logits `[V]` that it was chosen from, and those of `count` others.

    The `count` likeliest tokens may include the token itself.
    """
    best = float(logits.max())
    total = best + float(np.log(np.exp(logits - best).sum()))
    top: list[int] = []
    if count:
        least = np.partition(logits, -min(count, len(logits)))[-min(count, len(logits))]
        able = np.flatnonzero(logits >= least)
        top = able[np.lexsort((able, -logits[able]))][:count].tolist()
    return TokenLogprobs(
        token_id,
        float(logits[token_id]) - total,
        tuple((each, float(logits[each]) - total) for each in top),
    )
