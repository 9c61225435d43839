"""The rows of one draft step: those of one sequence, or of several one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.token_batch import TokenBatch


@dataclass(frozen=True, slots=True)
class DraftRows:
    """Some rows of one sequence, and its cache."""

    batch: TokenBatch
    kv: KVCache

    def to(self, device: torch.device) -> DraftRows:
        """Return the rows on `device`, except their token ids."""
        batch = self.batch.to(device)
        return self if batch is self.batch else DraftRows(batch, self.kv)


def places_of(rows: Sequence[DraftRows]) -> list[slice]:
    """Return where the rows of each sequence are among all rows of a step."""
    places, first = [], 0
    for part in rows:
        places.append(slice(first, first + part.batch.rows))
        first += part.batch.rows
    return places
