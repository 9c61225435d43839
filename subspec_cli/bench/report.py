"""The figures of a benchmark: per answer, ratios of totals per category, and the ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from subspec_cli.metrics import (
    Exactness,
    FinishReason,
    GenerationStats,
    RangeTotals,
    ranges_of_totals,
    rate_of_totals,
    tau_of_totals,
)
from subspec_cli.planning.comparison import Comparison, compare
from subspec_cli.planning.costs import PlanCosts
from subspec_cli.planning.plan import OffloadPlan


@dataclass(frozen=True, slots=True)
class ArmAnswer:
    """One answer of one arm."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | Literal["interrupted"]
    stats: GenerationStats


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """The same turn answered by plain and by speculative decoding."""

    question_id: str
    category: str
    turn: int
    plain: ArmAnswer
    speculative: ArmAnswer

    @property
    def identical(self) -> bool:
        """Whether both have the same tokens, up to the shorter limit."""
        plain, speculative = self.plain.token_ids, self.speculative.token_ids
        if self.plain.finish_reason == "length":
            return speculative[: len(plain)] == plain
        return speculative == plain

    @property
    def speedup_same_plan(self) -> float:
        """Ratio of the two decode speeds; 0 if either answer is a single token."""
        plain, speculative = self.plain.stats.decode_tok_per_s, self.speculative.stats.decode_tok_per_s
        return speculative / plain if plain and speculative else 0.0


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One line of the table."""

    category: str
    answers: int
    plain_tok_per_s: float | None
    speculative_tok_per_s: float | None
    speedup_same_plan: float | None
    speedup: float | None
    tau: float | None
    identical: int
    prefilled_tokens: int
    """Prompt tokens that the speculative arm computed, without reused rows."""


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """Work of the link in the speculative arm's decoding."""

    streamed_bytes_per_pass: int
    streamed_bytes: int
    read_time_s: float
    disk_read_bytes: int | None
    """Bytes that the kernel fetched from storage for this process meanwhile; None if it does not report them."""

    @property
    def gb_per_s(self) -> float:
        """Speed of the link while it was busy."""
        return self.streamed_bytes / self.read_time_s / 1e9 if self.read_time_s else 0.0

    @property
    def cold_share(self) -> float | None:
        """Share of the streamed bytes that came from storage; read-ahead can lift it above 1."""
        if self.disk_read_bytes is None or not self.streamed_bytes:
            return None
        return self.disk_read_bytes / self.streamed_bytes


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Everything that was measured, up to the end or an interruption."""

    suite: str
    pairs: tuple[AnswerPair, ...]
    best_plain: tuple[GenerationStats, ...]
    """Plain answers under plain decoding's own best plan."""
    link: LinkFigures | None
    exactness: Exactness | Literal["unchecked"]
    speculation: bool
    interrupted: bool
    context: dict[str, Any]
    """Model, configuration and versions, as plain values for JSON."""
    plan: OffloadPlan | None = None
    """The plan of both arms; None until the model is loaded."""
    costs: PlanCosts | None = None
    """The plan's costs."""
    best_plain_plan: OffloadPlan | None = None
    """Plain decoding's own best plan; None until it is measured."""

    @property
    def rows(self) -> tuple[BenchRow, ...]:
        """One row per category in the order of appearance, then all."""
        if not self.pairs:
            return ()
        categories = list(dict.fromkeys(pair.category for pair in self.pairs))
        by_category = [[pair for pair in self.pairs if pair.category == name] for name in categories]
        rows = [self._row(name, pairs) for name, pairs in zip(categories, by_category, strict=True)]
        return (*rows, self._row("all", self.pairs))

    @property
    def ceiling_tok_per_s(self) -> float | None:
        """Tau x link speed / streamed bytes per pass: the speed if only the link took time."""
        if not self.pairs or self.link is None or not self.link.gb_per_s:
            return None
        tau = tau_of_totals(pair.speculative.stats for pair in self.pairs)
        return tau * self.link.gb_per_s * 1e9 / self.link.streamed_bytes_per_pass

    @property
    def comparison(self) -> Comparison | None:
        """Predicted and measured figures over all speculative answers."""
        if self.plan is None or self.costs is None or not self.pairs:
            return None
        answers = [pair.speculative.stats for pair in self.pairs]
        return compare(self.plan.prediction, self.costs, answers, drafted=self.speculation)

    @property
    def by_cached_rows(self) -> tuple[RangeTotals, ...]:
        """Passes of the speculative arm by the cached rows that they read."""
        return ranges_of_totals(pair.speculative.stats for pair in self.pairs)

    def _row(self, category: str, pairs: Sequence[AnswerPair]) -> BenchRow:
        plain = rate_of_totals(pair.plain.stats for pair in pairs) or None
        speculative = rate_of_totals(pair.speculative.stats for pair in pairs) or None
        best = rate_of_totals(self.best_plain) or None
        return BenchRow(
            category=category,
            answers=len(pairs),
            plain_tok_per_s=plain,
            speculative_tok_per_s=speculative,
            speedup_same_plan=speculative / plain if plain and speculative else None,
            speedup=speculative / best if best and speculative else None,
            tau=tau_of_totals(pair.speculative.stats for pair in pairs) or None,
            identical=sum(pair.identical for pair in pairs),
            prefilled_tokens=sum(pair.speculative.stats.prefilled_tokens for pair in pairs),
        )
