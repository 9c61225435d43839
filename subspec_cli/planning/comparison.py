"""Predicted beside measured: how far a plan's figures were from what a run took."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from subspec_cli.metrics import GenerationStats, rate_of_totals, tau_of_totals
from subspec_cli.planning.timing import Prediction


@dataclass(frozen=True, slots=True)
class Comparison:
    """Figures of one arm, those of the plan first; None where nothing of the kind was done or counted."""

    predicted_pass_s: float
    pass_s: float | None
    predicted_step_s: float
    """Of steps of as many rows as there were."""
    step_s: float | None
    predicted_tok_per_s: float
    tok_per_s: float | None
    predicted_tok_per_s_given_tau: float | None
    """For the tokens and draft steps a pass that there were: what is left is the error in the times.

    Steps in the shadow of a pass are not counted among them: they take no time of their own.
    """
    predicted_plain_tok_per_s: float
    origin: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @property
    def line(self) -> str:
        """One line for the user."""
        given = self.predicted_tok_per_s_given_tau
        parts = [
            f"pass {_ms(self.predicted_pass_s)} | {_ms(self.pass_s)}",
            f"draft step {_ms(self.predicted_step_s)} | {_ms(self.step_s)}",
            f"tok/s {self.predicted_tok_per_s:.2f} | {_rate(self.tok_per_s)}",
        ]
        if given is not None:
            parts.append(f"{given:.2f} predicted for this tau")
        return f"predicted ({self.origin} costs) | measured: {' · '.join(parts)}"


def compare(prediction: Prediction, answers: Iterable[GenerationStats], *, drafted: bool) -> Comparison:
    """A plan's figures beside the totals of some answers, of the speculative or of the plain arm."""
    stats = list(answers)
    passes = sum(item.passes for item in stats)
    steps = sum(item.draft_steps for item in stats) if drafted else 0
    cost_s = sum(item.draft_cost_s for item in stats)
    tau, rate = tau_of_totals(stats), rate_of_totals(stats)
    pass_s = prediction.pass_s if drafted else prediction.plain_pass_s
    plain = prediction.plain_tok_per_s
    given = tau / (prediction.pass_s + cost_s / passes) if drafted and passes else None
    return Comparison(
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


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def _rate(tok_per_s: float | None) -> str:
    return "-" if tok_per_s is None else f"{tok_per_s:.2f}"
