"""Replaying a suite: plain and speculative decoding of every turn, one right after the other, in one run.

Both arms share the target, the plan and the noise streams, so the same seed draws the same noise. The first arm of a
turn is plain for even questions and speculative for odd ones, and the other way round in every second repetition, so
that a machine that becomes faster or slower favours neither. Each arm answers each turn from an empty KV cache and
continues from the same conversation: both prefill the same tokens, and none reads rows that the other has made.

Before and after, plain decoding is measured under its own best plan, which needs no substitutes: that is what a user
would have without speculation. Two plans do not fit one memory budget at a time, so it cannot be measured in between.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from subspec_cli.bench.answers import AnswerPair, ArmAnswer, BestPlainAnswer, PeerAnswer
from subspec_cli.bench.peer import Peer, PeerOrder, running_peer
from subspec_cli.bench.record import fingerprint, made_here, read_record, versions
from subspec_cli.bench.report import BenchReport, LinkFigures
from subspec_cli.bench.resumed import KeptAnswers, check_session, kept_answers
from subspec_cli.bench.sources import Suite
from subspec_cli.bench.suites import Question, SuiteFile, find_suite, read_suite
from subspec_cli.config import Config
from subspec_cli.metrics import Exactness
from subspec_cli.planning.costs import PlanCosts
from subspec_cli.planning.plan import OffloadPlan
from subspec_cli.planning.request import WantedTokens
from subspec_cli.probe.machine_use import read_load_per_core, read_use
from subspec_cli.reporter import Reporter
from subspec_cli.session import open_session
from subspec_cli.session.found_model import find_model
from subspec_cli.streaming.host_memory import host_memory
from subspec_cli.streaming.memory_meter import disk_read_bytes
from subspec_cli.units import GIB

if TYPE_CHECKING:
    from subspec_cli.modeling.pretrained import ModelTokenizer
    from subspec_cli.session import Session
    from subspec_cli.streaming.streamer import StreamCounters

_BEST_PLAIN_QUESTIONS: Final = 2
_WARM_UP_TOKENS: Final = 16
_READ_AGAIN: Final = 1.25
"""Room for an answer that later turns read as text: cut into tokens anew, it may have a few more."""


@dataclass(frozen=True, slots=True)
class BenchProgress:
    """Progress of a run."""

    done: int
    """Answers of both arms and of plain decoding under its own best plan."""
    total: int
    elapsed_s: float
    status: str


class _Run:
    """Collects answers. A report can be made at any time."""

    def __init__(
        self,
        config: Config,
        suite: str,
        file: SuiteFile,
        questions: Sequence[Question],
        progress: Callable[[BenchProgress], None],
        on_question: Callable[[BenchReport], None],
    ) -> None:
        self._suite = suite
        self._questions = questions
        self._progress = progress
        self._on_question = on_question
        self._started = time.perf_counter()
        self._load_per_core = read_load_per_core()
        self._done = 0
        self._context: dict[str, Any] = {
            "record": made_here(),
            "versions": versions(),
            "questions_file": file.as_dict(),
            "questions_sha256": fingerprint(questions),
            "config": config.as_dict(),
        }
        self._kept, resume = KeptAnswers(), config.bench.resume
        if resume is not None:
            self._kept = kept_answers(read_record(Path(resume)), {"suite": suite, **self._context})
        self._config = config if self._kept.seed is None else _with_seed(config, self._kept.seed)
        self._reprobe = config.memory.reprobe and resume is None
        self._pairs: list[AnswerPair] = []
        self._best_plain: list[BestPlainAnswer] = []
        self._link = self._kept.link
        self._plan: OffloadPlan | None = None
        self._costs: PlanCosts | None = None
        self._best_plain_plan: OffloadPlan | None = None
        self._exactness: Exactness | Literal["unchecked"] = "unchecked"
        self._speculation = False

    def measure(self) -> None:
        """Measure everything."""
        self._measure_best_plain("before")
        self._on_question(self.report(interrupted=True))
        self._measure_pairs()
        self._measure_best_plain("after")

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
            load_per_core=self._load_per_core,
        )

    @contextmanager
    def _session(self, config: Config) -> Iterator[Session]:
        """Open a session and warm it up. The first one may time the machine; all go by the same costs."""
        config, self._reprobe = _with_memory(config, reprobe=self._reprobe), False
        with open_session(config, Reporter(self._say), count=self._count) as session:
            self._warm_up(session)
            assert session.learning is not None
            try:
                yield session
            except BaseException:
                # The plan of a resumed record must not change by what the record's first part has learned.
                session.learning.forget()
                raise
            session.learning.forget_disk()  # the next session's costs are this one's

    def _measure_pairs(self) -> None:
        """Measure both arms over all questions under one plan."""
        with self._session(self._config) as session, self._peer(session) as peer:
            about = session.description
            self._exactness, self._speculation = about.exactness, about.speculation
            self._plan, self._costs = about.plan, about.costs
            self._context |= _context(session)
            check_session(self._kept, self._context, about.plan)
            for repetition in range(self._config.bench.repeat):
                for number, question in enumerate(self._questions):
                    self._measure_question(session, peer, repetition, number, question)
                    # An answer of the record that is resumed is on the disk already.
                    if len(self._pairs) > len(self._kept.pairs):
                        self._on_question(self.report(interrupted=True))
            self._context["peak_memory_bytes"] = session.peak_memory_bytes()

    @contextmanager
    def _peer(self, session: Session) -> Iterator[Peer | None]:
        """Load the peer beside the session, and let it give a short answer that does not count."""
        if self._config.bench.peer is None:
            yield None
            return
        self._say("loading accelerate")
        about, found = session.description, find_model(self._config)
        order = PeerOrder(
            str(found.checkpoint.directory),
            about.device.partition(":")[0],
            about.budget_bytes,
            _host_bytes(self._config),
            about.threads,
        )
        with running_peer(order) as peer:
            self._context["peer"] = peer.about
            prompt = session.encode_prompt(self._questions[0].turns[0], system=None, raw=False)
            peer.answer(prompt, limit=2, end_ids=about.end_ids)
            yield peer

    def _measure_best_plain(self, when: Literal["before", "after"]) -> None:
        """Measure plain decoding with as many resident layers as fit without substitutes, in the same context."""
        kept = [item for item in self._kept.best_plain if item.when == when]
        if len(kept) == len(self._best_plain_questions):
            self._best_plain += kept
            self._done += len(kept)
            return
        config = _with_memory(self._config, resident_layers=None)
        config = dataclasses.replace(config, draft=dataclasses.replace(config.draft, no_speculation=True))
        with self._session(config) as session:
            self._best_plain_plan = plan = session.description.plan
            for number, question in enumerate(self._best_plain_questions):
                self._say(f"plain under its own best plan: {plan.resident_layers} resident layers")
                messages = [{"role": "user", "content": question.turns[0]}]
                answer = self._answer(session, messages, 2 * number, plain=True)
                self._best_plain.append(BestPlainAnswer(question.question_id, when, answer))
                self._done += 1

    def _measure_question(
        self, session: Session, peer: Peer | None, repetition: int, number: int, question: Question
    ) -> None:
        messages: list[dict[str, str]] = []
        for turn, text in enumerate(question.turns):
            messages.append({"role": "user", "content": text})
            done = len(self._pairs)
            if done < len(self._kept.pairs):
                self._done += 2 if self._config.bench.peer is None else 3
                pair = self._kept.pairs[done]
            else:
                # Two noise streams a question: the same in both arms, so the same noise.
                plain_first = (number + repetition) % 2 == 0
                peers = [] if plain_first else [self._peer_answer(session, peer, messages)]
                arms = self._measure_turn(
                    session,
                    messages,
                    2 * number + turn,
                    plain_first=plain_first,
                    category=question.category,
                )
                peers = peers or [self._peer_answer(session, peer, messages)]
                pair = AnswerPair(
                    question.question_id, question.category, turn + 1, *arms, repetition + 1, *peers
                )
            self._pairs.append(pair)
            messages.append({"role": "assistant", "content": pair.speculative.text})

    def _measure_turn(
        self,
        session: Session,
        messages: Sequence[dict[str, str]],
        request_number: int,
        *,
        plain_first: bool,
        category: str,
    ) -> tuple[ArmAnswer, ArmAnswer]:
        """Return the plain and the speculative answer."""
        arms, link = dict[bool, ArmAnswer](), self._link
        for plain in (plain_first, not plain_first):
            before, disk_before = session.link_counters(), disk_read_bytes()
            arms[plain] = answer = self._answer(session, messages, request_number, plain=plain)
            if not plain:
                link = self._link_after(session, before, disk_before)
            self._done += 1
            rate, name = answer.stats.decode_tok_per_s, "plain" if plain else "speculative"
            self._say(f"{category}, {name}{f': {rate:.2f} tok/s' if rate else ''}")
        self._link = link  # only now: a turn that is cut short is measured again when the record is resumed
        return arms[True], arms[False]

    def _peer_answer(
        self, session: Session, peer: Peer | None, messages: Sequence[dict[str, str]]
    ) -> PeerAnswer | None:
        """Let the peer answer: after our arms if plain decoding is first, else before them."""
        if peer is None:
            return None
        prompt = session.encode_messages(messages, system=self._config.run.system)
        answer = peer.answer(prompt, limit=self._plain_limit, end_ids=session.description.end_ids)
        self._done += 1
        self._say(f"accelerate: {answer.answer.stats.decode_tok_per_s:.2f} tok/s")
        return answer

    def _warm_up(self, session: Session) -> None:
        """Give a short answer that does not count: the first one pays for what later ones find ready."""
        self._say("warming up")
        messages = [{"role": "user", "content": self._questions[0].turns[0]}]
        _generate(session, messages, 0, limit=min(_WARM_UP_TOKENS, self._limit), plain=False)

    def _answer(
        self, session: Session, messages: Sequence[dict[str, str]], request_number: int, *, plain: bool
    ) -> ArmAnswer:
        limit = self._plain_limit if plain else self._limit
        before = read_use()
        answer = _generate(session, messages, request_number, limit=limit, plain=plain)
        return dataclasses.replace(answer, use=read_use().since(before))

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
    def _best_plain_questions(self) -> Sequence[Question]:
        return self._questions[:_BEST_PLAIN_QUESTIONS]

    @property
    def _limit(self) -> int:
        return self._config.bench.max_new_tokens

    @property
    def _plain_limit(self) -> int:
        return min(self._config.bench.plain_tokens or self._limit, self._limit)

    def _link_after(self, session: Session, before: StreamCounters, disk_before: int | None) -> LinkFigures:
        moved = session.link_counters().since(before)
        disk_after = disk_read_bytes()
        read = None if disk_before is None or disk_after is None else disk_after - disk_before
        old = self._link or LinkFigures(session.description.plan.streamed_bytes_per_pass, 0, 0.0, 0)
        return LinkFigures(
            streamed_bytes_per_pass=old.streamed_bytes_per_pass,
            streamed_bytes=old.streamed_bytes + moved.streamed_bytes,
            read_time_s=old.read_time_s + moved.read_time_s,
            disk_read_bytes=None
            if read is None or old.disk_read_bytes is None
            else old.disk_read_bytes + read,
        )

    def _say(self, status: str) -> None:
        turns = sum(len(question.turns) for question in self._questions)
        total = (2 if self._config.bench.peer is None else 3) * turns * self._config.bench.repeat + 2 * len(
            self._best_plain_questions
        )
        elapsed_s = time.perf_counter() - self._started
        self._progress(BenchProgress(self._done, total, elapsed_s, status))


def run_bench(
    config: Config,
    suite: Suite,
    *,
    progress: Callable[[BenchProgress], None],
    on_question: Callable[[BenchReport], None] = lambda _: None,
) -> BenchReport:
    """Measure a suite. Ctrl-C ends it early and keeps what is done; other failures are raised.

    `on_question` receives what is measured so far, after each question.

    Raises UsageError if a record is to be resumed that is complete or was made with other settings.
    """
    file = find_suite(suite, config.bench.questions)
    questions = read_suite(suite, file.path, config.bench.limit)
    run = _Run(config, suite, file, questions, progress, on_question)
    try:
        run.measure()
    except KeyboardInterrupt:
        return run.report(interrupted=True)
    return run.report(interrupted=False)


def _generate(
    session: Session, messages: Sequence[dict[str, str]], request_number: int, *, limit: int, plain: bool
) -> ArmAnswer:
    """Answer the last message of a conversation from an empty cache."""
    session.reset()
    prompt = session.encode_messages(messages, system=session.description.config.run.system)
    deltas = list(
        session.generate(prompt, max_new_tokens=limit, stop=(), plain=plain, request_number=request_number)
    )
    token_ids = tuple(token for delta in deltas for token in delta.token_ids)
    text = "".join(delta.text for delta in deltas)
    return ArmAnswer(token_ids, text, deltas[-1].finish_reason or "interrupted", deltas[-1].stats)


def _host_bytes(config: Config) -> int:
    """Host memory that the peer may take for what the device does not hold."""
    free = host_memory().free_bytes
    return free if config.memory.ram_gb is None else min(free, int(config.memory.ram_gb * GIB))


def _with_seed(config: Config, seed: int) -> Config:
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, seed=seed))


def _with_memory(config: Config, **changes: Any) -> Config:  # noqa: ANN401 - as `dataclasses.replace`
    return dataclasses.replace(config, memory=dataclasses.replace(config.memory, **changes))


def _context(session: Session) -> dict[str, Any]:
    about = session.description
    return {
        "model": about.model_id,
        "revision": about.revision,
        "device": about.device,
        "exactness_reason": about.exactness_reason,
        "seed": about.seed,
        "sampling": about.config.as_dict()["sampling"],
        "threads": about.threads,
        "direct_io": about.direct_io,
        "budget_bytes": about.budget_bytes,
        "costs": about.costs.as_dict(),
    }
