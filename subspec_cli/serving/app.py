"""The HTTP application: the OpenAI API over one service, with metrics and a page."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Scope

from subspec_cli.decoding.sampler import derived_seed
from subspec_cli.errors import UsageError
from subspec_cli.serving.gate import Access, Gate, Heads, with_cors
from subspec_cli.serving.http_answers import Asked, HttpAnswers, fault_words
from subspec_cli.serving.metrics_text import Counts, metrics_text
from subspec_cli.serving.model_names import check_model, model_names
from subspec_cli.serving.orders import OrderMaker
from subspec_cli.serving.page import read_page
from subspec_cli.serving.request_body import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Generation,
    RequestRefusedError,
    TokenizeBody,
    refusal_in,
)
from subspec_cli.serving.response_body import error_document
from subspec_cli.serving.service import AnswerService, NotReadyError, QueueFullError, State
from subspec_cli.serving.strict_json import parse_request
from subspec_cli.session.session import Session
from subspec_cli.versions import __version__

_RETRY_S: Final = 5
_ANSWER_PATHS: Final = ("/v1/chat/completions", "/v1/completions")
_ERROR: Final[dict[int | str, dict[str, Any]]] = {
    "4XX": {"description": "The request is refused; the body says why."},
    "5XX": {"description": "The answer failed, or the model is not loaded; the body says why."},
}


@dataclass(slots=True)
class Served:
    """What the handlers share."""

    service: AnswerService
    log: Callable[[str], None]
    counts: Counts = field(default_factory=Counts)
    began: int = field(default_factory=lambda: int(time.time()))
    _maker: OrderMaker | None = None

    def ready(self, model: str | None) -> tuple[Session, OrderMaker]:
        """Return session and maker of orders; raises NotReadyError, or RequestRefusedError for another model."""
        session = self.service.check_ready()
        check_model(model, session.description.model_id)
        if self._maker is None:
            self._maker = OrderMaker(session, answer_tokens=None)
        return session, self._maker

    def ended(self, answers: HttpAnswers, status: int, path: str) -> None:
        """Count a request that is over, and log it."""
        self.counts.add(answers.answers, status)
        self.log(answers.log_line(path, status))

    def refused(self, scope: Scope, status: int, reason: str = "") -> None:
        """Count and log a request that was not answered, if it asked for answers or may not ask at all."""
        method, path = str(scope["method"]), str(scope["path"])
        if path in _ANSWER_PATHS or status in (401, 403, 500):
            self.counts.add((), status)
            words = f"{time.strftime('%H:%M:%S')} {method[:20]} {path[:100]} {status}"
            self.log(f"{words} · {reason}" if reason else words)


class _StrictRoute(APIRoute):
    """A route whose body is read as a line of a job is: what is no sound JSON object is refused with 400."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request."""
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strictly


class _StrictRequest(Request):
    async def json(self) -> dict[str, Any]:
        """Return the body."""
        try:
            return parse_request(await self.body(), "the body")
        except UsageError as error:
            raise HTTPException(400, error.message) from error


def make_app(service: AnswerService, access: Access, log: Callable[[str], None]) -> FastAPI:
    """Return the application over a service, which may still be loading its model.

    `log` takes one line for each request that asked for answers, without anything of what was said.
    """
    app = FastAPI(title="subspec", version=__version__, docs_url=None, redoc_url=None, responses=_ERROR)
    app.router.route_class = _StrictRoute
    served = Served(service, log)
    _add_answers(app, served)
    _add_facts(app, served)
    _add_errors(app, served, access)
    if access.origins:
        app.add_middleware(with_cors, access)
    app.add_middleware(Gate, access=access, on_refusal=served.refused)
    app.add_middleware(Heads)
    return app


def _add_answers(app: FastAPI, served: Served) -> None:
    async def respond(
        request: Request, body: Generation, order: Callable[[OrderMaker, int], Any]
    ) -> Response:
        session, maker = served.ready(body.model)
        seed = body.seed
        if seed is None:
            seed = derived_seed(session.description.seed, session.take_request_number())
        orders = await run_in_threadpool(order, maker, seed)
        asked = Asked("chat" if isinstance(body, ChatBody) else "completion", body, orders)
        path = request.url.path
        answers = HttpAnswers(
            served.service, session, asked, lambda found, status: served.ended(found, status, path)
        )
        return await answers.respond(request)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        return await respond(request, body, lambda maker, seed: maker.of_chat(body, seed))

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Go on from bare prompts."""
        return await respond(request, body, lambda maker, seed: maker.of_completion(body, seed))

    @app.post("/tokenize", response_model=None)
    def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """Return the token ids of a text or of a conversation."""
        session, maker = served.ready(body.model)
        if body.messages is not None:
            turns = [message.as_turn() for message in body.messages]
            token_ids = maker.conversation(turns)
        else:
            token_ids = maker.tokenize(body.text, add_special_tokens=body.add_special_tokens)
        about = session.description
        return {"count": len(token_ids), "max_model_len": about.context_tokens, "tokens": token_ids}

    @app.post("/detokenize", response_model=None)
    def detokenize(body: DetokenizeBody) -> dict[str, str]:
        """Return the text of token ids, special tokens written out."""
        _, maker = served.ready(body.model)
        text = maker.detokenize(body.tokens)
        return {"prompt": text, "content": text}


def _add_facts(app: FastAPI, served: Served) -> None:
    def model_document(model_id: str, session: Session) -> dict[str, Any]:
        return {
            "id": model_id,
            "object": "model",
            "created": served.began,
            "owned_by": "subspec",
            "max_model_len": session.description.context_tokens,
        }

    @app.get("/v1/models", response_model=None)
    def models() -> dict[str, Any]:
        """Return the model that is served."""
        session = served.service.check_ready()
        name = model_names(session.description.model_id)[0]
        return {"object": "list", "data": [model_document(name, session)]}

    @app.get("/v1/models/{name:path}", response_model=None)
    def model(name: str) -> dict[str, Any]:
        """Return the model of a name."""
        session, _ = served.ready(name)
        return model_document(name, session)

    @app.get("/health", response_model=None)
    def health() -> JSONResponse:
        """Say whether requests are answered."""
        state = served.service.state
        return JSONResponse({"status": state.value}, 200 if state is State.READY else 503)

    @app.get("/metrics", response_model=None, response_class=PlainTextResponse)
    def metrics() -> PlainTextResponse:
        """Return counters and gauges for Prometheus."""
        return PlainTextResponse(
            metrics_text(served.service, served.counts), media_type="text/plain; version=0.0.4"
        )

    @app.get("/v1/figures", response_model=None)
    def figures() -> dict[str, Any]:
        """Return what the page shows: the model, its exactness, its memory and the link."""
        session = served.service.check_ready()
        about, link = session.description, session.link_counters()
        return {
            "model": model_names(about.model_id)[0],
            "revision": about.revision,
            "exactness": about.exactness,
            "exactness_reason": about.exactness_reason,
            "device": about.device,
            "context": about.context_tokens,
            "temperature": about.config.sampling.temperature,
            "top_p": about.config.sampling.top_p,
            "parallel": about.plan.sequences,
            "in_flight": served.service.in_flight,
            "waiting": served.service.waiting,
            "memory_bytes": session.memory_bytes(),
            "peak_memory_bytes": session.peak_memory_bytes(),
            "budget_bytes": about.budget_bytes,
            "resident_layers": about.plan.resident_layers,
            "streamed_layers": about.plan.streamed_layers,
            "predicted_tok_per_s": about.plan.prediction.tok_per_s,
            "streamed_bytes": link.streamed_bytes,
            "link_busy_s": link.read_time_s,
        }

    page = read_page()

    @app.get("/", include_in_schema=False)
    def start() -> HTMLResponse:
        """Return the page."""
        return HTMLResponse(page.html, headers=page.headers)


def _add_errors(app: FastAPI, served: Served, access: Access) -> None:
    """Answer every error in the form of the API."""

    def answer(
        request: Request, status: int, document: dict[str, Any], headers: Mapping[str, str] | None = None
    ) -> JSONResponse:
        served.refused(request.scope, status)
        return JSONResponse(document, status, headers)

    @app.exception_handler(RequestRefusedError)
    def refused(request: Request, error: RequestRefusedError) -> JSONResponse:
        status = 404 if error.code == "model_not_found" else 400
        return answer(request, status, error_document(error.message, param=error.param, code=error.code))

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        found = _fault_of(error)
        return answer(request, 400, error_document(found.message, param=found.param))

    @app.exception_handler(QueueFullError)
    def full(request: Request, error: QueueFullError) -> JSONResponse:
        document = error_document(str(error), kind="rate_limit_error", code="queue_full")
        return answer(request, 429, document, {"Retry-After": str(_RETRY_S)})

    @app.exception_handler(NotReadyError)
    def not_ready(request: Request, error: NotReadyError) -> JSONResponse:
        document = error_document(str(error), kind="server_error", code="not_ready")
        return answer(request, 503, document, {"Retry-After": str(_RETRY_S)})

    @app.exception_handler(HTTPException)
    def http_error(request: Request, error: HTTPException) -> JSONResponse:
        document = error_document(_words_of(error, request.url.path))
        return answer(request, error.status_code, document, error.headers)

    @app.exception_handler(Exception)
    def fault(request: Request, error: Exception) -> ASGIApp:
        words, reason = fault_words(error)
        served.refused(request.scope, 500, reason)
        # This one is sent outside of all middleware.
        return with_cors(JSONResponse(error_document(words, kind="server_error"), 500), access)


def _fault_of(error: RequestValidationError) -> RequestRefusedError:
    """Return the first fault of a body, in words."""
    faults = error.errors()
    first = faults[0]
    if first["loc"] == ("body",) and first["type"] != "value_error":
        return RequestRefusedError("the body must be a JSON object, sent with Content-Type: application/json")
    return refusal_in([(each["loc"][1:], each["msg"], each["type"]) for each in faults])


def _words_of(error: HTTPException, path: str) -> str:
    """Return what is said of an error; a client may have the API's address without its last part."""
    if error.status_code == 404 and f"/v1{path}" in (*_ANSWER_PATHS, "/v1/models"):
        return f"there is no {path}, but /v1{path}: the address of the API ends with /v1"
    return str(error.detail)
