"""Statistics of a generation. Pure arithmetic: no torch, no clock.

tau is *tokens emitted per target pass, bonus token included*: (new tokens - 1) / decode passes, the first
token being the prefill's. decode_tok_per_s = (new tokens - 1) / (time of the last - time of the first token).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final, Literal

Exactness = Literal["exact", "numeric"]
"""Whether rows are bit-identical for any rows beside them, so that plain and speculative tokens are equal."""
FinishReason = Literal["stop", "length"]
"""Why an answer ended: at a stop rule, or at its limit of tokens or context."""
_CACHED_RANGES: Final = ((0, 511), (512, 2047), (2048, 8191), (8192, None))
"""Ranges of cached rows by which acceptance is reported; the last one has no end."""


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """How far a prompt is read."""

    done_tokens: float
    """Work done, in tokens that went through the whole model; a part of the layers counts as a part of a token."""
    tokens: int
    """Prompt tokens to compute, without those that are still in the KV cache."""
    elapsed_s: float

    @property
    def tok_per_s(self) -> float:
        """Tokens per second so far; 0 before the first."""
        return self.done_tokens / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds that the rest takes at this rate; None before the first token."""
        rate = self.tok_per_s
        return (self.tokens - self.done_tokens) / rate if rate > 0 else None


OnPrefill = Callable[[PrefillProgress], None]
"""Receives how far a prompt is read, each time that more of it is done."""


@dataclass(frozen=True, slots=True)
class RoundTotals:
    """What rounds took. Every field adds up over the rounds of an answer."""

    decode_time_s: float = 0.0
    """Wall time of the rounds."""
    draft_steps: int = 0
    """Draft forwards before passes."""
    shadow_steps: int = 0
    """Draft forwards in the shadow of passes."""
    useful_shadow_steps: int = 0
    """Those that expanded a node of the next tree; the rest were wasted."""
    shadow_levels: int = 0
    """Levels of trees that were ready when their drafting began: each one is a serial step less."""
    draft_cost_s: float = 0.0
    """Cost of the draft steps before passes, at the prices that the draft policy uses."""
    draft_time_s: float = 0.0
    """Wall time of the draft steps before passes."""
    verify_time_s: float = 0.0
    """Wall time of target passes, including waits for weights and drafting in their shadow."""
    shadow_time_s: float = 0.0
    """Part of the passes spent drafting."""
    wait_time_s: float = 0.0
    """Part of the passes spent waiting for weights to arrive."""
    link_time_s: float = 0.0
    """Time that the link was busy, also while drafting."""
    streamed_bytes: int = 0
    """Weight bytes moved over the link while decoding."""
    cached_rows: int = 0
    """Committed rows of the KV cache before a pass, summed over passes."""


@dataclass(frozen=True, slots=True)
class PassStats(RoundTotals):
    """One round: a target pass and the drafting before it."""

    drafted: int = 0
    """Tree nodes proposed, without the root."""
    accepted: int = 0
    """Proposed nodes that the target took."""
    emitted: int = 0
    """Tokens emitted after stop rules, including the bonus token."""
    depth: int = 0
    """Levels of the tree below its root."""
    ready_nodes: int = 0
    """Nodes of the tree that the shadow of the previous pass had already expanded."""


@dataclass(frozen=True, slots=True)
class RangeTotals:
    """Passes over a range of cached rows: what was drafted and accepted there."""

    least_rows: int
    most_rows: int | None
    """None in the last range, which has no end."""
    passes: int = 0
    tokens: int = 0
    """Tokens emitted, bonus tokens included."""
    drafted: int = 0
    accepted: int = 0
    levels: int = 0
    """Levels that were put to the target: all above the first rejection, and the one of the rejection."""

    @property
    def tokens_per_pass(self) -> float:
        """The range's tau."""
        return self.tokens / self.passes if self.passes else 0.0

    @property
    def accepted_share(self) -> float:
        """Share of the drafted tokens that were accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def level_acceptance(self) -> float:
        """Share of the levels that were accepted, of those that were put to the target."""
        return self.accepted / self.levels if self.levels else 0.0

    def after_pass(self, last: PassStats) -> RangeTotals:
        """Totals once one more pass is done; the same if it read fewer or more cached rows."""
        if last.cached_rows < self.least_rows or last.cached_rows > (self.most_rows or math.inf):
            return self
        return replace(
            self,
            passes=self.passes + 1,
            tokens=self.tokens + last.emitted,
            drafted=self.drafted + last.drafted,
            accepted=self.accepted + last.accepted,
            levels=self.levels + min(last.accepted + 1, last.depth),
        )

    def plus(self, other: RangeTotals) -> RangeTotals:
        """Totals of both."""
        return replace(
            self,
            passes=self.passes + other.passes,
            tokens=self.tokens + other.tokens,
            drafted=self.drafted + other.drafted,
            accepted=self.accepted + other.accepted,
            levels=self.levels + other.levels,
        )

    def as_dict(self) -> dict[str, Any]:
        """All totals and ratios, as plain values for JSON."""
        return {
            **asdict(self),
            "tokens_per_pass": self.tokens_per_pass,
            "accepted_share": self.accepted_share,
            "level_acceptance": self.level_acceptance,
        }


_NO_PASSES: Final = tuple(RangeTotals(least, most) for least, most in _CACHED_RANGES)


@dataclass(frozen=True, slots=True)
class GenerationStats(RoundTotals):
    """Totals of one answer; grows by `after_prefill` and `after_pass`."""

    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    """Prompt tokens that were computed; the rest were still in the KV cache."""
    prefill_passes: int = 0
    """Target passes over the prompt."""
    new_tokens: int = 0
    ttft_s: float = 0.0
    passes: int = 0
    """Decode passes of the target, without the prefill."""
    drafted_tokens: int = 0
    accepted_histogram: tuple[int, ...] = ()
    """Entry a: passes in which `a` drafted tokens were accepted."""
    reached_by_depth: tuple[int, ...] = ()
    """Entry d: passes whose tree was deeper than d and whose target accepted d tokens or more."""
    shadow_hits: int = 0
    """Passes whose tree began with what the shadow of the previous pass had found."""
    by_cached_rows: tuple[RangeTotals, ...] = field(default=_NO_PASSES, repr=False)
    """Passes by the cached rows that they read, ascending."""
    recent_accepted: tuple[int, ...] = field(default=(), repr=False)
    """Accepted counts of the latest passes, oldest first, for the live display."""

    @property
    def tau(self) -> float:
        """Tokens per target pass, bonus token included; 0 before the first pass."""
        return (self.new_tokens - 1) / self.passes if self.passes else 0.0

    @property
    def decode_tok_per_s(self) -> float:
        """Tokens per second after the first one; 0 before the second token."""
        return (self.new_tokens - 1) / self.decode_time_s if self.decode_time_s > 0 else 0.0

    @property
    def acceptance_by_depth(self) -> tuple[float, ...]:
        """Entry d: of the passes that reached depth d of a deeper tree, the share that accepted one more token."""
        taken = [sum(self.accepted_histogram[depth + 1 :]) for depth in range(len(self.reached_by_depth))]
        return tuple(
            done / tried if tried else 0.0 for done, tried in zip(taken, self.reached_by_depth, strict=True)
        )

    @property
    def link_busy_share(self) -> float:
        """Share of the decode time in which the link was busy."""
        return self.link_time_s / self.decode_time_s if self.decode_time_s > 0 else 0.0

    @property
    def link_gb_per_s(self) -> float:
        """Weight traffic while decoding, in 1e9 bytes per second of decode time."""
        return self.streamed_bytes / self.decode_time_s / 1e9 if self.decode_time_s > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All totals and ratios, as plain values for JSON."""
        totals = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.repr}
        return {
            **totals,
            "tau": self.tau,
            "decode_tok_per_s": self.decode_tok_per_s,
            "acceptance_by_depth": self.acceptance_by_depth,
            "wasted_shadow_steps": self.shadow_steps - self.useful_shadow_steps,
            "link_gb_per_s": self.link_gb_per_s,
            "link_busy_share": self.link_busy_share,
            "by_cached_rows": [item.as_dict() for item in self.by_cached_rows if item.passes],
        }

    def after_prefill(
        self, *, prompt_tokens: int, prefilled_tokens: int, prefill_passes: int, ttft_s: float
    ) -> GenerationStats:
        """Totals after the prefill, which emits the first token."""
        return replace(
            self,
            prompt_tokens=prompt_tokens,
            prefilled_tokens=prefilled_tokens,
            prefill_passes=prefill_passes,
            ttft_s=ttft_s,
            new_tokens=1,
        )

    def after_pass(self, last: PassStats) -> GenerationStats:
        """Totals once one more round is done."""
        histogram = list(self.accepted_histogram)
        histogram.extend([0] * (last.accepted + 1 - len(histogram)))
        histogram[last.accepted] += 1
        reached = list(self.reached_by_depth)
        reached.extend([0] * (last.depth - len(reached)))
        for depth in range(min(last.accepted + 1, last.depth)):
            reached[depth] += 1
        sums = {
            entry.name: getattr(self, entry.name) + getattr(last, entry.name) for entry in fields(RoundTotals)
        }
        return replace(
            self,
            **sums,
            by_cached_rows=tuple(item.after_pass(last) for item in self.by_cached_rows),
            new_tokens=self.new_tokens + last.emitted,
            passes=self.passes + 1,
            drafted_tokens=self.drafted_tokens + last.drafted,
            accepted_histogram=tuple(histogram),
            reached_by_depth=tuple(reached),
            shadow_hits=self.shadow_hits + (last.ready_nodes > 0),
            recent_accepted=(*self.recent_accepted, last.accepted)[-40:],
        )


def ranges_of_totals(stats: Iterable[GenerationStats]) -> tuple[RangeTotals, ...]:
    """Passes of several answers by the cached rows that they read; no range without a pass."""
    totals = _NO_PASSES
    for item in stats:
        totals = tuple(one.plus(more) for one, more in zip(totals, item.by_cached_rows, strict=True))
    return tuple(item for item in totals if item.passes)


def rate_of_totals(stats: Iterable[GenerationStats]) -> float:
    """Tokens per second over several answers: the ratio of totals, not the mean of ratios."""
    tokens = seconds = 0.0
    for item in stats:
        tokens += max(item.new_tokens - 1, 0)
        seconds += item.decode_time_s
    return tokens / seconds if seconds > 0 else 0.0


def tau_of_totals(stats: Iterable[GenerationStats]) -> float:
    """Tokens per target pass over several answers: the ratio of totals."""
    tokens = passes = 0
    for item in stats:
        tokens += max(item.new_tokens - 1, 0)
        passes += item.passes
    return tokens / passes if passes else 0.0
