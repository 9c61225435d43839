"""Retries of failed requests: how many, and after how long a wait."""

from __future__ import annotations

import datetime
import email.utils
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from subspec_cli.errors import SubspecError
from subspec_cli.hub.hub_errors import explain_hub_error, is_transfer_error, status_of
from subspec_cli.hub.workers import WorkerChannel
from subspec_cli.units import format_seconds

_Result = TypeVar("_Result")

_RETRYABLE_STATUSES = frozenset((408, 425, 429, 500, 502, 503, 504))


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Bounds of the attempts at one request. Bytes that arrive start the count again."""

    tries: int = 5
    first_wait_s: float = 1.0
    """Doubled after every failure; the waits add up to 15 s."""
    longest_wait_s: float = 300.0
    """If the hub asks for a longer wait, the request fails at once."""
    stall_s: float | None = None
    """How long a connection may be silent; None takes the hub library's own setting."""


RETRY_POLICY = RetryPolicy()


class Attempts:
    """Counts the failed attempts at one request."""

    def __init__(
        self,
        retry_policy: RetryPolicy,
        channel: WorkerChannel,
        model_id: str,
    ) -> None:
        self._policy = retry_policy
        self._channel = channel
        self._model_id = model_id
        self._failures = 0

    def reset_failures(self) -> None:
        """Bytes have arrived, so earlier failures no longer count."""
        self._failures = 0

    def wait_or_raise(self, error: Exception) -> None:
        """Count a failure and wait before the next attempt. Raises `error` if there must be no other."""
        self._failures += 1
        if self._failures >= self._policy.tries or not _is_retryable(error):
            raise error
        wait_s = self._policy.first_wait_s * 2 ** (self._failures - 1)
        asked_s = _retry_after_s(error)
        if asked_s is not None:
            if asked_s > self._policy.longest_wait_s:
                raise error
            wait_s = max(wait_s, asked_s)
        failure = explain_hub_error(error, self._model_id, None)
        reason = failure.message if failure else type(error).__name__
        count = f"{self._failures + 1} of {self._policy.tries}"
        self._channel.report(f"{reason}; trying again in {format_seconds(wait_s)} (attempt {count})")
        self._channel.pause(wait_s)


def with_retries(
    action: Callable[[], _Result], attempts: Attempts, explain: Callable[[Exception], Exception]
) -> _Result:
    """Run `action`, and again after retryable failures. Raises the last failure as `explain` words it."""
    while True:
        try:
            return action()
        except SubspecError:
            raise
        except Exception as error:
            try:
                attempts.wait_or_raise(error)
            except Exception as final:
                raise explain(final) from final


def _is_retryable(error: Exception) -> bool:
    return is_transfer_error(error) or status_of(error) in _RETRYABLE_STATUSES


def _retry_after_s(error: Exception) -> float | None:
    """Seconds that the Retry-After header asks to wait; the header is a number or a date."""
    response = getattr(error, "response", None)
    text = response.headers.get("Retry-After", "").strip() if response is not None else ""
    if text.isdecimal():
        return float(text)
    try:
        until = email.utils.parsedate_to_datetime(text)
        return max(0.0, (until - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (ValueError, TypeError):  # TypeError: a date without a time zone
        return None
