"""What the decode loop asks of a drafter, and the drafter of plain decoding, which proposes nothing.

The heuristics live one room up, in `drafting`. The exact algorithm needs only these protocols, because the
target alone decides which tokens are emitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from subspec_cli.decoding.penalties import PathState
from subspec_cli.decoding.sampler import Sampler
from subspec_cli.decoding.tree import TokenTree
from subspec_cli.decoding.verification import VerifyResult


@dataclass(frozen=True, slots=True)
class Proposal:
    """A tree to verify, and what it took to draft it."""

    tree: TokenTree
    draft_steps: int = 0
    """Serial draft steps."""
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

    def grow(self, root_token: int, tokens_wanted: int, state: PathState | None = None) -> Proposal:
        """Return a tree under `root_token`, the newest emitted token; `tokens_wanted` more tokens may follow it.

        `state` is what penalties know behind the root; a draft may guess by it.

        The tree's `N` nodes may write scratch rows `[committed, committed + N)` of the KV cache.
        """
        ...

    def work_in_shadow(self, layer: int) -> int:
        """Run the draft steps that are planned after `layer` of the pass; return how many there were."""
        ...

    def learn(self, result: VerifyResult, *, ends: bool) -> None:
        """Take in the outcome of the pass over the last tree, once its rows are committed.

        What was drafted below the outcome begins the next tree, unless the answer `ends` here.
        """
        ...


class Drafter(Protocol):
    """Begins the drafting for each answer."""

    def begin(self, sampler: Sampler) -> Draft:
        """Begin an answer whose tokens `sampler` picks; the drafting for earlier answers ends."""
        ...


class PlainDrafter:
    """Plain decoding: every tree is a root alone, so every pass emits one token."""

    def begin(self, sampler: Sampler) -> PlainDrafter:  # noqa: ARG002
        """Return itself: there is no state."""
        return self

    def grow(
        self,
        root_token: int,
        tokens_wanted: int,  # noqa: ARG002
        state: PathState | None = None,  # noqa: ARG002
    ) -> Proposal:
        """Return the root alone."""
        return Proposal(TokenTree((root_token,), (-1,), (0,), (0.0,)))

    def work_in_shadow(self, layer: int) -> int:  # noqa: ARG002
        """Run no draft step."""
        return 0

    def learn(self, result: VerifyResult, *, ends: bool) -> None:
        """Learn nothing: nothing was drafted."""
