"""What the decode loop asks of a drafter, and the drafter of plain decoding, which proposes nothing.

The heuristics live one room up, in `drafting`. The exact algorithm needs only these protocols, because the
target alone decides which tokens are emitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from subspec_cli.decoding.penalties import PathState
from subspec_cli.decoding.sampler import Sampler
from subspec_cli.decoding.tree import TokenTree
from subspec_cli.decoding.verification import VerifyResult
from subspec_cli.modeling.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class Proposal:
    """A tree to verify, and what it took to draft it."""

    tree: TokenTree
    draft_steps: int = 0
    """Serial draft steps with rows of the tree, which may have rows of other trees too."""
    cost_s: float = 0.0
    """Their cost at the policy's prices."""
    ready_nodes: int = 0
    """Nodes that the shadow of the last pass had already expanded."""
    ready_levels: int = 0
    """Levels of the draft's likeliest path among them."""
    useful_shadow_steps: int = 0
    """Steps in the shadow of the last pass that expanded one of them."""


class Draft(Protocol):
    """The drafting for one answer."""

    @property
    def shadow_steps(self) -> int:
        """Steps with rows of this answer in the shadow of the pass under way, or of the last one."""
        ...

    def learn(self, result: VerifyResult, *, ends: bool) -> None:
        """Take in the outcome of the pass over the last tree, once its rows are committed.

        What was drafted below the outcome begins the next tree, unless the answer `ends` here.
        """
        ...


DraftT = TypeVar("DraftT", bound=Draft)


@dataclass(frozen=True, slots=True)
class TreeOrder(Generic[DraftT]):
    """A tree that is wanted for an answer."""

    draft: DraftT
    root_token: int
    """The newest emitted token."""
    tokens_wanted: int
    """Tokens that may follow it."""
    state: PathState | None = None
    """What penalties know behind the root; a draft may guess by it."""


class Drafter(Protocol[DraftT]):
    """Begins the drafting for each answer, and grows the trees of all answers in flight."""

    def begin(self, sampler: Sampler, kv: KVCache) -> DraftT:
        """Begin an answer over a cache, whose tokens `sampler` picks; earlier drafting over it ends."""
        ...

    def grow(self, orders: Sequence[TreeOrder[DraftT]]) -> list[Proposal]:
        """Return a tree under each root, in order: those of one pass.

        A tree's `N` nodes may write scratch rows `[committed, committed + N)` of its answer's cache.
        """
        ...

    def work_in_shadow(self, layer: int) -> None:
        """Run the draft steps that are planned after `layer` of the pass over the trees that were grown last."""
        ...


class PlainDraft:
    """Nothing is drafted for an answer."""

    shadow_steps = 0

    def learn(self, result: VerifyResult, *, ends: bool) -> None:
        """Learn nothing."""


class PlainDrafter:
    """Plain decoding: every tree is a root alone, so every pass emits one token of each answer."""

    def begin(self, sampler: Sampler, kv: KVCache) -> PlainDraft:  # noqa: ARG002
        """Return a draft without state."""
        return PlainDraft()

    def grow(self, orders: Sequence[TreeOrder[PlainDraft]]) -> list[Proposal]:
        """Return the roots alone."""
        return [Proposal(TokenTree((order.root_token,), (-1,), (0,), (0.0,))) for order in orders]

    def work_in_shadow(self, layer: int) -> None:
        """Run no draft step."""
