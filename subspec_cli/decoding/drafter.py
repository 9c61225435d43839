"""What the decode loop asks of a drafter, and the drafter that proposes nothing.

The heuristics live a room above, in `drafting`; the exact algorithm needs only this protocol.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from subspec_cli.decoding.sampler import Sampler
from subspec_cli.decoding.tree import TokenTree
from subspec_cli.decoding.verification import VerifyResult


@dataclass(frozen=True, slots=True)
class Proposal:
    """A tree to verify, and what it took."""

    tree: TokenTree
    draft_steps: int = 0
    """Serial draft steps."""
    ready_nodes: int = 0
    """Nodes that the shadow of the last pass had expanded already."""
    cost_s: float = 0.0
    """What the serial steps cost by the schedule's prices."""


class TreeGrower(Protocol):
    """What the engine asks for trees."""

    def grow(self, root_token: int, sampler: Sampler, tokens_wanted: int) -> Proposal:
        """A tree under `root_token`, the newest emitted token, with `tokens_wanted` more tokens to come."""
        ...

    def work_in_shadow(self, layer: int) -> int:
        """Draft steps planned for after this layer of the pass; returns how many there were."""
        ...

    def learn(self, result: VerifyResult, *, ends: bool) -> None:
        """Take in the outcome of the pass over the last tree, once its rows are committed.

        What was drafted below the outcome begins the next tree, unless the answer `ends` here.
        """
        ...

    def forget(self) -> None:
        """Drop what was found out: another answer begins."""
        ...


class RootOnly:
    """Plain decoding: a tree of one node, so one token a pass."""

    def grow(self, root_token: int, sampler: Sampler, tokens_wanted: int) -> Proposal:  # noqa: ARG002
        """The root alone."""
        return Proposal(TokenTree((root_token,), (-1,), (0,), (0.0,)))

    def work_in_shadow(self, layer: int) -> int:  # noqa: ARG002
        """Nothing."""
        return 0

    def learn(self, result: VerifyResult, *, ends: bool) -> None:
        """Nothing was drafted."""

    def forget(self) -> None:
        """Nothing was found out."""
