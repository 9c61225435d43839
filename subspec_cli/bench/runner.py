"""Replaying a suite: plain and speculative decoding of every question, in turn, in one run.

Both arms share the target, the plan and the noise streams, so the same seed draws the same noise. Each arm starts
every question from an empty cache. At the end plain decoding is measured again under its own best plan, which needs
no substitutes: that is what a user would have without speculation.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from subspec_cli.bench.report import AnswerPair, ArmAnswer, BenchReport, BenchRow, LinkFigures
from subspec_cli.bench.suites import Question, load_suite
from subspec_cli.config import Config
from subspec_cli.metrics import Exactness, GenerationStats
from subspec_cli.planning.costs import PlanCosts
from subspec_cli.planning.plan import OffloadPlan
from subspec_cli.planning.request import WantedTokens
from subspec_cli.reporter import Reporter
from subspec_cli.session import open_session
from subspec_cli.streaming.memory_meter import disk_read_bytes

if TYPE_CHECKING:
    from subspec_cli.modeling.pretrained import ModelTokenizer
    from subspec_cli.session import Session
    from subspec_cli.streaming.streamer import StreamCounters

__all__ = ["BenchProgress", "BenchReport", "BenchRow", "run_bench"]

_BEST_PLAIN_QUESTIONS: Final = 2
_READ_AGAIN: Final = 1.25
"""Room for an answer that later turns read as text: cut into tokens anew, it may have a few more."""


@dataclass(frozen=True, slots=True)
class BenchProgress:
    """Progress of a run."""

    done: int
    """Answers of both arms and of the closing plain measurement."""
    total: int
    elapsed_s: float
    status: str


class _Run:
    """Collects answers. A report can be made at any time."""

    def __init__(
        self,
        config: Config,
        suite: str,
        questions: Sequence[Question],
        progress: Callable[[BenchProgress], None],
    ) -> None:
        self._config = config
        self._suite = suite
        self._questions = questions
        self._progress = progress
        self._started = time.perf_counter()
        self._done = 0
        self._pairs: list[AnswerPair] = []
        self._best_plain: list[GenerationStats] = []
        self._link: LinkFigures | None = None
        self._context: dict[str, Any] = {}
        self._plan: OffloadPlan | None = None
        self._costs: PlanCosts | None = None
        self._best_plain_plan: OffloadPlan | None = None
        self._exactness: Exactness | Literal["unchecked"] = "unchecked"
        self._speculation = False

    def measure_pairs(self) -> None:
        """Measure both arms over all questions under one plan."""
        with open_session(self._config, Reporter(self._say), count=self._count) as session:
            about = session.description
            self._exactness, self._speculation = about.exactness, about.speculation
            self._plan, self._costs = about.plan, about.costs
            self._context = _context(session, self._config)
            for number, question in enumerate(self._questions):
                self._measure_question(session, number, question)
            self._context["peak_memory_bytes"] = session.peak_memory_bytes()

    def measure_best_plain(self) -> None:
        """Measure plain decoding with as many resident layers as fit without substitutes, in the same context."""
        config = dataclasses.replace(
            self._config,
            draft=dataclasses.replace(self._config.draft, no_speculation=True),
            memory=dataclasses.replace(
                # The costs are those of the speculative arm, also if the user wants a new probe.
                self._config.memory,
                resident_layers=None,
                context=None if self._plan is None else self._plan.context,
                reprobe=False,
            ),
        )
        with open_session(config, Reporter(self._say)) as session:
            self._best_plain_plan = plan = session.description.plan
            for question in self._questions[:_BEST_PLAIN_QUESTIONS]:
                self._say(f"plain under its own best plan: {plan.resident_layers} resident layers")
                answer = next(
                    _converse(session, question, 0, limit=self._plain_limit, plain=True, history=())
                )
                self._best_plain.append(answer.stats)
                self._done += 1

    def report(self, *, interrupted: bool) -> BenchReport:
        """Return what was measured so far."""
        return BenchReport(
            suite=self._suite,
            pairs=tuple(self._pairs),
            best_plain=tuple(self._best_plain),
            link=self._link,
            exactness=self._exactness,
            speculation=self._speculation,
            interrupted=interrupted,
            context=self._context,
            plan=self._plan,
            costs=self._costs,
            best_plain_plan=self._best_plain_plan,
        )

    def _count(self, tokenizer: ModelTokenizer) -> WantedTokens:
        """Count the longest conversation, in which every answer is as long as it may be."""
        said = [
            tokenizer.encode_messages(question.messages, system=self._config.run.system)
            for question in self._questions
        ]
        earlier = max(len(question.turns) for question in self._questions) - 1
        answers = self._limit + int(earlier * self._limit * _READ_AGAIN)
        return WantedTokens(max(map(len, said)), answers)

    @property
    def _limit(self) -> int:
        return self._config.bench.max_new_tokens

    @property
    def _plain_limit(self) -> int:
        return min(self._config.bench.plain_tokens or self._limit, self._limit)

    def _measure_question(self, session: Session, number: int, question: Question) -> None:
        # A shortened plain arm continues the speculative arm's answers, so it has to come second.
        shortened = self._plain_limit < self._limit
        arms: dict[bool, list[ArmAnswer]] = {False: [], True: []}
        for plain in (False, True) if shortened or number % 2 else (True, False):
            name = "plain" if plain else "speculative"
            history = tuple(answer.text for answer in arms[False]) if plain and shortened else ()
            before, disk_before = session.link_counters(), disk_read_bytes()
            limit = self._plain_limit if plain else self._limit
            for answer in _converse(session, question, number, limit=limit, plain=plain, history=history):
                arms[plain].append(answer)
                self._done += 1
                rate = answer.stats.decode_tok_per_s
                self._say(f"{question.category}, {name}{f': {rate:.2f} tok/s' if rate else ''}")
            if not plain:
                self._add_link(session, before, disk_before)
        for turn, (plain_answer, speculative) in enumerate(
            zip(arms[True], arms[False], strict=True), start=1
        ):
            self._pairs.append(
                AnswerPair(question.question_id, question.category, turn, plain_answer, speculative)
            )

    def _add_link(self, session: Session, before: StreamCounters, disk_before: int | None) -> None:
        moved = session.link_counters().since(before)
        disk_after = disk_read_bytes()
        read = None if disk_before is None or disk_after is None else disk_after - disk_before
        old = self._link or LinkFigures(session.description.plan.streamed_bytes_per_pass, 0, 0.0, 0)
        self._link = LinkFigures(
            streamed_bytes_per_pass=old.streamed_bytes_per_pass,
            streamed_bytes=old.streamed_bytes + moved.streamed_bytes,
            read_time_s=old.read_time_s + moved.read_time_s,
            disk_read_bytes=None
            if read is None or old.disk_read_bytes is None
            else old.disk_read_bytes + read,
        )

    def _say(self, status: str) -> None:
        turns = sum(len(question.turns) for question in self._questions)
        total = 2 * turns + min(_BEST_PLAIN_QUESTIONS, len(self._questions))
        elapsed_s = time.perf_counter() - self._started
        self._progress(BenchProgress(self._done, total, elapsed_s, status))


def run_bench(config: Config, suite: str, *, progress: Callable[[BenchProgress], None]) -> BenchReport:
    """Measure a suite. Ctrl-C ends it early and keeps what is done; other failures are raised."""
    questions = load_suite(suite, config.bench.questions, config.bench.limit)
    run = _Run(config, suite, questions, progress)
    try:
        run.measure_pairs()
        run.measure_best_plain()
    except KeyboardInterrupt:
        return run.report(interrupted=True)
    return run.report(interrupted=False)


def _converse(
    session: Session, question: Question, number: int, *, limit: int, plain: bool, history: Sequence[str]
) -> Iterator[ArmAnswer]:
    """Answer all turns of a question from an empty cache; `history` replaces the arm's own earlier answers."""
    session.reset()
    chat = session.chat(None)
    for turn, text in enumerate(question.turns):
        token_ids: list[int] = []
        pieces: list[str] = []
        last = None
        # Two noise streams a question: the same in both arms, so the same noise.
        noise_stream = 2 * number + turn
        for delta in chat.ask(text, max_new_tokens=limit, stop=(), plain=plain, noise_stream=noise_stream):
            token_ids.extend(delta.token_ids)
            pieces.append(delta.text)
            last = delta
        assert last is not None
        if turn < len(history):
            chat.replace_answer(history[turn])
        yield ArmAnswer(tuple(token_ids), "".join(pieces), last.finish_reason or "interrupted", last.stats)


def _context(session: Session, config: Config) -> dict[str, Any]:
    about = session.description
    return {
        "model": about.model_id,
        "revision": about.revision,
        "device": about.device,
        "exactness_reason": about.exactness_reason,
        "seed": about.seed,
        "threads": about.threads,
        "direct_io": about.direct_io,
        "budget_bytes": about.budget_bytes,
        "costs": about.costs.as_dict(),
        "config": config.as_dict(),
        "versions": about.versions,
    }
