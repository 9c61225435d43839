"""The words of an audit: a line for each answer, and what the figures of all rows say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from subspec_cli.bench.audit_report import (
    FLOAT32_LARGEST_FACTOR,
    FLOAT32_MEDIAN_FACTOR,
    LARGEST_FACTOR,
    MEDIAN_FACTOR,
    NEAR_TIE,
)

if TYPE_CHECKING:
    from subspec_cli.bench.audit_report import AuditedAnswer, AuditReport, ErrorSize

HEADERS = ("question", "tokens", "as float32", "as 16-bit", "first difference", "gap", "at most")


def answer_cells(answer: AuditedAnswer) -> list[str]:
    """Return the cells of one answer; its first difference with both texts, its gap, and what a near tie may have."""
    counts = [answer.question_id, len(answer.rows), answer.in_reference, answer.in_library]
    if not answer.differences:
        return [*map(str, counts), "", "", ""]
    first = answer.differences[0]
    texts = f"token {first.index}: {first.text!r}, not {first.reference_text!r}"
    gaps = (first.row.gap, NEAR_TIE * first.row.library.largest)
    return [*map(str, counts), texts, *(f"{gap:.3g}" for gap in gaps)]


def total_cells(report: AuditReport) -> list[str]:
    """Return the cells of all answers; the largest gap of all differences."""
    in_reference = sum(answer.in_reference for answer in report.answers)
    in_library = sum(answer.in_library for answer in report.answers)
    largest = max((item.row.gap for item in report.differences), default=None)
    differing = len(report.answers) - report.whole_in_reference
    return [
        "all",
        *map(str, (len(report.rows), in_reference, in_library)),
        f"in {differing} of {len(report.answers)} answers",
        "" if largest is None else f"{largest:.3g}",
        "",
    ]


def audit_lines(report: AuditReport) -> tuple[str, ...]:
    """Return the lines under the table."""
    tokens, name = len(report.rows), report.library_dtype
    in_reference, in_library = tokens - len(report.differences), sum(a.in_library for a in report.answers)
    as_library = _agreement(report, in_library, report.whole_in_library, name)
    lines = [
        f"{_agreement(report, in_reference, report.whole_in_reference, 'float32')}; {_differences(report)}",
        f"{as_library}; its own choice in float32: {report.library_in_reference}",
    ]
    if not report.is_float32:
        lines.append(
            f"error of the logits, largest of a row: {_size(report.own)}; transformers' own in {name} "
            f"{_size(report.library)}; {_times(report.own, report.library)}, at most {MEDIAN_FACTOR:g} and "
            f"{LARGEST_FACTOR:g}"
        )
    lines.append(
        f"error in float32: {_size(report.own_float32)}; transformers' own in {name}, scaled to float32, "
        f"{_size(report.float32_unit)}; {_times(report.own_float32, report.float32_unit)}, at most "
        f"{FLOAT32_MEDIAN_FACTOR:g} and {FLOAT32_LARGEST_FACTOR:g}"
    )
    verdict = "every difference is rounding" if not report.problems else "differences beyond rounding"
    return (*lines, f"{verdict} (transformers ran on the CPU, {report.way})")


def _agreement(report: AuditReport, tokens: int, answers: int, dtype: str) -> str:
    return (
        f"as transformers in {dtype}: {tokens} of {len(report.rows)} tokens, {answers} of {len(report.answers)} "
        f"answers wholly"
    )


def _differences(report: AuditReport) -> str:
    if not report.differences:
        return "none differs"
    ties = sum(item.is_near_tie for item in report.differences)
    return f"{ties} of {len(report.differences)} that differ are near ties"


def _size(size: ErrorSize) -> str:
    return f"median {size.median:.3g}, largest {size.largest:.3g}"


def _times(size: ErrorSize, yardstick: ErrorSize) -> str:
    if not yardstick.median or not yardstick.largest:
        return "no ratio"
    return f"{size.median / yardstick.median:.2f} and {size.largest / yardstick.largest:.2f} times"
