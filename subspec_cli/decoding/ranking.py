"""The draft's likeliest tokens, ranked where its logits are, and what it gives them.

A few numbers and not whole rows are brought to the host; ties go to the lowest id, as in `choose`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from subspec_cli.decoding.choose import Chooser, Row

Ids = NDArray[np.int64]
SHARPENING: Final = 0.2
"""Temperature of the draft's guess: low, so that side paths do not crowd out the likely one (SubSpec, 2509.18344)."""
_RANKED: Final = 8
"""Children looked at per node."""


def rank(logits: Tensor, chooser: Chooser, positions: Sequence[int]) -> list[tuple[Ids, Row]]:
    """For each draft row `[N, V]`, the ids and scores of its best few tokens, in no order.

    Ranked where the logits are, so that a few numbers and not whole rows are brought to the host; with a filter,
    which has to see whole rows, on the host.
    """
    count = min(_RANKED, logits.shape[1])
    scores = chooser.guessed_scores(logits, positions)
    if scores is not None:
        best = scores.topk(count, dim=-1)
        values, ids = best.values.double().cpu().numpy(), best.indices.cpu().numpy()
        return list(zip(ids, values, strict=True))
    found = []
    for position, row in zip(positions, logits.double().cpu().numpy(), strict=True):
        whole = chooser.scores(row, position)
        ids = np.argpartition(whole, -count)[-count:]
        found.append((ids, whole[ids]))
    return found


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
