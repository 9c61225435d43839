"""Draft steps as the drafter starts them: several may be under way before the first is read.

Where a step takes the host's own time, each is read at once. On a GPU the host would stand still for it, and the
GPU for the host: so the next step is started before the last one is read, and may hold children that the host
does not know yet (`captured`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from subspec_cli.decoding.sampler import Row, Sampler
from subspec_cli.drafting.ranking import Ids, Sampling, rank, sampling_rule
from subspec_cli.modeling.decoder import DraftLogits
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.layers import TokenBatch
from subspec_cli.streaming.mapped_memory import shared_with_gpu


class Draft(Protocol):
    """The model that guesses."""

    def forward(self, batch: TokenBatch, kv: KVCache) -> DraftLogits:
        """One draft step over unpadded rows."""
        ...


@dataclass(frozen=True, slots=True)
class Found:
    """What a step found: for each of its `N` rows, the best few tokens and their scores, best first."""

    token_ids: Ids
    """`[N, K]`."""
    scores: Row
    """`[N, K]`; not finite where nothing is proposed."""


class DraftSteps(Protocol):
    """What starts draft steps and reads what they found, in turn."""

    @property
    def ahead(self) -> int:
        """Most steps that may be under way unread when another is started: 0 or 1."""
        ...

    def start(self, batch: TokenBatch, feeds: Sequence[tuple[int, int] | None], sampler: Sampler) -> None:
        """Start a step over a batch on the host, which writes draft-made keys and values to scratch rows.

        A row whose feed is (row, rank) takes in place of the batch's token the one that the step before finds
        for its row, at that rank.
        """
        ...

    def read(self) -> Found:
        """The result of the oldest step that was not read."""
        ...

    def drop(self) -> None:
        """Forget the steps that were not read."""
        ...


class DirectSteps:
    """Each step is computed when it is started."""

    ahead = 0

    def __init__(self, draft: Draft, kv: KVCache) -> None:
        self.draft = draft
        self._kv = kv
        self._found: Found | None = None

    def start(self, batch: TokenBatch, feeds: Sequence[tuple[int, int] | None], sampler: Sampler) -> None:
        """Compute it."""
        assert not any(feeds)
        found = self.draft.forward(batch, self._kv)
        ids, scores = rank(found, sampling_of(sampler, batch, found.logits))
        self._found = Found(ids.cpu().numpy(), scores.double().cpu().numpy())

    def read(self) -> Found:
        """What was computed."""
        assert self._found is not None
        return self._found

    def drop(self) -> None:
        """Nothing is under way."""


def sampling_of(sampler: Sampler, batch: TokenBatch, logits: Tensor) -> Sampling | None:
    """The sampler's rule for the rows of a batch; their children are the tokens of the next positions."""
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
