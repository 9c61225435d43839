"""The figures of an audit, and what they must keep: near ties only, and errors of the library's own size.

An error is an absolute difference of raw logits from the library's in float32. Two yardsticks are measured beside it:

- For logits in 16 bits, the library's own error in 16 bits. Both round alike but in other places, so the medians of
  the rows' largest errors are equal within a few percent.
- For logits of the same code in float32, the library's 16-bit error scaled to the rounding of float32. Long sums
  lose a few roundings more in float32, so the bound is wider. A wrong factor, norm or window shows here, where the
  rounding of 16 bits would hide it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from subspec_cli.modeling.row_comparison import ComparedRow, RowErrors

NEAR_TIE: Final = 2.0
"""Largest gap of a near tie, in the library's own largest error in that row: both sides may move by one each."""
MEDIAN_FACTOR: Final = 2.0
"""Our median error in 16 bits is at most this many times the library's; measured 0.97 to 1.02."""
LARGEST_FACTOR: Final = 4.0
"""The same of the largest error; measured 0.9 to 1.4."""
FLOAT32_MEDIAN_FACTOR: Final = 32.0
"""Our median error in float32, in the library's 16-bit error scaled to float32; measured 1.3 to 4.6."""
FLOAT32_LARGEST_FACTOR: Final = 128.0
"""The same of the largest error; measured 1.6 to 7."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A token that is not the library's choice in float32."""

    index: int
    """Place in the answer, from 0."""
    position: int
    """Place in prompt and answer."""
    text: str
    """Text of our token."""
    reference_text: str
    """Text of the library's choice."""
    row: ComparedRow

    @property
    def is_near_tie(self) -> bool:
        """Whether rounding in 16 bits may decide between the two tokens."""
        return self.row.gap <= NEAR_TIE * self.row.library.largest


@dataclass(frozen=True, slots=True)
class AuditedAnswer:
    """One answer beside the library's choices for the same tokens before each."""

    question_id: str
    category: str
    prompt_tokens: int
    text: str
    rows: tuple[ComparedRow, ...]
    differences: tuple[Difference, ...]
    """All tokens that are not the library's choice in float32, in order."""

    @property
    def in_reference(self) -> int:
        """Tokens that are the library's choice in float32."""
        return len(self.rows) - len(self.differences)

    @property
    def in_library(self) -> int:
        """Tokens that are the library's choice in 16 bits."""
        return sum(row.token_id == row.library_id for row in self.rows)


@dataclass(frozen=True, slots=True)
class ErrorSize:
    """Errors over all rows: of each row the largest over the vocabulary, of these the median and the largest."""

    median: float
    largest: float
    vocabulary_median: float
    """Median over the rows of the median over the vocabulary."""

    def within(self, yardstick: ErrorSize, median_factor: float, largest_factor: float) -> bool:
        """Whether both figures are within their factor of the yardstick's; never if one is not a number."""
        return (
            self.median <= median_factor * yardstick.median
            and self.largest <= largest_factor * yardstick.largest
        )


@dataclass(frozen=True)
class AuditReport:
    """What was compared."""

    answers: tuple[AuditedAnswer, ...]
    library_dtype: str
    """The library's 16-bit type: the checkpoint's own, bf16 for a float32 checkpoint."""
    is_float32: bool
    """Whether the checkpoint itself is in float32."""
    rounding_ratio: float
    """Rounding of float32 over rounding of `library_dtype`."""
    is_exact: bool
    """Whether the session promised bits that do not depend on the company of a row."""
    way: str
    """How the library ran: `whole`, or `layer by layer`."""
    context: dict[str, Any]
    """Model, configuration and versions, as plain values for JSON."""

    @cached_property
    def rows(self) -> tuple[ComparedRow, ...]:
        """All rows of all answers."""
        return tuple(row for answer in self.answers for row in answer.rows)

    @cached_property
    def differences(self) -> tuple[Difference, ...]:
        """All tokens that are not the library's choice in float32."""
        return tuple(difference for answer in self.answers for difference in answer.differences)

    @property
    def library_in_reference(self) -> int:
        """Rows whose 16-bit choice by the library is its own choice in float32."""
        return sum(row.library_id == row.reference_id for row in self.rows)

    @property
    def whole_in_reference(self) -> int:
        """Answers that are the library's greedy answers in float32."""
        return sum(answer.in_reference == len(answer.rows) for answer in self.answers)

    @property
    def whole_in_library(self) -> int:
        """Answers that are the library's greedy answers in 16 bits."""
        return sum(answer.in_library == len(answer.rows) for answer in self.answers)

    @cached_property
    def own(self) -> ErrorSize:
        """Errors of our logits."""
        return _size(self.rows, lambda row: row.own)

    @cached_property
    def own_float32(self) -> ErrorSize:
        """Errors of our logits computed in float32."""
        return _size(self.rows, lambda row: row.own_float32)

    @cached_property
    def library(self) -> ErrorSize:
        """The library's own errors in 16 bits."""
        return _size(self.rows, lambda row: row.library)

    @property
    def float32_unit(self) -> ErrorSize:
        """The library's own errors in 16 bits, scaled to the rounding of float32."""
        size, ratio = self.library, self.rounding_ratio
        return ErrorSize(size.median * ratio, size.largest * ratio, size.vocabulary_median * ratio)

    @property
    def problems(self) -> tuple[str, ...]:
        """What is beyond rounding, in words with figures; empty for an audit that is passed."""
        return tuple(self._problems())

    def _problems(self) -> Iterator[str]:
        changed = sum(row.own_id != row.token_id for row in self.rows)
        if self.is_exact and changed:
            yield f"{changed} of {len(self.rows)} tokens are not those that their own logits give"
        wrong = [difference for difference in self.differences if not difference.is_near_tie]
        if wrong:
            most = max(wrong, key=lambda difference: difference.row.gap).row
            yield (
                f"{len(wrong)} of {len(self.differences)} differing tokens are no near ties: a gap of "
                f"{most.gap:.3g}, where the library's own difference is {most.library.largest:.3g}"
            )
        if not self.is_float32 and not self.own.within(self.library, MEDIAN_FACTOR, LARGEST_FACTOR):
            yield (
                f"the logits' error is not of the library's size: median {self.own.median:.3g}, largest "
                f"{self.own.largest:.3g}, the library's in {self.library_dtype} {self.library.median:.3g} and "
                f"{self.library.largest:.3g}"
            )
        unit = self.float32_unit
        if not self.own_float32.within(unit, FLOAT32_MEDIAN_FACTOR, FLOAT32_LARGEST_FACTOR):
            yield (
                f"in float32 the logits' error is more than rounding: median {self.own_float32.median:.3g}, largest "
                f"{self.own_float32.largest:.3g}; at most {FLOAT32_MEDIAN_FACTOR * unit.median:.3g} and "
                f"{FLOAT32_LARGEST_FACTOR * unit.largest:.3g} are rounding"
            )


def _size(rows: Sequence[ComparedRow], errors_of: Callable[[ComparedRow], RowErrors]) -> ErrorSize:
    errors = [errors_of(row) for row in rows]
    largest = [error.largest for error in errors]
    if any(value != value for value in largest):  # a row that is not a number would be lost in a maximum
        return ErrorSize(float("nan"), float("nan"), float("nan"))
    return ErrorSize(
        statistics.median(largest), max(largest), statistics.median(error.median for error in errors)
    )
