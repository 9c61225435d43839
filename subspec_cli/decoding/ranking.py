"""The draft's likeliest tokens, ranked where its logits are, and what it gives them.

A few numbers and not whole rows are brought to the host; ties go to the lowest id, as in `choose`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from subspec_cli.decoding.choose import Chooser, Row
from subspec_cli.modeling.decoder import DraftLogits

Ids = NDArray[np.int64]
SHARPENING: Final = 0.2
"""Temperature of the draft's guess: low, so that side paths do not crowd out the likely one (SubSpec, 2509.18344)."""
_RANKED: Final = 8
"""Children looked at per node."""
_CANDIDATES: Final = 32
"""Tokens that a rough head picks for the 16-bit one to score."""


def rank(found: DraftLogits, chooser: Chooser, positions: Sequence[int]) -> list[tuple[Ids, Row]]:
    """For each draft row, the ids and scores of its best few tokens, in no order.

    Ranked where the logits are, so that a few numbers and not whole rows are brought to the host; with a filter,
    which has to see whole rows, on the host. Of rough logits the best are candidates, scored again by the
    16-bit head: what four bits lose at the head alone would cost a fifth of the accepted tokens.
    """
    scores = chooser.guessed_scores(found.logits, positions)
    if scores is None:
        return _ranked_on_host(found, chooser, positions)
    values, ids = scores.topk(min(_CANDIDATES if found.is_rough else _RANKED, scores.shape[1]), dim=-1)
    if found.is_rough:
        values = values + (found.rescored(ids) - found.logits.gather(1, ids).float()) / chooser.temperature
        values, places = values.topk(min(_RANKED, scores.shape[1]), dim=-1)
        ids = ids.gather(1, places)
    return list(zip(ids.cpu().numpy(), values.double().cpu().numpy(), strict=True))


def _ranked_on_host(found: DraftLogits, chooser: Chooser, positions: Sequence[int]) -> list[tuple[Ids, Row]]:
    logits, count = found.logits, min(_RANKED, found.logits.shape[1])
    if found.is_rough:
        ids = logits.topk(min(_CANDIDATES, logits.shape[1]), dim=-1).indices
        logits = logits.scatter(1, ids, found.rescored(ids).to(logits.dtype))
    ranked = []
    for position, row in zip(positions, logits.double().cpu().numpy(), strict=True):
        whole = chooser.scores(row, position)
        best = np.argpartition(whole, -count)[-count:]
        ranked.append((best, whole[best]))
    return ranked


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
