"""Counters and gauges in the text form of Prometheus."""

from __future__ import annotations

import threading
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from subspec_cli.serving.response_body import AnswerSoFar
from subspec_cli.serving.service import AnswerService


class Counts:
    """What all requests took together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Tally[int] = Tally()
        self._sums: Tally[str] = Tally()

    def totals(self) -> tuple[dict[int, int], dict[str, int]]:
        """Return the requests by status, and the sums by name."""
        with self._lock:
            return dict(self._requests), dict(self._sums)

    def add(self, answers: Sequence[AnswerSoFar], status: int) -> None:
        """Count a request that is over."""
        with self._lock:
            self._requests[status] += 1
            for answer in answers:
                stats = answer.stats
                self._sums["prompt_tokens"] += stats.prompt_tokens
                self._sums["cached_prompt_tokens"] += stats.prompt_tokens - stats.prefilled_tokens
                self._sums["generated_tokens"] += stats.new_tokens
                self._sums["passes"] += stats.passes
                self._sums["drafted_tokens"] += stats.drafted_tokens
                self._sums["accepted_tokens"] += max(0, stats.new_tokens - 1 - stats.passes)


_HELP = {
    "prompt_tokens": "Tokens of prompts",
    "cached_prompt_tokens": "Tokens of prompts that were in the KV cache",
    "generated_tokens": "Tokens of answers",
    "passes": "Target passes, counted for every answer in them",
    "drafted_tokens": "Tokens that were drafted",
    "accepted_tokens": "Drafted tokens that became tokens of answers",
}


class _Collector(Collector):
    def __init__(self, service: AnswerService, counts: Counts) -> None:
        self._service = service
        self._counts = counts

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "subspec_requests", "Requests for answers by status", labels=["status"]
        )
        by_status, sums = self._counts.totals()
        for status, number in sorted(by_status.items()):
            requests.add_metric([str(status)], number)
        yield requests
        for name, text in _HELP.items():
            yield CounterMetricFamily(f"subspec_{name}", text, value=sums.get(name, 0))
        yield GaugeMetricFamily(
            "subspec_answers_in_flight", "Answers in flight", value=self._service.in_flight
        )
        yield GaugeMetricFamily("subspec_answers_waiting", "Answers that wait", value=self._service.waiting)
        yield from self._of_session()

    def _of_session(self) -> Iterator[Metric]:
        session = self._service.session
        if session is None:
            return
        link, about = session.link_counters(), session.description
        yield CounterMetricFamily("subspec_streamed_bytes", "Bytes over the link", value=link.streamed_bytes)
        yield CounterMetricFamily(
            "subspec_link_busy_seconds", "Time that the link was busy", value=link.read_time_s
        )
        gauges = {
            "subspec_memory_bytes": ("Memory beyond a bare process", session.memory_bytes()),
            "subspec_budget_bytes": ("Budget of the device", about.budget_bytes),
            "subspec_exact": ("1 if tokens are proved to be the model's own", about.exactness == "exact"),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)


def metrics_text(service: AnswerService, counts: Counts) -> str:
    """Return all of them."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(service, counts))
    return generate_latest(registry).decode()
