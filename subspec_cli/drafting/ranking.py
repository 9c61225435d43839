"""The draft's likeliest tokens, ranked where its logits are, and what it gives them.

Ranking is a guess of what `sample_token` would say: operations of fixed sizes that wait for nothing, so that a GPU
holds them in one graph with the step that makes the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subspec_cli.decoding.sampler import Filters, Row, Sampler
from subspec_cli.modeling.decoder import DraftLogits

Ids = NDArray[np.int64]
SHARPENING: Final = 0.2
"""Temperature of the draft's guess: low, so that side paths do not crowd out the likely one (SubSpec, 2509.18344)."""
RANKED: Final = 8
"""Children looked at per node."""
_CANDIDATES: Final = 32
"""Tokens that a rough head picks for the 16-bit one to score."""
_TOP_K: Final = 256
"""Largest top-k that is looked at."""
_FARTHEST: Final = 32.0
"""Logits below the best one; what lies farther below weighs nothing."""
_PLACES: Final = 1024
_WHOLE: Final = float(1 << 40)
"""The best token's share, counted in whole numbers."""
_TIE: Final = 2.0**-45
"""What an id weighs beside a score: less, for all ids together, than two scores near 1 can differ by."""
_LEAST_TEMPERATURE: Final = 1e-30
"""Divides any logit in float32 without overflow."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How `N` draft rows are sampled: tensors, so that a captured step takes other numbers later."""

    noise: Tensor
    """`[N, V]` float32."""
    rule: Tensor
    """`[3]` float32: temperature, top-k (as many as there are where it filters nothing), top-p."""
    is_filtered: bool


def sampling_rule(sampler: Sampler, vocab: int) -> Tensor:
    """The numbers of a sampler's rule, on the host."""
    filters = sampler.filters or Filters(0, 1.0)
    return torch.tensor([sampler.temperature, filters.top_k or vocab, filters.top_p])


def rank(found: DraftLogits, sampling: Sampling | None) -> tuple[Tensor, Tensor]:
    """Ids `[N, K]` and float32 scores of the best few tokens of each draft row, best first; K <= RANKED.

    Without `sampling` greedy. Of rough logits the best are candidates, scored again by the 16-bit head: what
    four bits lose at the head alone would cost a fifth of the accepted tokens. What is not finite is left to
    `likeliest`.
    """
    scaled = _scaled(found.logits.float(), sampling)
    count = min(_CANDIDATES if found.is_rough else RANKED, scaled.shape[1])
    scores = scaled if sampling is None else scaled + sampling.noise
    if sampling is not None and sampling.is_filtered:
        scores = scores.masked_fill(~_kept(scaled, sampling), -torch.inf)
    values, ids = scores.topk(count, dim=-1)
    if found.is_rough:
        gained = found.rescored(ids) - found.logits.gather(1, ids).float()
        values, places = (values + _scaled(gained, sampling)).topk(min(RANKED, values.shape[1]), dim=-1)
        ids = ids.gather(1, places)
    # Of equals the lowest id comes first, as it does for `sample_token`; 16-bit logits are often equal.
    order = (values.double() - ids.double() * _TIE).argsort(dim=-1, descending=True)
    return ids.gather(1, order), values.gather(1, order)


def _scaled(logits: Tensor, sampling: Sampling | None) -> Tensor:
    return logits if sampling is None else logits / sampling.rule[0].clamp_min(_LEAST_TEMPERATURE)


def _kept(scaled: Tensor, sampling: Sampling) -> Tensor:
    """Mask `[N, V]` of what top-k and top-p leave, nearly: tokens a thirty-second of a logit apart count as equal.

    Sorting whole rows would take longer than the step. Shares are summed as whole numbers, by their distance from
    the best, which comes to the same in any order. A top-k larger than `_TOP_K` is left to top-p.
    """
    top_k, top_p = sampling.rule[1], sampling.rule[2]
    best = scaled.topk(min(_TOP_K, scaled.shape[1]), dim=-1).values
    last = best.index_select(1, (top_k.long() - 1).clamp(0, best.shape[1] - 1).view(1))
    within = (scaled >= last) | (top_k > best.shape[1])
    below = (best[:, :1] - scaled).nan_to_num(nan=torch.inf).clamp(0, _FARTHEST)
    places = (below * (_PLACES / _FARTHEST)).long().clamp_max(_PLACES - 1)
    shares = (below.neg_().exp_().mul_(within) * _WHOLE).long()
    mass = torch.zeros((len(scaled), _PLACES), dtype=torch.long, device=scaled.device)
    mass.scatter_add_(1, places, shares)
    open_places = mass.cumsum(1) - mass < top_p * mass.sum(1, keepdim=True)
    return within & open_places.gather(1, places)


def likeliest(token_ids: Ids, scores: Row, sharpening: float = SHARPENING) -> list[tuple[int, float]]:
    """(token id, log-probability) pairs of ranked tokens, sharpened, best first; of equals, the lowest id.

    Tokens that a filter forbids are left out; of a draft row that is not finite, nothing is proposed.
    """
    able = np.isfinite(scores)
    if not able.any():
        return []
    token_ids, scores = token_ids[able], scores[able]
    order = np.lexsort((token_ids, -scores))
    # At this sharpness what lies beyond the ranked tokens weighs nothing that matters to a guess.
    sharp = (scores[order] - scores[order[0]]) / sharpening
    log_total = float(np.log(np.exp(sharp).sum()))
    return [
        (int(token), float(score) - log_total) for token, score in zip(token_ids[order], sharp, strict=True)
    ]
