"""Lines that compare figures: predicted with measured, and speculative with plain decoding in a benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from subspec_cli.bench.figures import spread_of
from subspec_cli.bench.report import peer_reads
from subspec_cli.bench.voids import pair_reasons
from subspec_cli.cli.bench_table import FIGURE_NAMES
from subspec_cli.metrics import GenerationStats, RangeTotals
from subspec_cli.planning.comparison import Comparison
from subspec_cli.units import counted, format_bytes, format_work_time

if TYPE_CHECKING:
    from subspec_cli.bench.report import BenchReport

_MOST_OFF: Final = 2.0
"""Largest error of a prediction that is passed over in silence, as a factor."""


def comparison_line(comparison: Comparison) -> str:
    """Return predicted beside measured, as one line."""
    given, cached_rows = comparison.predicted_tok_per_s_given_tau, comparison.cached_rows
    parts = [
        f"pass {_ms(comparison.predicted_pass_s)} | {_ms(comparison.pass_s)}",
        f"draft step {_ms(comparison.predicted_step_s)} | {_ms(comparison.step_s)}",
        f"tok/s {comparison.predicted_tok_per_s:.2f} | {_rate(comparison.tok_per_s)}",
    ]
    if given is not None:
        parts.append(f"{given:.2f} predicted for this tau")
    where = "" if cached_rows is None else f" with {counted(round(cached_rows), 'token')} in the cache"
    return f"predicted ({comparison.origin} costs) | measured{where}: {' · '.join(parts)}"


def summary_lines(report: BenchReport) -> tuple[str, ...]:
    """Return the lines under a benchmark's table."""
    if not report.pairs:
        return ("nothing was measured",)
    total = report.rows[-1]
    answers = counted(total.answers, "answer")
    identical = f"{total.identical} of {answers} token for token identical ({report.exactness})"
    lines = [*void_lines(report), identical if report.speculation else f"{identical}; speculation was off"]
    lines.extend(_answer_ratios(report))
    if (best_rate := report.best_plain_tok_per_s()) and report.best_plain_void is None:
        lines.append(_best_plain_text(report, best_rate))
    rate = total.spread("speculative_tok_per_s")
    if (ceiling := report.ceiling_tok_per_s) and report.link and rate:
        lines.append(
            f"ceiling {ceiling:.2f} tok/s = tau {total.tau:.2f} x {report.link.gb_per_s:.2f} GB/s / "
            f"{report.link.streamed_bytes_per_pass / 1e9:.2f} GB per pass; reached {rate.median / ceiling:.0%}"
        )
    if total.tau and report.speculation:
        lines.append(_work_line([pair.speculative.stats for pair in report.pairs]))
        lines.extend(_range_text(item) for item in report.by_cached_rows)
    if report.comparison is not None:
        lines.append(comparison_line(report.comparison))
        # On a busy machine the prediction may be right: timing the machine now would keep wrong costs.
        if not total.is_void("speculative_tok_per_s") and (note := prediction_note(report.comparison)):
            lines.append(note)
    if report.link and report.link.cold_share is not None:
        lines.append(
            f"{report.link.cold_share:.0%} of the streamed bytes came from storage, not from a cache"
        )
    lines.extend(_peer_lines(report))
    return (*lines, *_processor_lines(report))


def void_lines(report: BenchReport) -> list[str]:
    """Return a line for each reason that makes figures void, with the figures and their rows."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in report.rows:
        for reason in dict.fromkeys(void.reason for void in row.voids):
            figures = ", ".join(FIGURE_NAMES[void.figure] for void in row.voids if void.reason == reason)
            found.setdefault((figures, reason), []).append(row.category)
    return [f"void: {figures} of {', '.join(rows)}: {reason}" for (figures, reason), rows in found.items()]


def prediction_note(comparison: Comparison) -> str | None:
    """Return a hint if a prediction was off by more than 2; None if it was not.

    Where tokens were drafted, the prediction is the one for this tau, so that the costs alone can be at fault.
    """
    measured, given = comparison.tok_per_s, comparison.predicted_tok_per_s_given_tau
    predicted = given or comparison.predicted_tok_per_s
    if not measured or not predicted or 1 / _MOST_OFF <= measured / predicted <= _MOST_OFF:
        return None
    off = max(measured / predicted, predicted / measured)
    word = "slower" if measured < predicted else "faster"
    figures = f"{measured:.3g} tok/s, predicted {predicted:.3g}{' for this tau' if given else ''}"
    hint = "--reprobe times this machine anew" if comparison.origin == "measured" else "the costs are assumed"
    return f"note: {off:.1f} times {word} than predicted ({figures}): {hint}"


def _answer_ratios(report: BenchReport) -> Iterator[str]:
    """The spread of the ratios over the answers, without those that are void."""
    pairs = [pair for pair in report.pairs if pair.speedup_same_plan]
    spread = spread_of(
        pair.speedup_same_plan for pair in pairs if not pair_reasons(pair, report.load_per_core)
    )
    void = sum(bool(pair_reasons(pair, report.load_per_core)) for pair in pairs)
    left_out = f" ({counted(void, 'answer')} void)" if void else ""
    if spread is not None:
        yield (
            f"speedup over the same plan by answer: median {spread.median:.2f}x, "
            f"{spread.least:.2f}x to {spread.most:.2f}x{left_out}"
        )


def _processor_lines(report: BenchReport) -> Iterator[str]:
    """Who used the processors, over all answers."""
    shares = [
        f"{arm.replace('_', ' ')} {use.own_share:.0%} | {use.others_share:.0%}"
        for arm, use in report.rows[-1].uses.items()
        if use.own_share is not None and use.others_share is not None
    ]
    if shares:
        load = report.load_per_core
        before = "" if load is None else f"; load before {load:.2f} a core"
        yield f"share of the cores, subspec | others: {' · '.join(shares)}{before}"


def _peer_lines(report: BenchReport) -> Iterator[str]:
    """What the peer did: how many bytes it read, its memory, and its tokens, which need not be ours."""
    found, about = peer_reads(report.pairs), report.context.get("peer", {})
    if found is None:
        return
    equal = sum(
        pair.peer.answer.token_ids == pair.speculative.token_ids[: len(pair.peer.answer.token_ids)]
        for pair in report.pairs
        if pair.peer
    )
    read = "an unknown part" if found.read_bytes is None else format_bytes(found.read_bytes)
    weights = (
        f"{read} of the {format_bytes(found.streamed_bytes)} that it streamed came from storage"
        if found.streamed_bytes
        else "all weights fit its memory"
    )
    peak, budget = about.get("peak_bytes"), report.context.get("budget_bytes")
    memory = f"; peak memory {format_bytes(peak)} of {format_bytes(budget)}" if peak and budget else ""
    answers = counted(len(report.pairs), "answer")
    yield (
        f"accelerate {about.get('version', '')}: {weights}{memory}; {equal} of {answers} with our tokens, "
        "which another rounding may change"
    )


def _best_plain_text(report: BenchReport, rate: float) -> str:
    """The speed under plain decoding's own best plan, and how far it moved while the arms were measured."""
    before, after = (report.best_plain_tok_per_s(when) for when in ("before", "after"))
    text = f"plain decoding under its own best plan: {rate:.2f} tok/s"
    return (
        f"{text}; {before:.2f} before, {after:.2f} after ({after / before - 1:+.0%})"
        if before and after
        else text
    )


def _work_line(answers: Sequence[GenerationStats]) -> str:
    """What a pass and the drafting around it took on average, and how busy the link was."""
    passes = max(1, sum(stats.passes for stats in answers))
    decode_s = sum(stats.decode_time_s for stats in answers)
    busy = sum(stats.link_time_s for stats in answers) / decode_s if decode_s else 0.0
    serial = sum(stats.draft_steps for stats in answers) / passes
    shadow = sum(stats.shadow_steps for stats in answers) / passes
    hits = sum(stats.shadow_hits for stats in answers) / passes
    levels = sum(stats.shadow_levels for stats in answers) / passes
    return (
        f"{serial:.1f} draft steps before a pass, {shadow:.1f} in its shadow, of use to {hits:.0%} of the next, "
        f"which began with {levels:.1f} levels; "
        f"link busy {busy:.0%} of the time"
    )


def _range_text(item: RangeTotals) -> str:
    """What was accepted over a range of cached rows."""
    least, most = item.least_rows, item.most_rows
    name = f"{least} or more" if most is None else f"up to {most}" if not least else f"{least} to {most}"
    return (
        f"{name} tokens in the cache: tau {item.tokens_per_pass:.2f} in {counted(item.passes, 'pass')}, "
        f"accepted {item.accepted_share:.0%} of the drafted tokens, {item.level_acceptance:.0%} a level"
    )


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else format_work_time(seconds)


def _rate(tok_per_s: float | None) -> str:
    return "-" if tok_per_s is None else f"{tok_per_s:.2f}"
