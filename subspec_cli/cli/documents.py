"""The JSON documents of plans, forecasts and benchmarks: their figures, and the words that the user reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from subspec_cli.cli.comparison_text import summary_lines
from subspec_cli.cli.plan_text import advice_text, assumptions, reason_text
from subspec_cli.metrics import rate_of_totals
from subspec_cli.planning.plan import OffloadPlan

if TYPE_CHECKING:
    from subspec_cli.bench.report import AnswerPair, ArmAnswer, BenchReport, BenchRow, LinkFigures
    from subspec_cli.session.forecast import Forecast


def plan_document(plan: OffloadPlan) -> dict[str, Any]:
    """Return a plan with the sentences for its reason and its assumptions."""
    return plan.as_dict(reason=reason_text(plan.reason), assumptions=assumptions(plan.prediction))


def forecast_document(found: Forecast) -> dict[str, Any]:
    """Return the document of `plan --json`."""
    geometry, bounds = found.geometry, found.bounds
    return {
        "model": found.model_id,
        "revision": found.commit,
        "layers": geometry.layers,
        "model_bytes": geometry.model_bytes,
        "layer_bytes": geometry.layer_matrix_bytes,
        "dtype": geometry.dtype.lower(),
        "end_ids": list(found.end_ids),
        "device": found.device,
        "device_reason": found.device_reason,
        "prepared": found.is_prepared,
        "download_bytes": found.download_bytes,
        "substitute_disk_bytes": found.substitute_disk_bytes,
        "received_bytes": found.received_bytes,
        "plan": _plan_or_none(found.plan),
        "best_plain_plan": _plan_or_none(found.best_plain),
        "least_budget_bytes": bounds.least_budget_bytes if bounds else None,
        "least_budget_context": bounds.least_context if bounds else None,
        "largest_context": bounds.largest_context if bounds else None,
        "advice": "" if found.advice is None else advice_text(found.advice),
        "compared": [
            {
                "budget_bytes": row.budget_bytes,
                "plan": _plan_or_none(row.plan),
                "problem": row.problem,
            }
            for row in found.compared
        ],
    }


def bench_document(report: BenchReport) -> dict[str, Any]:
    """Return the document of `bench --json`."""
    plans = {"plan": report.plan, "best_plain_plan": report.best_plain_plan}
    return {
        "suite": report.suite,
        "exactness": report.exactness,
        "speculation": report.speculation,
        "interrupted": report.interrupted,
        "rows": [_fields(row) for row in report.rows],
        "summary": list(summary_lines(report)),
        "predicted_beside_measured": report.comparison.as_dict() if report.comparison else None,
        "by_cached_rows": [item.as_dict() for item in report.by_cached_rows],
        "ceiling_tok_per_s": report.ceiling_tok_per_s,
        "link": None if report.link is None else {**_fields(report.link), "gb_per_s": report.link.gb_per_s},
        "best_plain_tok_per_s": rate_of_totals(report.best_plain) if report.best_plain else None,
        "answers": [_pair(pair) for pair in report.pairs],
        **report.context,
        **{name: plan_document(plan) for name, plan in plans.items() if plan is not None},
    }


def _plan_or_none(plan: OffloadPlan | None) -> dict[str, Any] | None:
    return None if plan is None else plan_document(plan)


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
