"""Running a batch job: as many requests at a time as the session has places, each record written when it is whole."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from subspec_cli.decoding.sampler import named_seed
from subspec_cli.metrics import GenerationStats
from subspec_cli.planning.request import DEFAULT_CONTEXT, WantedTokens
from subspec_cli.serving.job import Job, JobLine, PromptBody
from subspec_cli.serving.job_results import JobResults
from subspec_cli.serving.model_names import check_model
from subspec_cli.serving.orders import COMPLETION_TOKENS, AnswerOrder, OrderMaker
from subspec_cli.serving.request_body import ChatBody, CompletionBody, RequestRefusedError
from subspec_cli.serving.response_body import (
    AnswerHead,
    AnswerSoFar,
    Kind,
    choice_document,
    error_document,
    figures_document,
    usage_document,
)

if TYPE_CHECKING:
    from subspec_cli.modeling.pretrained import ModelTokenizer
    from subspec_cli.session.rounds import AnswerInFlight
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
    new_tokens: int = 0
    started_s: float = field(default_factory=time.monotonic)
    stats: list[GenerationStats] = field(default_factory=list)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the first request."""
        return time.monotonic() - self.started_s

    @property
    def tok_per_s(self) -> float:
        """Tokens per second of all answers together."""
        return self.new_tokens / self.elapsed_s if self.elapsed_s > 0 else 0.0


@dataclass(slots=True)
class _OpenLine:
    """A line whose answers are not all there yet."""

    line: JobLine
    orders: list[AnswerOrder]
    answers: list[AnswerSoFar]

    @property
    def is_whole(self) -> bool:
        return all(answer.finish_reason is not None for answer in self.answers)


class BatchRun:
    """One job over one session."""

    def __init__(
        self, session: Session, job: Job, results: JobResults, report: Callable[[BatchProgress], None]
    ) -> None:
        self._session = session
        self._job = job
        self._results = results
        self._report = report
        self._maker = OrderMaker(session, answer_tokens=session.description.config.run.max_new_tokens)
        self.progress = BatchProgress(job.lines, results.done)

    def run(self) -> None:
        """Answer every line whose record is not there yet. What is raised leaves whole records, and no others."""
        rounds = self._session.rounds()
        places: dict[AnswerInFlight, tuple[_OpenLine, int]] = {}
        waiting = self._answers()
        while True:
            for opened, index in itertools.islice(waiting, rounds.free):
                begun = opened.orders[index].begin(self._session)
                places[rounds.join(begun, opened.orders[index].max_new_tokens)] = opened, index
            if not places:
                return
            self.progress.in_flight = len(places)
            self._report(self.progress)
            for found, delta in rounds.round():
                opened, index = places[found]
                answer = opened.answers[index]
                answer.text += delta.text
                answer.token_ids.extend(delta.token_ids)
                answer.stats, answer.finish_reason = delta.stats, delta.finish_reason
                if answer.logprobs is not None:
                    answer.logprobs.extend(delta.logprobs)
                self.progress.new_tokens += len(delta.token_ids)
                if delta.finish_reason is not None:
                    del places[found]
                    self.progress.stats.append(delta.stats)
                if opened.is_whole:
                    self._write(self._answered(opened))

    def _answers(self) -> Iterator[tuple[_OpenLine, int]]:
        """Yield the answers to give, in the order of the lines; bad lines are written off on the way."""
        for line in self._job:
            if self._results.has(line):
                continue
            try:
                orders = self._orders(line)
            except RequestRefusedError as problem:
                self.progress.refused += 1
                self._write(self._refused(line, problem))
                continue
            answers = [
                AnswerSoFar(
                    len(order.prompt_ids),
                    logprobs=None if order.logprobs is None else [],
                    tells_ids=bool(line.body and line.body.return_token_ids),
                )
                for order in orders
            ]
            opened = _OpenLine(line, orders, answers)
            yield from ((opened, index) for index in range(len(orders)))

    def _orders(self, line: JobLine) -> list[AnswerOrder]:
        if line.problem is not None:
            raise line.problem
        check_model(line.body.model if line.body else None, self._session.description.model_id)
        seed = self._seed(line)
        match line.body:
            case ChatBody() as body:
                return self._maker.of_chat(body, seed)
            case CompletionBody() as body:
                return self._maker.of_completion(body, seed)
            case PromptBody() as body:
                return self._maker.of_prompt(body.prompt, body, seed)
        raise AssertionError

    def _seed(self, line: JobLine) -> int:
        assert line.body is not None
        assert line.custom_id is not None
        own = line.body.seed
        return named_seed(int(self._results.identity["seed"]), line.custom_id) if own is None else own

    def _write(self, record: dict[str, Any]) -> None:
        self._results.write(record)
        self.progress.written += 1
        self._report(self.progress)

    def _answered(self, opened: _OpenLine) -> dict[str, Any]:
        line, about = opened.line, self._session.description
        kind: Kind = "completion" if isinstance(line.body, CompletionBody) else "chat"
        head = AnswerHead(
            f"{'cmpl' if kind == 'completion' else 'chatcmpl'}-{self._id(line)}",
            int(time.time()),
            about.model_id,
            about.fingerprint,
            kind,
        )
        choices = line.body.n or 1 if line.body else 1
        body = {
            **head.document(is_chunk=False),
            "choices": [
                choice_document(kind, index, answer, self._session.token_text)
                for index, answer in enumerate(opened.answers)
            ],
            "usage": usage_document(opened.answers, choices),
            "subspec": figures_document(
                opened.answers, {"seed": opened.orders[0].seed, "exactness": about.exactness}
            ),
        }
        response = {"status_code": 200, "request_id": f"req_{self._id(line)}", "body": body}
        return {
            "id": f"batch_req_{self._id(line)}",
            "custom_id": line.custom_id,
            "response": response,
            "error": None,
        }

    def _refused(self, line: JobLine, problem: RequestRefusedError) -> dict[str, Any]:
        error = {
            "code": problem.code or "invalid_request",
            "message": f"line {line.number}: {problem.message}",
            "param": problem.param,
            "line": line.number,
        }
        body = error_document(problem.message, param=problem.param, code=problem.code)
        response = {"status_code": 400, "request_id": f"req_{self._id(line)}", "body": body}
        return {
            "id": f"batch_req_{self._id(line)}",
            "custom_id": line.custom_id,
            "response": response,
            "error": error,
        }

    def _id(self, line: JobLine) -> str:
        return f"{self._job.sha256[:16]}-{line.number}"


def longest_request(
    job: Job, tokenizer: ModelTokenizer, *, system: str | None, raw: bool, answer_tokens: int
) -> WantedTokens | None:
    """Return the tokens of the longest prompt and of the longest answer, for the plan.

    Only the prompts with most characters are counted. None if a context of the usual length does not hold them: the
    plan then trades context against speed, and lines that are longer are refused.
    """
    bodies = (line.body for line in job if line.body is not None)
    answer, longest = 0, list[tuple[int, int, ChatBody | CompletionBody | PromptBody]]()
    for number, body in enumerate(bodies):
        usual = COMPLETION_TOKENS if isinstance(body, CompletionBody) else answer_tokens
        answer = max(answer, body.token_limit or usual)
        entry = (len(str(body.messages if isinstance(body, ChatBody) else body.prompt)), number, body)
        (heapq.heappush if len(longest) < _COUNTED_LINES else heapq.heappushpop)(longest, entry)
    prompt = max((_prompt_tokens(body, tokenizer, system, raw=raw) for *_, body in longest), default=0)
    wanted = WantedTokens(prompt, answer)
    return wanted if prompt and wanted.total <= DEFAULT_CONTEXT else None


def _prompt_tokens(
    body: ChatBody | CompletionBody | PromptBody, tokenizer: ModelTokenizer, system: str | None, *, raw: bool
) -> int:
    """Return the tokens of the longest prompt of a body; 0 if the tokenizer refuses it, which is said later."""
    from subspec_cli.errors import PromptRefusedError, UsageError

    try:
        match body:
            case ChatBody():
                return len(tokenizer.encode_messages(body.turns))
            case PromptBody():
                return len(tokenizer.encode_prompt(body.prompt, system=system, raw=raw))
        return max(len(tokenizer.encode(each) if isinstance(each, str) else each) for each in body.prompts)
    except (PromptRefusedError, UsageError, ValueError):
        return 0
