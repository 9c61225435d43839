"""Running a batch job: as many requests at a time as the session has places, each record written when it is whole."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from subspec_cli.metrics import GenerationStats
from subspec_cli.planning.request import DEFAULT_CONTEXT, WantedTokens
from subspec_cli.serving.job import Job, JobLine, PromptBody
from subspec_cli.serving.job_results import JobResults
from subspec_cli.serving.line_answers import LineAnswerer, LineResult
from subspec_cli.serving.orders import COMPLETION_TOKENS, most_characters
from subspec_cli.serving.request_body import ChatBody, CompletionBody

if TYPE_CHECKING:
    from subspec_cli.modeling.pretrained import ModelTokenizer
    from subspec_cli.session.description import SessionDescription
    from subspec_cli.session.session import Session

_COUNTED_LINES: Final = 64
"""Lines whose tokens are counted before the plan is made: those with the longest prompts."""


@dataclass(slots=True)
class BatchProgress:
    """How far a job is."""

    lines: int
    known: int
    """Records that were there before."""
    written: int = 0
    refused: int = 0
    """Of those written, the lines that could not be answered."""
    in_flight: int = 0
    done_tokens: int = 0
    """Of the lines that are done."""
    open_tokens: int = 0
    """Of the lines that are not."""
    wanted_replicas: int = 0
    """Replicas of the job; 0 is this process alone."""
    replicas: int = 0
    """Those of them that can answer now."""
    restarts: int = 0
    """Replicas that died and were started again."""
    started_s: float = field(default_factory=time.monotonic)
    stats: list[GenerationStats] = field(default_factory=list)

    @property
    def new_tokens(self) -> int:
        """Tokens of all answers."""
        return self.done_tokens + self.open_tokens

    @property
    def elapsed_s(self) -> float:
        """Seconds since the first request."""
        return time.monotonic() - self.started_s

    @property
    def tok_per_s(self) -> float:
        """Tokens per second of all answers together."""
        return self.new_tokens / self.elapsed_s if self.elapsed_s > 0 else 0.0

    def add(self, result: LineResult) -> None:
        """Count a line whose record is written."""
        self.written += 1
        self.refused += result.is_refused
        self.done_tokens += result.new_tokens
        self.stats.extend(result.stats)


class BatchRun:
    """One job over one session."""

    def __init__(
        self, session: Session, job: Job, results: JobResults, report: Callable[[BatchProgress], None]
    ) -> None:
        self._answerer = LineAnswerer(session, job.sha256, int(results.identity["seed"]))
        self._job = job
        self._results = results
        self._report = report
        self.progress = BatchProgress(job.lines, results.done)

    def run(self) -> None:
        """Answer every line whose record is not there yet. What is raised leaves whole records, and no others."""
        answerer, waiting = self._answerer, unanswered(self._job, self._results)
        while True:
            while answerer.has_room and (line := next(waiting, None)) is not None:
                answerer.add(line)
            if answerer.is_idle:
                return
            answerer.let_join()
            self.progress.in_flight = answerer.in_flight
            self._report(self.progress)
            done = answerer.round()
            self.progress.open_tokens = answerer.open_tokens
            for result in done:
                self._results.write(result.record)
                self.progress.add(result)
                self._report(self.progress)


def unanswered(job: Job, results: JobResults) -> Iterator[JobLine]:
    """Yield the lines whose records are not there, in their order."""
    return (line for line in job if not results.has(line))


def job_identity(job: Job, about: SessionDescription) -> dict[str, Any]:
    """Return everything that decides the answers."""
    values = about.config.as_dict()
    sampling = {key: value for key, value in values["sampling"].items() if key not in ("seed", "sampling")}
    run = {key: values["run"][key] for key in ("max_new_tokens", "stop", "system", "raw")}
    return {
        "input_sha256": job.sha256,
        "model": about.model_id,
        "revision": about.revision,
        "seed": about.config.sampling.seed,
        "context": about.context_tokens,
        **sampling,
        **run,
    }


@dataclass(frozen=True, slots=True)
class LongestRequest:
    """The lines of a job that may need most of the context."""

    bodies: tuple[ChatBody | CompletionBody | PromptBody, ...]
    """Those whose prompts have most characters."""
    answer: int
    """Most tokens that an answer of the job may have."""
    system: str | None
    raw: bool

    def tokens(self, tokenizer: ModelTokenizer) -> WantedTokens | None:
        """Return the tokens of the longest prompt and of the longest answer, for the plan.

        None if a context of the usual length does not hold them: the plan then trades context against speed, and
        lines that are longer are refused.
        """
        prompt = max((self._prompt_tokens(body, tokenizer) for body in self.bodies), default=0)
        wanted = WantedTokens(prompt, self.answer)
        return wanted if prompt and wanted.total <= DEFAULT_CONTEXT else None

    def _prompt_tokens(self, body: ChatBody | CompletionBody | PromptBody, tokenizer: ModelTokenizer) -> int:
        """Return the tokens of the longest prompt of a body; 0 if the tokenizer refuses it, which is said later."""
        from subspec_cli.errors import PromptRefusedError, UsageError

        try:
            match body:
                case ChatBody():
                    if _fits(*(turn["content"] for turn in body.turns)):
                        return len(tokenizer.encode_messages(body.turns))
                case PromptBody():
                    if _fits(body.prompt):
                        return len(tokenizer.encode_prompt(body.prompt, system=self.system, raw=self.raw))
                case CompletionBody():
                    texts = [each for each in body.prompts if isinstance(each, str)]
                    if all(map(_fits, texts)):
                        return max(
                            len(tokenizer.encode(each) if isinstance(each, str) else each)
                            for each in body.prompts
                        )
            return DEFAULT_CONTEXT + 1
        except (PromptRefusedError, UsageError, ValueError):
            return 0


def _fits(*texts: str) -> bool:
    """Whether the tokens of a prompt are worth counting: it may fit the usual context."""
    return sum(map(len, texts)) <= most_characters(DEFAULT_CONTEXT)


def longest_request(job: Job, *, system: str | None, raw: bool, answer_tokens: int) -> LongestRequest:
    """Return the lines of a job that may need most of the context."""
    bodies = (line.body for line in job if line.body is not None)
    answer, longest = 0, list[tuple[int, int, ChatBody | CompletionBody | PromptBody]]()
    for number, body in enumerate(bodies):
        usual = COMPLETION_TOKENS if isinstance(body, CompletionBody) else answer_tokens
        answer = max(answer, body.token_limit or usual)
        entry = (len(str(body.messages if isinstance(body, ChatBody) else body.prompt)), number, body)
        (heapq.heappush if len(longest) < _COUNTED_LINES else heapq.heappushpop)(longest, entry)
    return LongestRequest(tuple(body for *_, body in longest), answer, system, raw)
