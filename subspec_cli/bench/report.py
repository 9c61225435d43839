"""The figures of a benchmark: per answer, ratios of totals per category, and the ceiling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from subspec_cli.bench.answers import AnswerPair, BestPlainAnswer
from subspec_cli.bench.figures import Arm, Figure, Spread, spread_of
from subspec_cli.bench.voids import PeerReads, PlainRates, Void, busy_reason, row_voids
from subspec_cli.metrics import (
    Exactness,
    RangeTotals,
    ranges_of_totals,
    rate_of_totals,
    tau_of_totals,
)
from subspec_cli.planning.comparison import Comparison, compare
from subspec_cli.planning.costs import PlanCosts
from subspec_cli.planning.plan import OffloadPlan
from subspec_cli.probe.machine_use import MachineUse, total_use


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One line of the table."""

    category: str
    answers: int
    """Pairs of answers, of all repetitions."""
    identical: int
    tau: float | None
    prefilled_tokens: int
    """Prompt tokens that each arm computed, in one repetition."""
    measured: Mapping[Figure, Spread]
    """Figures over the repetitions, void ones too; a figure that could not be measured is absent."""
    uses: Mapping[Arm, MachineUse]
    """Who used the processors during each arm."""
    voids: tuple[Void, ...]
    """Figures that mean nothing, with the reasons."""

    def spread(self, figure: Figure) -> Spread | None:
        """Return a figure over the repetitions; None if it was not measured or is void."""
        return None if self.is_void(figure) else self.measured.get(figure)

    def is_void(self, figure: Figure) -> bool:
        """Return whether a figure was measured and means nothing."""
        return any(void.figure == figure for void in self.voids)


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
    best_plain: tuple[BestPlainAnswer, ...]
    """Plain answers under plain decoding's own best plan, measured before and after the pairs."""
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
    load_per_core: float | None = None
    """Load of the machine before the benchmark; None if it is unknown."""

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

    def best_plain_tok_per_s(self, when: Literal["before", "after"] | None = None) -> float | None:
        """Speed under plain decoding's own best plan, before the pairs, after them, or over both."""
        stats = [item.answer.stats for item in self.best_plain if when in (None, item.when)]
        return rate_of_totals(stats) or None

    @property
    def best_plain_void(self) -> str | None:
        """Why the speed under plain decoding's own best plan means nothing; None if it does mean something."""
        uses = total_use(item.answer.use for item in self.best_plain)
        return busy_reason("best_plain", uses, self.load_per_core)

    def _row(self, category: str, pairs: Sequence[AnswerPair]) -> BenchRow:
        repetitions = whole_repetitions(pairs)
        measured = _measured(repetitions, self.best_plain_tok_per_s())
        tau = tau_of_totals(pair.speculative.stats for pair in pairs) or None
        uses: dict[Arm, MachineUse] = {
            "plain": total_use(pair.plain.use for pair in pairs),
            "speculative": total_use(pair.speculative.use for pair in pairs),
            "best_plain": total_use(item.answer.use for item in self.best_plain),
            "peer": total_use(pair.peer.answer.use for pair in pairs if pair.peer),
        }
        return BenchRow(
            category=category,
            answers=len(pairs),
            identical=sum(pair.identical for pair in pairs),
            tau=tau,
            prefilled_tokens=sum(pair.speculative.stats.prefilled_tokens for pair in repetitions[0]),
            measured=measured,
            uses=uses,
            voids=row_voids(measured, tau, uses, self._plain_rates, self.load_per_core, peer_reads(pairs)),
        )

    @property
    def _plain_rates(self) -> PlainRates:
        asked = {item.question_id for item in self.best_plain}
        same = [pair.plain.stats for pair in self.pairs if pair.turn == 1 and pair.question_id in asked]
        return PlainRates(self.best_plain_tok_per_s(), rate_of_totals(same) or None)


def peer_reads(pairs: Iterable[AnswerPair]) -> PeerReads | None:
    """Return what the peer's answers took from disk; None without a peer."""
    answers = [pair.peer for pair in pairs if pair.peer]
    if not answers:
        return None
    read = [answer.read_bytes for answer in answers if answer.read_bytes is not None]
    return PeerReads(
        sum(read) if len(read) == len(answers) else None, sum(answer.streamed_bytes for answer in answers)
    )


def whole_repetitions(pairs: Sequence[AnswerPair]) -> list[list[AnswerPair]]:
    """Return the pairs of each repetition, without a later one that has fewer pairs than the first."""
    numbers = dict.fromkeys(pair.repetition for pair in pairs)
    repetitions = [[pair for pair in pairs if pair.repetition == number] for number in numbers]
    return [found for found in repetitions if len(found) == len(repetitions[0])]


def _measured(repetitions: Iterable[Sequence[AnswerPair]], best_plain: float | None) -> dict[Figure, Spread]:
    values: dict[Figure, list[float]] = {}
    for pairs in repetitions:
        plain = rate_of_totals(pair.plain.stats for pair in pairs)
        speculative = rate_of_totals(pair.speculative.stats for pair in pairs)
        peer = rate_of_totals(pair.peer.answer.stats for pair in pairs if pair.peer)
        figures: dict[Figure, float] = {
            "plain_tok_per_s": plain,
            "speculative_tok_per_s": speculative,
            "speedup_same_plan": speculative / plain if plain else 0.0,
            "speedup": speculative / best_plain if best_plain else 0.0,
            "peer_tok_per_s": peer,
            "speedup_over_peer": speculative / peer if peer else 0.0,
        }
        for figure, value in figures.items():
            if value:
                values.setdefault(figure, []).append(value)
    return {figure: spread for figure, found in values.items() if (spread := spread_of(found))}
