"""What a benchmark's picture shows, from its record: plain numbers, without the library that draws them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from subspec_cli.errors import UsageError

PARTS: Final = ("draft", "shadow", "wait", "compute", "rest")
"""Parts of an arm's decode time; `part_times` says what each is."""


@dataclass(frozen=True, slots=True)
class PlottedQuestion:
    """Speed-ups over the same plan of one question's answers."""

    question_id: str
    category: str
    ratios: tuple[float, ...]
    """Those that mean something, of all turns and repetitions."""
    void: int
    """Answers whose ratio means nothing."""
    tau: float | None
    """Tokens per pass over its answers, which no ratio can exceed."""

    @property
    def median(self) -> float | None:
        """Median of the ratios; None if all are void."""
        return statistics.median(self.ratios) if self.ratios else None


@dataclass(frozen=True, slots=True)
class PlottedArm:
    """Where an arm's decode time goes."""

    name: str
    part_ms: Mapping[str, float]
    """Milliseconds per token, by part."""
    is_void: bool
    """Whether the arm's speed means nothing."""


@dataclass(frozen=True, slots=True)
class Plotted:
    """All that the picture shows."""

    title: str
    questions: tuple[PlottedQuestion, ...]
    """Category by category, in the order of the first question of each."""
    speedup: float | None
    """Over the same plan and all questions; None if it is void."""
    accepted_passes: tuple[int, ...]
    """Entry a: passes in which `a` drafted tokens were accepted."""
    tau: float | None
    arms: tuple[PlottedArm, ...]
    void_reasons: tuple[str, ...]
    """Why figures over all questions are void."""


def plotted(document: Mapping[str, Any]) -> Plotted:
    """Return what the picture of a record shows. Raises UsageError if there is nothing, or it is no whole record."""
    if not document.get("answers"):
        raise UsageError("nothing was measured, so there is nothing to plot")
    try:
        answers, total = document["answers"], document["rows"][-1]
        reasons = [reason for found in total["void"].values() for reason in found]
        return Plotted(
            title=_title(document),
            questions=_questions(answers),
            speedup=total["speedup_same_plan"],
            accepted_passes=_accepted([answer["speculative"] for answer in answers]),
            tau=total["tau"],
            arms=tuple(
                PlottedArm(name, part_times([answer[arm] for answer in answers]), figure in total["void"])
                for arm, name, figure in (
                    ("plain", "plain", "plain_tok_per_s"),
                    ("speculative", "subspec", "speculative_tok_per_s"),
                )
            ),
            void_reasons=tuple(dict.fromkeys(reasons)),
        )
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UsageError(f"the record was changed, or is of another version: {error!r}") from error


def part_times(stats: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return milliseconds per token of one arm.

    The parts: drafting before passes, drafting in their shadow, waiting for weights, computing passes, and the rest.
    """
    sums = {
        name: sum(item[f"{name}_time_s"] for item in stats)
        for name in ("decode", "draft", "verify", "shadow", "wait")
    }
    parts = {name: sums[name] for name in ("draft", "shadow", "wait")}
    parts["compute"] = max(0.0, sums["verify"] - sums["shadow"] - sums["wait"])
    parts["rest"] = max(0.0, sums["decode"] - sums["draft"] - sums["verify"])
    tokens = sum(max(0, item["new_tokens"] - 1) for item in stats)
    return {name: 1e3 * parts[name] / max(1, tokens) for name in PARTS}


def _title(document: Mapping[str, Any]) -> str:
    record = document.get("record", {})
    date = str(record.get("date", ""))[:10]
    parts = ("subspec bench " + str(document["suite"]), document.get("model"), document.get("device"), date)
    return "  ·  ".join(str(part) for part in parts if part)


def _questions(answers: Sequence[Mapping[str, Any]]) -> tuple[PlottedQuestion, ...]:
    categories = dict.fromkeys(answer["category"] for answer in answers)
    return tuple(
        _question(category, question_id, [item for item in of_category if item["question_id"] == question_id])
        for category in categories
        for of_category in ([answer for answer in answers if answer["category"] == category],)
        for question_id in dict.fromkeys(item["question_id"] for item in of_category)
    )


def _question(category: str, question_id: str, answers: Sequence[Mapping[str, Any]]) -> PlottedQuestion:
    stats = [answer["speculative"] for answer in answers]
    passes = sum(item["passes"] for item in stats)
    tokens = sum(max(0, item["new_tokens"] - 1) for item in stats)
    return PlottedQuestion(
        question_id,
        category,
        ratios=tuple(float(answer["speedup_same_plan"]) for answer in answers if answer["speedup_same_plan"]),
        void=sum(bool(answer["void"]) for answer in answers),
        tau=tokens / passes if passes else None,
    )


def _accepted(stats: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    histograms = [item["accepted_histogram"] for item in stats]
    longest = max((len(found) for found in histograms), default=0)
    return tuple(
        sum(found[length] for found in histograms if length < len(found)) for length in range(longest)
    )
