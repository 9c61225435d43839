"""What a benchmark found: figures per answer, ratios of totals per category, the ceiling beside them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from subspec_cli.metrics import GenerationStats, rate_of_totals, tau_of_totals
from subspec_cli.planning.comparison import Comparison, compare
from subspec_cli.planning.timing import Prediction


@dataclass(frozen=True, slots=True)
class ArmAnswer:
    """One answer of one arm."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
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
        """Token for token the same, as far as the shorter limit lets both go."""
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
    """Prompt tokens really computed by the speculative arm; reused rows are not counted."""


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """What the link did in the speculative arm's decoding."""

    streamed_bytes_per_pass: int
    streamed_bytes: int
    read_time_s: float
    disk_read_bytes: int | None
    """Bytes that the kernel fetched from storage for this process meanwhile; None where it does not tell."""

    @property
    def gb_per_s(self) -> float:
        """Speed of the link while it was busy."""
        return self.streamed_bytes / self.read_time_s / 1e9 if self.read_time_s else 0.0

    @property
    def cold_share(self) -> float | None:
        """Share of the streamed bytes that storage delivered; what was read ahead can lift it above 1."""
        if self.disk_read_bytes is None or not self.streamed_bytes:
            return None
        return self.disk_read_bytes / self.streamed_bytes


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All that was measured, whole or up to an interruption."""

    suite: str
    pairs: tuple[AnswerPair, ...]
    best_plain: tuple[GenerationStats, ...]
    """Plain answers under plain decoding's own best plan."""
    link: LinkFigures | None
    exactness: str
    speculation: bool
    interrupted: bool
    context: dict[str, Any]
    """Model, plan, configuration and versions."""
    prediction: Prediction | None = None
    """What the plan promised for the speculative arm."""

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
        """Tau x link speed / streamed bytes per pass: the speed if nothing but the link took time."""
        if not self.pairs or self.link is None or not self.link.gb_per_s:
            return None
        tau = tau_of_totals(pair.speculative.stats for pair in self.pairs)
        return tau * self.link.gb_per_s * 1e9 / self.link.streamed_bytes_per_pass

    @property
    def comparison(self) -> Comparison | None:
        """Predicted beside measured, over all speculative answers."""
        if self.prediction is None or not self.pairs:
            return None
        answers = [pair.speculative.stats for pair in self.pairs]
        return compare(self.prediction, answers, drafted=self.speculation)

    @property
    def summary_lines(self) -> tuple[str, ...]:
        """What to say under the table."""
        if not self.pairs:
            return ("nothing was measured",)
        total = self.rows[-1]
        identical = (
            f"{total.identical} of {total.answers} answers token for token identical ({self.exactness})"
        )
        lines = [identical if self.speculation else f"{identical}; speculation was off"]
        spread = sorted(ratio for pair in self.pairs if (ratio := pair.speedup_same_plan))
        if spread:
            median = statistics.median(spread)
            lines.append(
                f"speedup over the same plan by answer: median {median:.2f}x, {spread[0]:.2f}x to {spread[-1]:.2f}x"
            )
        if self.best_plain:
            lines.append(
                f"plain decoding under its own best plan: {rate_of_totals(self.best_plain):.2f} tok/s"
            )
        if (ceiling := self.ceiling_tok_per_s) and self.link and total.speculative_tok_per_s:
            share = total.speculative_tok_per_s / ceiling
            lines.append(
                f"ceiling {ceiling:.2f} tok/s = tau {total.tau:.2f} x {self.link.gb_per_s:.2f} GB/s / "
                f"{self.link.streamed_bytes_per_pass / 1e9:.2f} GB per pass; reached {share:.0%}"
            )
        if total.speculative_tok_per_s and self.speculation:
            lines.append(work_line([pair.speculative.stats for pair in self.pairs]))
        if self.comparison is not None:
            lines.append(self.comparison.line)
        if self.link and self.link.cold_share is not None:
            lines.append(
                f"{self.link.cold_share:.0%} of the streamed bytes came from storage, not from a cache"
            )
        return tuple(lines)

    def as_dict(self) -> dict[str, Any]:
        """The whole record for JSON."""
        return {
            "suite": self.suite,
            "exactness": self.exactness,
            "speculation": self.speculation,
            "interrupted": self.interrupted,
            "rows": [_fields(row) for row in self.rows],
            "summary": list(self.summary_lines),
            "predicted_beside_measured": self.comparison.as_dict() if self.comparison else None,
            "ceiling_tok_per_s": self.ceiling_tok_per_s,
            "link": None if self.link is None else {**_fields(self.link), "gb_per_s": self.link.gb_per_s},
            "best_plain_tok_per_s": rate_of_totals(self.best_plain) if self.best_plain else None,
            "answers": [_pair(pair) for pair in self.pairs],
            **self.context,
        }

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


def work_line(answers: Sequence[GenerationStats]) -> str:
    """What a pass and the drafting around it took on average, and how busy the link was."""
    passes = max(1, sum(stats.passes for stats in answers))
    decode_s = sum(stats.decode_time_s for stats in answers)
    busy = sum(stats.link_time_s for stats in answers) / decode_s if decode_s else 0.0
    serial = sum(stats.draft_steps for stats in answers) / passes
    shadow = sum(stats.shadow_steps for stats in answers) / passes
    hits = sum(stats.shadow_hits for stats in answers) / passes
    return (
        f"{serial:.1f} draft steps before a pass, {shadow:.1f} in its shadow, of use to {hits:.0%} of the next; "
        f"link busy {busy:.0%} of the time"
    )


def _fields(item: BenchRow | LinkFigures) -> dict[str, Any]:
    return {name: getattr(item, name) for name in item.__slots__}


def _pair(pair: AnswerPair) -> dict[str, Any]:
    return {
        "question_id": pair.question_id,
        "category": pair.category,
        "turn": pair.turn,
        "identical": pair.identical,
        "speedup_same_plan": pair.speedup_same_plan,
        "plain": _arm(pair.plain),
        "speculative": _arm(pair.speculative),
    }


def _arm(answer: ArmAnswer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        **answer.stats.as_dict(),
    }
