"""Where a prediction comes from: the figures of a layout at its depth, and what they depend on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from subspec_cli.planning.assumed_costs import assumed_survival
from subspec_cli.planning.costs import CostOrigin, PlanCosts
from subspec_cli.planning.request import PlanRequest
from subspec_cli.planning.timing import (
    SHADOW_STEP_ROWS,
    DepthOption,
    RoundTiming,
    depth_options,
    fastest_depth,
    level_s,
    pass_s,
    round_s,
)


@dataclass(frozen=True, slots=True)
class Basis:
    """The figures that a prediction depends on."""

    link_bytes_per_s: float
    pageable_bytes_per_s: float
    """Rate of copies from memory that is not pinned; the link's own where nothing is copied."""
    timing: RoundTiming
    plain: DepthOption
    """Plain decoding."""
    option: DepthOption
    """The predicted depth."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a plan gives if drafts are accepted with some probability."""

    survival: float
    """Probability that the target accepts one more level of the draft."""
    depth: int
    """Best depth at it; 0 if drafting would not pay."""
    tau: float
    tok_per_s: float
    """Of all sequences."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a plan is expected to give."""

    plain_pass_s: float
    """Pass of one row, in plain decoding."""
    pass_s: float
    """Wait for a pass over a tree of `depth`."""
    step_s: float
    depth: int
    """Best depth; 0 if drafting would not pay."""
    tau: float
    """Tokens per pass and sequence at that depth."""
    plain_tok_per_s: float
    """Tokens per second of plain decoding under the same plan, of all sequences."""
    tok_per_s: float
    """Tokens per second of all sequences."""
    survival: float
    """Probability that the target accepts one more level of the draft."""
    origin: CostOrigin
    """Where the costs come from."""
    cached_rows: float
    """Tokens in the KV cache for which these times are predicted."""
    basis: Basis
    learned_tokens: int = 0
    """Tokens of earlier runs from which the survival was learned; 0 if it is assumed."""
    sequences: int = 1
    """Answers in flight, whose tokens are counted together."""
    low: Outcome | None = None
    """Low end of what may be expected while the survival is assumed."""
    high: Outcome | None = None
    """High end of it."""

    @property
    def speedup(self) -> float:
        """Speedup over plain decoding under the same plan."""
        return self.tok_per_s / self.plain_tok_per_s

    def as_dict(self, assumptions: Sequence[str]) -> dict[str, Any]:
        """Return plain values for JSON, with the sentences for the basis."""
        values = dataclasses.asdict(self)
        del values["basis"]
        return {**values, "assumptions": list(assumptions), "speedup": self.speedup}


def predict(request: PlanRequest, timing: RoundTiming, option: DepthOption) -> Prediction:
    """Return the figures of a layout at one depth, with the figures that they depend on."""
    machine, plain = request.costs, depth_options(request)[0]
    rates = (machine.link_bytes_per_s, machine.pageable_bytes_per_s)
    assumed = assumed_survival(request.substitute_bits)
    is_assumed = request.survival is None and option.depth > 0
    return Prediction(
        **_times(timing, plain, option),
        depth=option.depth,
        tau=option.tau,
        survival=request.likely_survival,
        origin=machine.origin,
        cached_rows=request.cached_rows,
        basis=Basis(*rates, timing, plain, option),
        learned_tokens=request.learned_tokens,
        sequences=request.sequences,
        low=_outcome(request, timing, assumed.low) if is_assumed else None,
        high=_outcome(request, timing, assumed.high) if is_assumed else None,
    )


def _outcome(request: PlanRequest, timing: RoundTiming, survival: float) -> Outcome:
    """Return what a layout gives at another survival; the draft policy chooses the depth while it runs."""
    plain, *drafted = depth_options(replace(request, survival=survival))
    if not request.fixed_depth:
        drafted.append(plain)
    rate, best = fastest_depth(timing, drafted)
    return Outcome(survival, best.depth, best.tau, rate)


def predict_at(prediction: Prediction, costs: PlanCosts, cached_rows: float) -> Prediction:
    """Return the figures of the same plan and depth for another number of cached rows."""
    basis = prediction.basis
    # The costs of a plan count widening as computing.
    timing = basis.timing._replace(
        widen_s=0.0,
        step_s=level_s(costs.step_at(cached_rows), basis.timing.sequences),
        shadow_step_s=costs.step_s(SHADOW_STEP_ROWS, cached_rows),
    )
    plain, option = (
        each._replace(compute_s=costs.compute_s(each.rows, cached_rows))
        for each in (basis.plain, basis.option)
    )
    return replace(prediction, **_times(timing, plain, option), cached_rows=cached_rows)


def _times(timing: RoundTiming, plain: DepthOption, option: DepthOption) -> dict[str, Any]:
    """Return the fields of a prediction that depend on times."""
    return {
        "plain_pass_s": pass_s(timing, plain),
        "pass_s": pass_s(timing, option),
        "step_s": timing.step_s,
        "plain_tok_per_s": timing.sequences / round_s(timing, plain),
        "tok_per_s": timing.sequences * option.tau / round_s(timing, option),
    }
