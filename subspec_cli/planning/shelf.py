"""What a budget buys: the choices of a request in order of size, and context weighed against speed."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Final

from subspec_cli.planning.memory import Ledger
from subspec_cli.planning.request import DEFAULT_CONTEXT, PlanRequest
from subspec_cli.planning.search import Candidate, Weigher

_CONTEXTS: Final = (4096, 3072, 2048, 1536, 1024, 768, 512, 256)
"""Contexts tried when the user names none, largest first."""
_CONTEXT_PRICE: Final = 0.03
"""Share of the speed that a longer context may cost, compared with the least that is wanted."""


class Shelf:
    """The candidates of a request in order of size, and what a budget buys of them."""

    def __init__(self, request: PlanRequest, ledger: Ledger) -> None:
        self._request = request
        self._row_bytes = ledger.row_bytes
        self._all = sorted(
            Weigher(request, ledger).candidates(), key=lambda item: (item.base_bytes, -item.tok_per_s)
        )
        self.candidates = _frontier(self._all)
        self._sizes = [item.base_bytes for item in self.candidates]

    def total_bytes(self, candidate: Candidate, context: int) -> int:
        """Of all lines."""
        return candidate.base_bytes + context * self._row_bytes

    def fastest(self, budget_bytes: int, context: int) -> Candidate | None:
        """The fastest choice that the budget holds with this context."""
        at = bisect.bisect_right(self._sizes, budget_bytes - context * self._row_bytes)
        return self.candidates[at - 1] if at else None

    def other_kind(self, budget_bytes: int, context: int, *, shared: bool) -> Candidate | None:
        """The fastest choice whose resident layers are all shared with the draft, or all the target's alone."""
        room = budget_bytes - context * self._row_bytes
        fitting = [
            item
            for item in self._all
            if item.base_bytes <= room
            and item.choice.drafts
            and item.choice.resident
            and not (item.choice.target_only if shared else item.choice.shared)
        ]
        return max(fitting, key=lambda item: item.tok_per_s, default=None)

    def largest_context(self, budget_bytes: int) -> int:
        """Longest context that the budget holds at all, up to the model's; 0 if there is none."""
        if not self._sizes:
            return 0
        rows = (budget_bytes - self._sizes[0]) // self._row_bytes
        return max(0, min(rows, self._request.model_context))

    def choose(self, budget_bytes: int) -> tuple[int, Candidate] | None:
        """Context and choice for a budget; None if it holds nothing.

        A context that the user names is kept. Else it is weighed against speed at every size up to the budget
        at which anything changes, and never gives up speed that a smaller budget had.
        """
        if self._request.context is not None:
            found = self.fastest(budget_bytes, self._request.context)
            return None if found is None else (self._request.context, found)
        contexts = usual_contexts(self._request.model_context)
        sizes = {size + context * self._row_bytes for size in self._sizes for context in contexts}
        held: tuple[int, Candidate] | None = None
        for size in sorted(size for size in sizes if size <= budget_bytes):
            held = self._weigh(size, contexts, held)
        return held

    def _weigh(
        self, budget_bytes: int, contexts: Sequence[int], held: tuple[int, Candidate] | None
    ) -> tuple[int, Candidate] | None:
        """The longest context at a bearable price, no slower than what is held already."""
        options = [(context, self.fastest(budget_bytes, context)) for context in contexts]
        least = min(self._request.least_context, contexts[0])
        usual = max((item.tok_per_s for context, item in options if item and context >= least), default=0.0)
        slowest = held[1].tok_per_s if held else 0.0
        for context, item in options:
            if item is None or item.tok_per_s < slowest:
                continue
            if context <= least or item.tok_per_s >= usual * (1 - _CONTEXT_PRICE):
                return context, item
        return held


def _frontier(found: Sequence[Candidate]) -> list[Candidate]:
    """Of candidates in order of size, those that are faster than all smaller ones.

    At equal speed more layers are held: where computing is the bound, the link may still turn out slower.
    """
    frontier: list[Candidate] = []
    for item in found:
        if not frontier or _worth(item) > _worth(frontier[-1]):
            frontier.append(item)
    return frontier


def _worth(item: Candidate) -> tuple[float, int]:
    return item.tok_per_s, item.choice.resident


def usual_contexts(model_context: int) -> tuple[int, ...]:
    """Contexts to choose from where the user names none, longest first."""
    most = min(model_context, DEFAULT_CONTEXT)
    return (most, *(context for context in _CONTEXTS if context < most))
