"""Predicted beside measured: how far a plan's figures were from those of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from subspec_cli.metrics import GenerationStats, rate_of_totals, tau_of_totals
from subspec_cli.planning.costs import CostOrigin, PlanCosts
from subspec_cli.planning.prediction import Prediction, predict_at


@dataclass(frozen=True, slots=True)
class Comparison:
    """Figures of one arm, predicted and measured; None if nothing of the kind was done or counted.

    The prediction is for the cached rows that the passes had, so that a long prompt is no error of the plan.
    """

    cached_rows: float | None
    """Mean over the passes."""
    predicted_pass_s: float
    pass_s: float | None
    predicted_step_s: float
    """Of steps with as many rows as the measured ones."""
    step_s: float | None
    predicted_tok_per_s: float
    tok_per_s: float | None
    predicted_tok_per_s_given_tau: float | None
    """From the measured tokens and draft steps per pass, so that only the error in the times is left.

    Steps in the shadow of a pass are not counted, because they add no time to a round.
    """
    predicted_plain_tok_per_s: float
    origin: CostOrigin

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


def compare(
    prediction: Prediction, costs: PlanCosts, answers: Iterable[GenerationStats], *, drafted: bool
) -> Comparison:
    """Return a plan's figures beside the totals of some answers, of the speculative or of the plain arm."""
    stats = list(answers)
    passes = sum(item.passes for item in stats)
    steps = sum(item.draft_steps for item in stats) if drafted else 0
    cost_s = sum(item.draft_cost_s for item in stats)
    tau, rate = tau_of_totals(stats), rate_of_totals(stats)
    cached_rows = sum(item.cached_rows for item in stats) / passes if passes else None
    if cached_rows is not None:
        prediction = predict_at(prediction, costs, cached_rows)
    pass_s = prediction.pass_s if drafted else prediction.plain_pass_s
    plain = prediction.plain_tok_per_s
    given = tau / (prediction.pass_s + cost_s / passes) if drafted and passes else None
    return Comparison(
        cached_rows=cached_rows,
        predicted_pass_s=pass_s,
        pass_s=sum(item.verify_time_s for item in stats) / passes if passes else None,
        predicted_step_s=cost_s / steps if steps else prediction.step_s,
        step_s=sum(item.draft_time_s for item in stats) / steps if steps else None,
        predicted_tok_per_s=prediction.tok_per_s if drafted else plain,
        tok_per_s=rate or None,
        predicted_tok_per_s_given_tau=given,
        predicted_plain_tok_per_s=plain,
        origin=prediction.origin,
    )
