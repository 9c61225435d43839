"""Clocks and link counters of prompts and rounds. The only part of the decode loop that reads a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

from subspec_cli.decoding.drafter import Proposal
from subspec_cli.decoding.verification import VerifyResult
from subspec_cli.metrics import OnPrefill, PassStats, PrefillProgress
from subspec_cli.streaming.streamer import StreamCounters

Phase = Literal["draft", "verify", "shadow"]


class PromptMeter:
    """Measures from its creation until the first token, and reports how far the prompt is read."""

    def __init__(self, on_prefill: OnPrefill | None) -> None:
        self._on_prefill = on_prefill
        self._started = time.perf_counter()

    def elapsed_s(self) -> float:
        """Return the seconds since the meter was created."""
        return time.perf_counter() - self._started

    def report(self, done_tokens: float, tokens: int) -> None:
        """Report how many of the prompt's tokens are read."""
        if self._on_prefill is not None:
            self._on_prefill(PrefillProgress(done_tokens, tokens, self.elapsed_s()))


class OwnCounts(NamedTuple):
    """What a round did for one of its answers."""

    emitted: int
    """Tokens."""
    cached_rows: int
    """Rows of its cache that the pass read."""
    shadow_steps: int
    """Draft steps with its rows that ran while the pass waited for weights."""


class RoundMeter:
    """Measures one round from its creation on."""

    def __init__(self, counters: Callable[[], StreamCounters]) -> None:
        self._counters = counters
        self._link = counters()
        self._started = time.perf_counter()
        self._spent_s: dict[Phase, float] = {"draft": 0.0, "verify": 0.0, "shadow": 0.0}

    @contextmanager
    def timed(self, phase: Phase) -> Iterator[None]:
        """Add the wall time of the block to a phase; the shadow is part of the verification."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spent_s[phase] += time.perf_counter() - started

    def stats(self, proposal: Proposal, result: VerifyResult, own: OwnCounts) -> PassStats:
        """Return the statistics of the round so far for one answer. Times and bytes are the whole round's."""
        moved = self._counters().since(self._link)
        return PassStats(
            drafted=len(proposal.tree) - 1,
            accepted=result.accepted,
            emitted=own.emitted,
            depth=proposal.tree.depth,
            ready_nodes=proposal.ready_nodes,
            shadow_levels=proposal.ready_levels,
            useful_shadow_steps=proposal.useful_shadow_steps,
            cached_rows=own.cached_rows,
            decode_time_s=time.perf_counter() - self._started,
            draft_steps=proposal.draft_steps,
            shadow_steps=own.shadow_steps,
            draft_cost_s=proposal.cost_s,
            draft_time_s=self._spent_s["draft"],
            verify_time_s=self._spent_s["verify"],
            shadow_time_s=self._spent_s["shadow"],
            wait_time_s=moved.wait_time_s,
            link_time_s=moved.read_time_s,
            streamed_bytes=moved.streamed_bytes,
        )
