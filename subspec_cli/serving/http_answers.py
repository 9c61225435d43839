"""One HTTP request for answers: it orders them, and turns their pieces into one document or a stream of events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from subspec_cli.metrics import rate_of_totals, tau_of_totals
from subspec_cli.serving.orders import AnswerOrder
from subspec_cli.serving.request_body import Generation
from subspec_cli.serving.response_body import (
    AnswerHead,
    Kind,
    choice_document,
    empty_answers,
    error_document,
    figures_document,
    logprobs_document,
    usage_document,
)
from subspec_cli.serving.service import STOPPED, AnswerService, Failure, Ticket
from subspec_cli.units import format_seconds

if TYPE_CHECKING:
    from subspec_cli.session.answer import TextDelta
    from subspec_cli.session.session import Session

_KEEP_ALIVE_S: Final = 10.0
"""A comment is sent after so long without a piece: clients and proxies give up on silent connections."""
CLIENT_LEFT: Final = 499
"""Status of a request whose client has left, for the log; nobody receives it."""
OnEnd = Callable[["HttpAnswers", int], None]
"""Receives a request that is over, and its status."""


class AnswersFailedError(Exception):
    """The answers cannot be given."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure

    @property
    def status(self) -> int:
        """Status of a response that has not begun."""
        if self.failure.is_fault:
            return 500
        return 503 if self.failure.message == STOPPED else 400

    @property
    def document(self) -> dict[str, Any]:
        """The error as the API has it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return error_document(self.failure.message, kind=kind)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for."""

    kind: Kind
    body: Generation
    orders: list[AnswerOrder]

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.body.n or 1

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        options = self.body.stream_options
        return options is not None and bool(options.include_usage)

    @property
    def tells_figures(self) -> bool:
        """Whether every piece of a stream says what the answers took so far."""
        options = self.body.stream_options
        return options is not None and bool(options.include_usage and options.continuous_usage_stats)


class HttpAnswers:
    """The answers of one request, from the order to their end."""

    def __init__(self, service: AnswerService, session: Session, asked: Asked, on_end: OnEnd) -> None:
        self._service = service
        self._session = session
        self._asked = asked
        self._on_end = on_end
        self._pieces: asyncio.Queue[tuple[int, TextDelta | Failure]] = asyncio.Queue()
        self.began_s = time.monotonic()
        self._status = CLIENT_LEFT
        self._told = ""
        """What the log says of a failure."""
        self.answers = empty_answers(asked.orders, asked.body, session.loaded.tokenizer)
        self._tickets = self._ordered()
        prefix = "chatcmpl" if asked.kind == "chat" else "cmpl"
        about = session.description
        self._head = AnswerHead(
            f"{prefix}-{secrets.token_hex(12)}",
            int(time.time()),
            about.model_id,
            about.fingerprint,
            asked.kind,
        )

    def _ordered(self) -> list[Ticket]:
        loop = asyncio.get_running_loop()

        def sink_of(index: int) -> Callable[[TextDelta | Failure], None]:
            def sink(piece: TextDelta | Failure) -> None:
                with suppress(RuntimeError):  # the server ends, and its loop is closed
                    loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

            return sink

        sinks = [sink_of(index) for index in range(len(self._asked.orders))]
        return self._service.submit(self._asked.orders, sinks)

    async def respond(self, request: Request) -> Response:
        """Return the response: a stream, or a document once all is answered."""
        if self._asked.body.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            events = StreamingResponse(self._events(), media_type="text/event-stream", headers=headers)
            return _Guarded(events, lambda: self._end(self._status))
        whole = asyncio.ensure_future(self._whole())
        left = asyncio.ensure_future(_client_left(request))
        try:
            await asyncio.wait({whole, left}, return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                return Response(status_code=CLIENT_LEFT)
            document = whole.result()
            self._status = 200
            return JSONResponse(document)
        except Exception as error:
            return JSONResponse(self._fail(error), self._status)
        finally:
            whole.cancel()
            left.cancel()
            self._end(self._status)

    async def _whole(self) -> dict[str, Any]:
        async with aclosing(self._outputs()) as outputs:
            async for _ in outputs:
                pass
        asked = self._asked
        return {
            **self._head.document(is_chunk=False),
            "choices": [
                choice_document(asked.kind, index, answer, self._session.loaded.tokenizer)
                for index, answer in enumerate(self.answers)
            ],
            "usage": self._usage(),
            "subspec": self._figures(),
        }

    async def _outputs(self) -> AsyncGenerator[tuple[int, TextDelta] | None, None]:
        """Yield pieces with the number of their answer, which they have been added to; None after a silence."""
        open_answers = len(self.answers)
        while open_answers:
            try:
                index, piece = await asyncio.wait_for(self._pieces.get(), _KEEP_ALIVE_S)
            except TimeoutError:
                yield None
                continue
            if isinstance(piece, Failure):
                raise AnswersFailedError(piece)
            self.answers[index].add(piece)
            open_answers -= piece.finish_reason is not None
            yield index, piece

    async def _events(self) -> AsyncIterator[str]:
        """Yield server-sent events; the last ones say the figures and that it is done, or what failed."""
        try:
            yield ": subspec\n\n"
            # A role comes with the first piece: clients take the time of their first event for that of the prompt.
            silent = set(range(len(self.answers))) if self._asked.kind == "chat" else set()
            async with aclosing(self._outputs()) as outputs:
                async for output in outputs:
                    if output and output[0] in silent:
                        silent.remove(output[0])
                        yield self._event(
                            [self._chunk(output[0], {"role": "assistant", "content": ""}, None)]
                        )
                    yield self._piece_event(*output) if output else ": keep-alive\n\n"
            if self._asked.tells_usage:
                yield self._event([], usage=self._usage())
            self._status = 200
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield f"data: {json.dumps(self._fail(error))}\n\n"

    def _fail(self, error: Exception) -> dict[str, Any]:
        """Note why there is no answer; return what the client is told."""
        if isinstance(error, AnswersFailedError):
            self._status = error.status
            self._told = _one_line(error.failure.message) if error.failure.is_fault else ""
            return error.document
        self._status = 500
        words, self._told = fault_words(error)
        return error_document(words, kind="server_error")

    def _piece_event(self, index: int, piece: TextDelta) -> str:
        answer, kind = self.answers[index], self._asked.kind
        logprobs: dict[str, Any] | None = None
        if answer.logprobs is not None:
            first = len(answer.logprobs) - len(piece.logprobs)
            logprobs = logprobs_document(kind, answer, first, self._session.loaded.tokenizer)
        tells_more = answer.tells_ids or logprobs is not None
        if not piece.text and not tells_more and piece.finish_reason is None:
            return ": held back\n\n"
        choice = self._chunk(index, {"content": piece.text} if piece.text else {}, logprobs)
        choice["finish_reason"] = piece.finish_reason
        if answer.tells_ids:
            choice["token_ids"] = list(piece.token_ids)
        is_last = all(each.finish_reason is not None for each in self.answers)
        has_figures = is_last or self._asked.tells_figures
        return self._event([choice], **({"subspec": self._figures()} if has_figures else {}))

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None) -> dict[str, Any]:
        content = {"delta": delta} if self._asked.kind == "chat" else {"text": delta.get("content", "")}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": None}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:  # noqa: ANN401 - values of JSON
        usage: dict[str, Any] = {}
        if self._asked.tells_usage:
            usage = {"usage": self._usage() if self._asked.tells_figures else None}
        document = {**self._head.document(is_chunk=True), "choices": choices, **usage, **more}
        return f"data: {json.dumps(document)}\n\n"

    def _usage(self) -> dict[str, Any]:
        return usage_document(self.answers, self._asked.choices)

    def _figures(self) -> dict[str, Any]:
        about = self._session.description
        return figures_document(
            self.answers, {"seed": self._asked.orders[0].seed, "exactness": about.exactness}
        )

    def log_line(self, path: str, status: int) -> str:
        """Return what the log says of the request: figures, and nothing of its content."""
        usage, stats = self._usage(), [answer.stats for answer in self.answers]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        parts = (
            f"{time.strftime('%H:%M:%S')} POST {path} {status}",
            f"{usage['prompt_tokens']} tokens read{f', {cached} cached' if cached else ''}",
            f"{usage['completion_tokens']} written",
            f"{rate_of_totals(stats):.2f} tok/s",
            f"tau {tau_of_totals(stats):.1f}",
            format_seconds(time.monotonic() - self.began_s),
        )
        return " · ".join((*parts, self._told) if self._told else parts)

    def _end(self, status: int) -> None:
        for ticket in self._tickets:
            self._service.cancel(ticket)
        self._on_end(self, status)


def fault_words(error: Exception) -> tuple[str, str]:
    """Return what a client and what the log is told of an error of our own."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    words = f"internal error: {type(error).__name__}"
    return words, _one_line(f"{words}: {error} ({Path(place.filename).name}:{place.lineno})")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]


class _Guarded(Response):
    """A response behind which something is done in any case, also if its client leaves before the first byte."""

    def __init__(self, response: Response, at_end: Callable[[], None]) -> None:
        self._response = response
        self._at_end = at_end
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await self._response(scope, receive, send)
        finally:
            self._at_end()


async def _client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
