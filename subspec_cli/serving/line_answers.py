"""Lines of a job over one session: each is answered among the others, and becomes a record once it is whole."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from subspec_cli.decoding.sampler import named_seed
from subspec_cli.metrics import GenerationStats
from subspec_cli.serving.job import JobLine, PromptBody
from subspec_cli.serving.model_names import check_model
from subspec_cli.serving.orders import AnswerOrder, OrderMaker
from subspec_cli.serving.request_body import ChatBody, CompletionBody, RequestRefusedError
from subspec_cli.serving.response_body import (
    AnswerHead,
    AnswerSoFar,
    Kind,
    choice_document,
    empty_answers,
    error_document,
    figures_document,
    usage_document,
)

if TYPE_CHECKING:
    from subspec_cli.session.rounds import AnswerInFlight
    from subspec_cli.session.session import Session


@dataclass(frozen=True, slots=True)
class LineResult:
    """A line that is done."""

    number: int
    """Of the line."""
    record: dict[str, Any]
    is_refused: bool
    new_tokens: int = 0
    """Of all its answers."""
    stats: tuple[GenerationStats, ...] = ()


@dataclass(slots=True)
class _OpenLine:
    """A line whose answers are not all there yet."""

    line: JobLine
    orders: list[AnswerOrder]
    answers: list[AnswerSoFar]
    failure: str | None = None
    """Why the grammar of an answer could not go on."""

    @property
    def is_whole(self) -> bool:
        return all(answer.finish_reason is not None for answer in self.answers)

    @property
    def new_tokens(self) -> int:
        return sum(len(answer.token_ids) for answer in self.answers)


class LineAnswerer:
    """Answers lines, as many answers at a time as the session has places; the others wait in order."""

    def __init__(self, session: Session, job_sha256: str, seed: int) -> None:
        """`seed` is the job's: a line that brings none has its own, made from this one and its `custom_id`."""
        self._session = session
        self._job_sha256 = job_sha256
        self._seed = seed
        self._maker = OrderMaker(session, answer_tokens=session.description.config.run.max_new_tokens)
        self._rounds = session.rounds()
        self._waiting: deque[tuple[_OpenLine, int]] = deque()
        self._places: dict[AnswerInFlight, tuple[_OpenLine, int]] = {}
        self._done: list[LineResult] = []

    @property
    def has_room(self) -> bool:
        """Whether a place is free that no answer waits for."""
        return self._rounds.free > len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether every line that was added is done and was handed out."""
        return not (self._places or self._waiting or self._done)

    @property
    def in_flight(self) -> int:
        """Answers that have a place."""
        return len(self._places)

    @property
    def open_tokens(self) -> int:
        """Tokens of the lines that are not done yet."""
        lines = {id(opened): opened for opened, _ in (*self._places.values(), *self._waiting)}
        return sum(opened.new_tokens for opened in lines.values())

    def add(self, line: JobLine) -> None:
        """Take a line; a bad one is done at once."""
        try:
            orders = self._orders(line)
        except RequestRefusedError as problem:
            self._done.append(LineResult(line.number, self._refused(line, problem), is_refused=True))
            return
        opened = _OpenLine(line, orders, empty_answers(orders, line.body, self._session.loaded.tokenizer))
        self._waiting.extend((opened, index) for index in range(len(orders)))

    def let_join(self) -> None:
        """Give the free places to answers that wait."""
        while self._waiting and self._rounds.free:
            opened, index = self._waiting.popleft()
            begun = opened.orders[index].begin(self._session)
            self._places[self._rounds.join(begun, opened.orders[index].max_new_tokens)] = opened, index

    def round(self) -> list[LineResult]:
        """Run one pass for the answers that have a place; return the lines that are done."""
        if self._places:
            for found, delta in self._rounds.round():
                opened, index = self._places[found]
                opened.answers[index].add(delta)
                opened.failure = opened.failure or delta.failure
                if delta.finish_reason is not None:
                    del self._places[found]
                if opened.is_whole:
                    self._done.append(self._result(opened))
        done, self._done = self._done, []
        return done

    def _orders(self, line: JobLine) -> list[AnswerOrder]:
        if line.problem is not None:
            raise line.problem
        check_model(line.body.model if line.body else None, self._session.description.model_id)
        seed = self._seed_of(line)
        match line.body:
            case ChatBody() as body:
                return self._maker.of_chat(body, seed)
            case CompletionBody() as body:
                return self._maker.of_completion(body, seed)
            case PromptBody() as body:
                return self._maker.of_prompt(body.prompt, body, seed)
        raise AssertionError

    def _seed_of(self, line: JobLine) -> int:
        assert line.body is not None
        assert line.custom_id is not None
        own = line.body.seed
        return named_seed(self._seed, line.custom_id) if own is None else own

    def _result(self, opened: _OpenLine) -> LineResult:
        stats = tuple(answer.stats for answer in opened.answers)
        if opened.failure is None:
            record = self._answered(opened)
        else:
            problem = RequestRefusedError(opened.failure, "response_format", code="grammar_failed")
            record = self._refused(opened.line, problem)
        is_refused = opened.failure is not None
        return LineResult(opened.line.number, record, is_refused, opened.new_tokens, stats)

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
                choice_document(kind, index, answer, self._session.loaded.tokenizer)
                for index, answer in enumerate(opened.answers)
            ],
            "usage": usage_document(opened.answers, choices),
            "subspec": figures_document(
                opened.answers, {"seed": opened.orders[0].seed, "exactness": about.exactness}
            ),
        }
        return self._record(line, 200, body, None)

    def _refused(self, line: JobLine, problem: RequestRefusedError) -> dict[str, Any]:
        error = {
            "code": problem.code or "invalid_request",
            "message": f"line {line.number}: {problem.message}",
            "param": problem.param,
            "line": line.number,
        }
        return self._record(
            line, 400, error_document(problem.message, param=problem.param, code=problem.code), error
        )

    def _record(
        self, line: JobLine, status: int, body: dict[str, Any], error: dict[str, Any] | None
    ) -> dict[str, Any]:
        response = {"status_code": status, "request_id": f"req_{self._id(line)}", "body": body}
        return {
            "id": f"batch_req_{self._id(line)}",
            "custom_id": line.custom_id,
            "response": response,
            "error": error,
        }

    def _id(self, line: JobLine) -> str:
        return f"{self._job_sha256[:16]}-{line.number}"
