"""Draft steps: one forward of the draft model, and the ranking of what it finds.

Several steps may be in flight before the first is read. On the CPU a step takes the host's own time, so each is
computed when it is started. On a GPU, reading every step at once would leave host and GPU waiting for each other; so
the next step is started before the last one is read, and may hold rows whose tokens the host does not know yet
(`captured_steps`).

Ranking predicts what `sample_token` would pick from the same logits. It consists of operations of fixed sizes that
wait for nothing, so a GPU holds them in one graph with the forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, NamedTuple, NewType, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subspec_cli.decoding.penalties import PathState
from subspec_cli.decoding.sampler import Filters, Row, Sampler
from subspec_cli.modeling.decoder import DraftLogits
from subspec_cli.modeling.draft_rows import DraftRows, places_of
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.token_batch import TokenBatch
from subspec_cli.streaming.mapped_memory import shared_with_gpu

StepRow = NewType("StepRow", int)
"""Row within one draft step."""
Ids = NDArray[np.int64]
SHARPENING: Final = 0.2
"""Temperature of the draft's guess. It is low, so side paths do not crowd out the likely one (arXiv 2509.18344)."""
RANKED: Final = 8
"""Children considered per node."""
_CANDIDATES: Final = 32
"""Tokens that a rough head picks for the 16-bit head to score."""
_TOP_K: Final = 256
"""Largest top-k that is applied."""
_FARTHEST: Final = 32.0
"""Distance below the best logit beyond which a token weighs nothing."""
_PLACES: Final = 1024
_WHOLE: Final = float(1 << 40)
"""The best token's share as a whole number."""
_TIE: Final = 2.0**-45
"""Weight of a token id beside a score. All ids together weigh less than the smallest difference of scores near 1."""
_LEAST_TEMPERATURE: Final = 1e-30
"""Smallest divisor by which logits up to 1e8 stay finite in float32."""


class Feed(NamedTuple):
    """Where a row takes its token from: what the previous step finds for its row `row`, at rank `rank`."""

    row: StepRow
    rank: int


class DraftModel(Protocol):
    """The model that drafts."""

    def forward(self, rows: Sequence[DraftRows]) -> DraftLogits:
        """Run one draft step over unpadded rows of some sequences, one sequence after another."""
        ...


@dataclass(frozen=True, slots=True)
class Found:
    """What a step found: for each of its `N` rows, the best few tokens and their scores, best first."""

    token_ids: Ids
    """`[N, K]`."""
    scores: Row
    """`[N, K]`; not finite where nothing is proposed."""


class SequenceSteps(Protocol):
    """One sequence's part in draft steps: its cache, and what its rows guess by."""

    @property
    def takes_masks(self) -> bool:
        """Whether rows guess only what a grammar allows; else `StepPart.allowed` is not read."""
        ...

    def penalize(self, state: PathState | None) -> None:
        """Let the steps to come guess by what penalties know behind the root; None ends it.

        Steps below the root guess by the root's state, which is near enough: the target decides by each node's own.
        """
        ...


class StepPart(NamedTuple):
    """One sequence's rows of a draft step."""

    sequence: SequenceSteps
    batch: TokenBatch
    """On the host."""
    feeds: Sequence[Feed | None]
    """By row. A row with a feed takes its token from the sequence's part of the previous step, not from the batch."""
    allowed: NDArray[np.bool_] | None = None
    """`[N, V]`: what a grammar lets follow each row; None if anything may."""


class DraftSteps(Protocol):
    """Starts draft steps over rows of some sequences, and reads what they found, in order."""

    @property
    def ahead(self) -> Literal[0, 1]:
        """Most steps that may be in flight unread when another is started."""
        ...

    def begin(self, kv: KVCache, sampler: Sampler) -> SequenceSteps:
        """Begin an answer over a cache, whose tokens `sampler` picks; steps that were not read are dropped."""
        ...

    def start(self, parts: Sequence[StepPart]) -> None:
        """Start a step over rows of some sequences; it writes draft-made keys and values to their scratch rows."""
        ...

    def read(self) -> list[Found]:
        """Return the result of the oldest step that was not read, by its parts."""
        ...


@dataclass(slots=True)
class DirectSequence:
    """A sequence in steps that are computed when they are started."""

    kv: KVCache
    sampler: Sampler
    penalty: Tensor | None = None
    takes_masks: ClassVar[bool] = True

    def penalize(self, state: PathState | None) -> None:
        """Keep the state's numbers."""
        self.penalty = None if state is None else penalty_numbers(state)

    def ranked(self, part: StepPart, logits: DraftLogits) -> Found:
        """Rank what the draft found for the sequence's rows."""
        if self.penalty is not None:
            self.penalty = shared_with_gpu(self.penalty, logits.logits.device)
        allowed = None if part.allowed is None else torch.from_numpy(part.allowed).to(logits.logits.device)
        sampling = sampling_of(self.sampler, part.batch, logits.logits)
        ids, scores = rank(logits, sampling, self.penalty, allowed)
        return Found(ids.cpu().numpy(), scores.double().cpu().numpy())


class DirectSteps:
    """Computes each step when it is started."""

    ahead: Literal[0, 1] = 0

    def __init__(self, draft: DraftModel) -> None:
        self.draft = draft
        self._found: list[Found] = []

    def begin(self, kv: KVCache, sampler: Sampler) -> DirectSequence:
        """Return a sequence; no step is in flight."""
        return DirectSequence(kv, sampler)

    def start(self, parts: Sequence[StepPart]) -> None:
        """Run the step now."""
        assert not any(feed for part in parts for feed in part.feeds)
        sequences = [part.sequence for part in parts if isinstance(part.sequence, DirectSequence)]
        rows = [DraftRows(part.batch, own.kv) for part, own in zip(parts, sequences, strict=True)]
        found = self.draft.forward(rows)
        self._found = [
            own.ranked(part, found if len(rows) == 1 else found.of(place))
            for part, own, place in zip(parts, sequences, places_of(rows), strict=True)
        ]

    def read(self) -> list[Found]:
        """Return what the last step found."""
        return self._found


def penalty_numbers(state: PathState) -> Tensor:
    """Return what a state does to logits as numbers `[3, V]` float32 on the host: added, divided by, taken."""
    rule, numbers = state.penalties, np.zeros((3, len(state.seen)), dtype=np.float32)
    for token_id, bias in rule.bias:
        numbers[0, token_id] = bias
    numbers[1] = np.where(state.seen, rule.repetition, 1.0)
    numbers[2] = state.counts * rule.frequency + (state.counts > 0) * rule.presence
    return torch.from_numpy(numbers)


def penalized(logits: Tensor, penalty: Tensor | None) -> Tensor:
    """Return float32 logits `[N, V]` with penalties as `penalty_numbers` gives them; nothing here waits for a GPU."""
    rows = logits.float()
    if penalty is None:
        return rows
    rows = rows + penalty[0]
    return torch.where(rows < 0, rows * penalty[1], rows / penalty[1]) - penalty[2]


def sampling_of(sampler: Sampler, batch: TokenBatch, logits: Tensor) -> Sampling | None:
    """Return the sampler's rule for the rows of a batch; their children are the tokens of the next positions."""
    rows = [sampler.noise(position + 1, logits.shape[1]) for position in batch.positions.tolist()]
    noise = [row for row in rows if row is not None]
    if not noise:
        return None
    device = logits.device
    return Sampling(
        shared_with_gpu(torch.from_numpy(np.stack(noise)).float(), device),
        sampling_rule(sampler, logits.shape[1]).to(device),
        sampler.filters is not None,
    )


@dataclass(frozen=True, slots=True)
class Sampling:
    """How `N` draft rows are sampled, as tensors, so that a captured step can take other numbers later."""

    noise: Tensor
    """`[N, V]` float32."""
    rule: Tensor
    """`[4]` float32: temperature, top-k (the vocabulary's size if it filters nothing), top-p, min-p."""
    is_filtered: bool


def sampling_rule(sampler: Sampler, vocab: int) -> Tensor:
    """Return the numbers of a sampler's rule, `[4]` on the host."""
    filters = sampler.filters or Filters(0, 1.0)
    return torch.tensor([sampler.temperature, filters.top_k or vocab, filters.top_p, filters.min_p])


def rank(
    found: DraftLogits,
    sampling: Sampling | None,
    penalty: Tensor | None = None,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ids `[N, K]` and float32 scores of the best few tokens of each draft row, best first; K <= RANKED.

    Without `sampling` the ranking is greedy. The best of rough logits are scored again by the 16-bit head: the error
    of a 4-bit head alone would cost a fifth of the accepted tokens. `allowed` `[N, V]` leaves out what a grammar
    forbids. `likeliest` handles values that are not finite.
    """
    scaled = _scaled(penalized(found.logits, penalty), sampling)
    if allowed is not None:
        scaled = scaled.masked_fill(~allowed, -torch.inf)
    count = min(_CANDIDATES if found.is_rough else RANKED, scaled.shape[1])
    scores = scaled if sampling is None else scaled + sampling.noise
    if sampling is not None and sampling.is_filtered:
        scores = scores.masked_fill(~_kept(scaled, sampling), -torch.inf)
    values, ids = scores.topk(count, dim=-1)
    if found.is_rough:
        gained = found.rescored(ids) - found.logits.gather(1, ids).float()
        values, places = (values + _scaled(gained, sampling)).topk(min(RANKED, values.shape[1]), dim=-1)
        ids = ids.gather(1, places)
    # Ties go to the lowest id, as in `sample_token`; 16-bit logits are often equal.
    order = (values.double() - ids.double() * _TIE).argsort(dim=-1, descending=True)
    return ids.gather(1, order), values.gather(1, order)


def _scaled(logits: Tensor, sampling: Sampling | None) -> Tensor:
    return logits if sampling is None else logits / sampling.rule[0].clamp_min(_LEAST_TEMPERATURE)


def _kept(scaled: Tensor, sampling: Sampling) -> Tensor:
    """Return a mask `[N, V]` of about what top-k, top-p and min-p keep.

    For top-p, logits that differ by less than 1/32 count as equal. Sorting whole rows would take longer than the
    step. Shares are summed as whole numbers by their distance from the best, so the order of the sum does not matter.
    A top-k larger than `_TOP_K` is not applied.
    """
    top_k, top_p = sampling.rule[1], sampling.rule[2]
    best = scaled.topk(min(_TOP_K, scaled.shape[1]), dim=-1).values
    last = best.index_select(1, (top_k.long() - 1).clamp(0, best.shape[1] - 1).view(1))
    within = (scaled >= last) | (top_k > best.shape[1])
    within &= scaled >= best[:, :1] + sampling.rule[3].log()
    below = (best[:, :1] - scaled).nan_to_num(nan=torch.inf).clamp(0, _FARTHEST)
    places = (below * (_PLACES / _FARTHEST)).long().clamp_max(_PLACES - 1)
    shares = (below.neg_().exp_().mul_(within) * _WHOLE).long()
    mass = torch.zeros((len(scaled), _PLACES), dtype=torch.long, device=scaled.device)
    mass.scatter_add_(1, places, shares)
    open_places = mass.cumsum(1) - mass < top_p * mass.sum(1, keepdim=True)
    return within & open_places.gather(1, places)


def likeliest(token_ids: Ids, scores: Row, sharpening: float = SHARPENING) -> list[tuple[int, float]]:
    """Return (token id, sharpened log-probability) pairs of ranked tokens, best first; ties go to the lowest id.

    Tokens that a filter forbids are left out. A draft row that is not finite proposes nothing.
    """
    able = np.isfinite(scores)
    if not able.any():
        return []
    token_ids, scores = token_ids[able], scores[able]
    order = np.lexsort((token_ids, -scores))
    # At this sharpness the tokens beyond the ranked ones have no weight that matters.
    sharp = (scores[order] - scores[order[0]]) / sharpening
    log_total = float(np.log(np.exp(sharp).sum()))
    return [
        (int(token), float(score) - log_total) for token, score in zip(token_ids[order], sharp, strict=True)
    ]
