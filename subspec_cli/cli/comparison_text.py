"""Lines that compare figures: predicted with measured, and speculative with plain decoding in a benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from subspec_cli.metrics import GenerationStats, RangeTotals
from subspec_cli.planning.comparison import Comparison
from subspec_cli.units import counted

if TYPE_CHECKING:
    from subspec_cli.bench.report import BenchReport


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
    lines = [identical if report.speculation else f"{identical}; speculation was off"]
    spread = sorted(ratio for pair in report.pairs if (ratio := pair.speedup_same_plan))
    if spread:
        median = statistics.median(spread)
        lines.append(
            f"speedup over the same plan by answer: median {median:.2f}x, {spread[0]:.2f}x to {spread[-1]:.2f}x"
        )
    if best_rate := report.best_plain_tok_per_s():
        lines.append(_best_plain_text(report, best_rate))
    rate = total.median("speculative_tok_per_s")
    if (ceiling := report.ceiling_tok_per_s) and report.link and rate:
        share = rate / ceiling
        lines.append(
            f"ceiling {ceiling:.2f} tok/s = tau {total.tau:.2f} x {report.link.gb_per_s:.2f} GB/s / "
            f"{report.link.streamed_bytes_per_pass / 1e9:.2f} GB per pass; reached {share:.0%}"
        )
    if rate and report.speculation:
        lines.append(_work_line([pair.speculative.stats for pair in report.pairs]))
        lines.extend(_range_text(item) for item in report.by_cached_rows)
    if report.comparison is not None:
        lines.append(comparison_line(report.comparison))
    if report.link and report.link.cold_share is not None:
        lines.append(
            f"{report.link.cold_share:.0%} of the streamed bytes came from storage, not from a cache"
        )
    return tuple(lines)


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
    return (
        f"{serial:.1f} draft steps before a pass, {shadow:.1f} in its shadow, of use to {hits:.0%} of the next; "
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
    return "-" if seconds is None else f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def _rate(tok_per_s: float | None) -> str:
    return "-" if tok_per_s is None else f"{tok_per_s:.2f}"
