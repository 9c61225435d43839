"""The real HTTP application over a model whose answers a test dictates, piece by piece."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import uvicorn

from subspec_cli.config import RunConfig, SamplingConfig
from subspec_cli.metrics import FinishReason, GenerationStats
from subspec_cli.serving.app import make_app
from subspec_cli.serving.gate import Access
from subspec_cli.serving.service import AnswerService
from subspec_cli.session.session import TextDelta
from subspec_cli.streaming.streamer import StreamCounters

GIB = 1 << 30


class DictatedRounds:
    """The rounds of a model that has one place."""

    def __init__(self) -> None:
        self.pieces: queue.Queue[tuple[str, FinishReason | None] | Exception] = queue.Queue()
        self.left = threading.Event()
        """Set when an answer was given up."""
        self.in_flight: list[SimpleNamespace] = []

    @property
    def free(self) -> int:
        return 1 - len(self.in_flight)

    def join(self, begun: Any, max_new_tokens: int | None) -> SimpleNamespace:
        stats = GenerationStats(prompt_tokens=len(begun.prompt_ids), prefilled_tokens=len(begun.prompt_ids))
        found = _Answer(stats=stats)
        self.in_flight.append(found)
        return found

    def leave(self, found: SimpleNamespace) -> None:
        self.in_flight.remove(found)
        self.left.set()

    def round(self, on_layer: Callable[[], None]) -> Iterator[tuple[SimpleNamespace, TextDelta]]:
        while True:
            on_layer()
            try:
                piece = self.pieces.get(timeout=0.005)
                break
            except queue.Empty:
                continue
        if isinstance(piece, Exception):
            raise piece
        text, finish = piece
        (found,) = self.in_flight
        found.stats = replace(
            found.stats,
            new_tokens=found.stats.new_tokens + 4,
            passes=found.stats.passes + 1,
            ttft_s=0.25,
            decode_time_s=found.stats.decode_time_s + 2.0,
            draft_time_s=found.stats.draft_time_s + 0.5,
            verify_time_s=found.stats.verify_time_s + 1.5,
            wait_time_s=found.stats.wait_time_s + 1.0,
        )
        if finish is not None:
            self.in_flight.clear()
        yield found, TextDelta(text, (1, 2, 3, 4), finish, found.stats)


class _Answer(SimpleNamespace):
    """Compared by identity, as answers in flight are."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


class DictatedSession:
    """A session that notes what it is asked for."""

    def __init__(self) -> None:
        self.model = DictatedRounds()
        self.conversations: list[list[dict[str, str]]] = []
        self.orders: list[dict[str, Any]] = []
        self.plan = SimpleNamespace(
            sequences=1, resident_layers=3, streamed_layers=5, prediction=SimpleNamespace(tok_per_s=10.0)
        )
        self.description = SimpleNamespace(
            model_id="house/tiny-model",
            revision="0123456789abcdef",
            exactness="exact",
            exactness_reason="rows checked",
            device="cpu",
            context_tokens=100,
            budget_bytes=2 * GIB,
            seed=7,
            fingerprint="subspec-test",
            config=SimpleNamespace(sampling=SamplingConfig(), run=RunConfig()),
            plan=self.plan,
        )
        self.loaded = SimpleNamespace(tokenizer=None)

    def __enter__(self) -> DictatedSession:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def rounds(self) -> DictatedRounds:
        return self.model

    def take_request_number(self) -> int:
        return 0

    def encode_messages(self, turns: Sequence[dict[str, str]]) -> list[int]:
        self.conversations.append(list(turns))
        return [1] * 20

    def begin_by(self, prompt_ids: Sequence[int], sampling: SamplingConfig, **how: Any) -> SimpleNamespace:
        self.orders.append({"sampling": sampling, **how})
        return SimpleNamespace(prompt_ids=prompt_ids)

    def memory_bytes(self) -> int:
        return GIB

    def peak_memory_bytes(self) -> int:
        return GIB * 3 // 2

    def link_counters(self) -> StreamCounters:
        return StreamCounters()


class DictatedServer:
    """A server on a free port of this machine."""

    def __init__(self, *, api_key: str | None = None, is_loaded: bool = True, prefix: str = "") -> None:
        self.session = DictatedSession()
        self.loaded = threading.Event()
        if is_loaded:
            self.loaded.set()
        self.service = AnswerService(self._open, most_waiting=1)  # type: ignore[arg-type]
        app = make_app(self.service, Access(api_key), lambda line: None)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}{prefix}/"
        config = uvicorn.Config(
            _stripped(app, prefix), log_config=None, lifespan="off", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],))
        self._thread.start()
        self.service.start()

    def _open(self) -> DictatedSession:
        self.loaded.wait()
        return self.session

    def say(self, text: str, finish: FinishReason | None = None) -> None:
        """Let the model say a text, and end with it if there is a reason."""
        self.session.model.pieces.put((text, finish))

    def fail(self, error: Exception) -> None:
        """Let the pass fail."""
        self.session.model.pieces.put(error)

    def close(self) -> None:
        """End the server and its model."""
        self.loaded.set()
        self.service.stop(at_once=True)
        self.service.thread.join()
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()


def _stripped(app: Any, prefix: str) -> Any:
    """The application as a reverse proxy passes requests on: without the beginning of their path."""

    async def proxied(scope: dict[str, Any], receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        assert path.startswith(prefix), path
        await app({**scope, "path": path.removeprefix(prefix)}, receive, send)

    return proxied if prefix else app
