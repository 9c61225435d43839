"""The JSON documents of plans, forecasts, benchmarks and audits: their figures, and the words that the user reads."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from subspec_cli.bench.figures import FIGURES
from subspec_cli.bench.voids import pair_reasons
from subspec_cli.cli.audit_text import audit_lines
from subspec_cli.cli.comparison_text import summary_lines
from subspec_cli.cli.plan_text import advice_text, assumptions, range_lines, reason_text
from subspec_cli.planning.plan import OffloadPlan

if TYPE_CHECKING:
    from subspec_cli.bench.answers import AnswerPair, ArmAnswer, BestPlainAnswer, PeerAnswer
    from subspec_cli.bench.audit_report import AuditedAnswer, AuditReport, Difference
    from subspec_cli.bench.report import BenchReport, BenchRow
    from subspec_cli.session.forecast import Forecast


def plan_document(plan: OffloadPlan) -> dict[str, Any]:
    """Return a plan with the sentences for its reason and its assumptions."""
    ends = (f"{name}: {text}" for name, text in range_lines(plan.prediction))
    return plan.as_dict(reason=reason_text(plan.reason), assumptions=(*assumptions(plan.prediction), *ends))


def forecast_document(found: Forecast) -> dict[str, Any]:
    """Return the document of `plan --json`."""
    geometry, bounds = found.geometry, found.bounds
    return {
        "model": found.model_id,
        "revision": found.commit,
        "layers": geometry.layers,
        "model_bytes": geometry.model_bytes,
        "layer_bytes": geometry.layer_matrix_bytes,
        "stored_bytes": geometry.stored_bytes,
        "stored_layer_bytes": max(geometry.link_layer_bytes),
        "dtype": geometry.dtype.lower(),
        "end_ids": list(found.end_ids),
        "device": found.device,
        "device_reason": found.device_reason,
        "prepared": found.is_prepared,
        "download_bytes": found.download_bytes,
        "download_s": found.download_s,
        "prepare_s": found.prepare_s,
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
        "rows": [_row(row) for row in report.rows],
        "summary": list(summary_lines(report)),
        "predicted_beside_measured": report.comparison.as_dict() if report.comparison else None,
        "by_cached_rows": [item.as_dict() for item in report.by_cached_rows],
        "load_per_core": report.load_per_core,
        "ceiling_tok_per_s": report.ceiling_tok_per_s,
        "link": None if report.link is None else {**asdict(report.link), "gb_per_s": report.link.gb_per_s},
        "best_plain_void": report.best_plain_void,
        **_best_plain_rates(report),
        "best_plain_answers": [_best_plain(item) for item in report.best_plain],
        "answers": [_pair(pair, report.load_per_core) for pair in report.pairs],
        **report.context,
        **{name: plan_document(plan) for name, plan in plans.items() if plan is not None},
    }


def _best_plain_rates(report: BenchReport) -> dict[str, float | None]:
    """Speeds under plain decoding's own best plan, null if void."""
    times: tuple[Literal["before", "after"] | None, ...] = (None, "before", "after")
    return {
        f"best_plain{'' if when is None else f'_{when}'}_tok_per_s": (
            report.best_plain_tok_per_s(when) if report.best_plain_void is None else None
        )
        for when in times
    }


def audit_document(report: AuditReport) -> dict[str, Any]:
    """Return the document of `audit --json`; errors are absolute differences from the float32 logits."""
    sizes = {
        "own_error": report.own,
        "own_float32_error": report.own_float32,
        "library_error": report.library,
        "float32_unit": report.float32_unit,
    }
    return {
        "passed": not report.problems,
        "problems": list(report.problems),
        "library_dtype": report.library_dtype,
        "library_way": report.way,
        "tokens": len(report.rows),
        "as_float32": len(report.rows) - len(report.differences),
        "as_library": sum(answer.in_library for answer in report.answers),
        "library_as_float32": report.library_in_reference,
        "answers_as_float32": report.whole_in_reference,
        "answers_as_library": report.whole_in_library,
        "near_ties": sum(difference.is_near_tie for difference in report.differences),
        **{name: asdict(size) for name, size in sizes.items()},
        "summary": list(audit_lines(report)),
        "answers": [_audited(answer) for answer in report.answers],
        **report.context,
    }


def _audited(answer: AuditedAnswer) -> dict[str, Any]:
    return {
        "question_id": answer.question_id,
        "category": answer.category,
        "prompt_tokens": answer.prompt_tokens,
        "text": answer.text,
        "as_float32": answer.in_reference,
        "as_library": answer.in_library,
        "first_difference": _difference(answer.differences[0]) if answer.differences else None,
        "rows": [asdict(row) for row in answer.rows],
    }


def _difference(found: Difference) -> dict[str, Any]:
    return {
        "index": found.index,
        "position": found.position,
        "text": found.text,
        "reference_text": found.reference_text,
        "gap": found.row.gap,
        "library_error": found.row.library.largest,
        "near_tie": found.is_near_tie,
    }


def _plan_or_none(plan: OffloadPlan | None) -> dict[str, Any] | None:
    return None if plan is None else plan_document(plan)


def _row(row: BenchRow) -> dict[str, Any]:
    """Medians under the names of the figures, null if void, and their least and most beside them."""
    spreads = {figure: row.spread(figure) for figure in FIGURES}
    return {
        "category": row.category,
        "answers": row.answers,
        "identical": row.identical,
        **{figure: spread.median if spread else None for figure, spread in spreads.items()},
        "spread": {figure: [spread.least, spread.most] for figure, spread in spreads.items() if spread},
        "void": {
            figure: [void.reason for void in row.voids if void.figure == figure]
            for figure in FIGURES
            if row.is_void(figure)
        },
        "processors": {
            arm: {"own_share": use.own_share, "others_share": use.others_share}
            for arm, use in row.uses.items()
        },
        "tau": row.tau,
        "prefilled_tokens": row.prefilled_tokens,
    }


def _pair(pair: AnswerPair, load_per_core: float | None) -> dict[str, Any]:
    void = pair_reasons(pair, load_per_core)
    return {
        "question_id": pair.question_id,
        "category": pair.category,
        "turn": pair.turn,
        "repetition": pair.repetition,
        "identical": pair.identical,
        "speedup_same_plan": None if void else pair.speedup_same_plan,
        "void": list(void),
        "plain": _arm(pair.plain),
        "speculative": _arm(pair.speculative),
        "peer": None if pair.peer is None else _peer(pair.peer),
    }


def _peer(found: PeerAnswer) -> dict[str, Any]:
    return {
        **_arm(found.answer),
        "read_bytes": found.read_bytes,
        "streamed_weight_bytes": found.streamed_bytes,
    }


def _best_plain(item: BestPlainAnswer) -> dict[str, Any]:
    return {"question_id": item.question_id, "when": item.when, **_arm(item.answer)}


def _arm(answer: ArmAnswer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        **answer.stats.as_dict(),
        "processors": asdict(answer.use),
    }
