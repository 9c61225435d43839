"""An answer as a session gives it: what decides its tokens, and the pieces in which it comes."""

from __future__ import annotations

from dataclasses import dataclass, field

from subspec_cli.config import SamplingConfig
from subspec_cli.decoding.constraint import Constraint
from subspec_cli.decoding.logprobs import TokenLogprobs
from subspec_cli.decoding.penalties import Penalties
from subspec_cli.decoding.sampler import Sampler
from subspec_cli.metrics import FinishReason, GenerationStats


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of an answer: text that became certain, and the tokens of one target pass."""

    text: str
    """Empty while a character or a stop string may be incomplete."""
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    """Set on the last piece only."""
    stats: GenerationStats
    """Totals of the answer so far."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token, if they were asked for."""
    failure: str | None = None
    """Why the answer's grammar could not go on; the answer ends with this piece and is not whole."""


@dataclass(frozen=True, slots=True)
class BegunAnswer:
    """An answer that may go on: what decides its tokens, and those it has."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingConfig
    sampler: Sampler
    penalties: Penalties
    stop: tuple[str, ...]
    logprobs: int | None = None
    """Likeliest tokens to tell beside each token; None tells no log-probabilities."""
    constraint: Constraint | None = None
    """State of a grammar before the first token."""
    token_ids: list[int] = field(default_factory=list)
