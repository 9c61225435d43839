"""Bytes by layer: layers of different kinds differ in size, and a plan does not say which ones are where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate


@dataclass(frozen=True)
class LayerSizes:
    """Bytes of each layer of a model."""

    by_layer: tuple[int, ...]

    @property
    def largest(self) -> int:
        """Bytes of the largest layer."""
        return self._most[1]

    @property
    def mean(self) -> int:
        """Bytes of a layer on average, rounded down."""
        return self._most[-1] // len(self.by_layer)

    def most(self, count: int) -> int:
        """The most that `count` layers take, whichever they are."""
        return self._most[count]

    @cached_property
    def _most(self) -> Sequence[int]:
        return (0, *accumulate(sorted(self.by_layer, reverse=True)))
