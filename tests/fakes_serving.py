"""Stand-ins for tests of the server: a session that types out a text by rounds, and a client without a network."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from subspec_cli.config import Config, SamplingConfig
from subspec_cli.decoding.logprobs import TokenLogprobs
from subspec_cli.errors import UsageError
from subspec_cli.metrics import GenerationStats
from subspec_cli.serving.app import make_app
from subspec_cli.serving.gate import Access
from subspec_cli.serving.service import AnswerService, Ticket
from subspec_cli.session.session import TextDelta
from subspec_cli.streaming.streamer import StreamCounters

LAYERS = 4
LONG_S = 20.0
"""After so long a test has failed; nothing takes it otherwise."""


def until(is_so: Callable[[], bool], most_s: float = LONG_S) -> None:
    """Wait for another thread."""
    end_s = time.monotonic() + most_s
    while not is_so():
        assert time.monotonic() < end_s, "it never came about"
        time.sleep(0.001)


@dataclass(eq=False)
class FakeBegun:
    prompt_ids: tuple[int, ...]
    seed: int
    choice: int
    logprobs: int | None


@dataclass(eq=False)
class FakeInFlight:
    begun: FakeBegun
    limit: int
    written: int = 0
    stats: GenerationStats = field(default_factory=GenerationStats)


def text_of(prompt_ids: Sequence[int], seed: int = 0, choice: int = 0) -> str:
    """The text of an answer."""
    return f"{''.join(map(chr, prompt_ids))}/{seed}/{choice}"


class FakeRounds:
    """One character a round for each answer in flight. Counts what is done to it."""

    def __init__(self, session: FakeSession) -> None:
        self._session = session
        self.in_flight: list[FakeInFlight] = []
        self.order: list[str] = []
        """Prompts in the order in which they joined."""
        self.layers = 0
        """Layers that were computed."""

    @property
    def free(self) -> int:
        return self._session.places - len(self.in_flight)

    def join(self, begun: FakeBegun, max_new_tokens: int | None) -> FakeInFlight:
        assert self.free > 0
        if self._session.fault_in_join is not None:
            raise self._session.fault_in_join
        usual = self._session.description.config.run.max_new_tokens
        found = FakeInFlight(begun, usual if max_new_tokens is None else max_new_tokens)
        self.in_flight.append(found)
        self.order.append("".join(map(chr, begun.prompt_ids)))
        return found

    def leave(self, found: FakeInFlight) -> None:
        if found in self.in_flight:
            self.in_flight.remove(found)

    def round(self, on_layer: Callable[[], None]) -> Iterator[tuple[FakeInFlight, TextDelta]]:
        assert self.in_flight, "a round without anyone"
        present = list(self.in_flight)
        for layer in range(LAYERS):
            self._session.in_layer(layer)
            self.layers += 1
            on_layer()
        self._session.in_round()
        for found in present:
            delta = self._delta(found)
            if delta.finish_reason is not None:
                self.leave(found)
            yield found, delta

    def _delta(self, found: FakeInFlight) -> TextDelta:
        begun = found.begun
        text = text_of(begun.prompt_ids, begun.seed, begun.choice)
        letter = text[found.written]
        found.written += 1
        held = self._session.held
        ready = "" if found.written < held else text[:held] if found.written == held else letter
        ends = found.written == len(text)
        read = len(begun.prompt_ids)
        found.stats = replace(
            GenerationStats(), prompt_tokens=read, prefilled_tokens=read - 1, new_tokens=found.written
        )
        told = None if begun.logprobs is None else TokenLogprobs(ord(letter), -0.5, ((ord(letter), -0.5),))
        reason = "stop" if ends else "length" if found.written == found.limit else None
        if self._session.failure is not None:
            return TextDelta("", (ord(letter),), "stop", found.stats, (), self._session.failure)
        return TextDelta(ready, (ord(letter),), reason, found.stats, () if told is None else (told,))


class FakeTokenizer:
    settling = "at once"

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(map(ord, text))

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        return "".join(map(chr, token_ids))

    def drops(self, token_id: int, *, special: bool) -> bool:
        return False

    def byte_of(self, token_id: int) -> None:
        return None

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()


class FakeSession:
    """A model whose tokens are characters. What is put into `in_layer`, `in_round` and `fault_in_join` happens."""

    def __init__(self, places: int = 2, context: int = 100) -> None:
        self.places = places
        self.in_layer: Callable[[int], None] = lambda layer: None
        self.in_round: Callable[[], None] = lambda: None
        self.fault_in_join: Exception | None = None
        self.is_closed = False
        self.failure: str | None = None
        """Why an answer cannot go on: it ends with its first token then."""
        self.held = 1
        """Tokens whose text comes in one piece at the beginning."""
        self.numbers = 0
        self.schemas: list[dict[str, Any] | bool | None] = []
        """Of all answers that began."""
        plan = SimpleNamespace(
            sequences=places,
            resident_layers=1,
            streamed_layers=3,
            prediction=SimpleNamespace(tok_per_s=1.0),
        )
        self.description = SimpleNamespace(
            model_id="acme/Letters-1B",
            revision="abcdef",
            fingerprint="subspec-letters",
            exactness="exact",
            exactness_reason="letters",
            device="cpu",
            seed=7,
            context_tokens=context,
            config=Config(),
            plan=plan,
            budget_bytes=1000,
        )
        self.loaded = SimpleNamespace(
            tokenizer=FakeTokenizer(), math=SimpleNamespace(geometry=SimpleNamespace(vocab=0x110000))
        )
        self.made = FakeRounds(self)

    def __enter__(self) -> FakeSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed = True

    @property
    def plan(self) -> Any:
        return self.description.plan

    def rounds(self) -> FakeRounds:
        return self.made

    def begin_by(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingConfig,
        *,
        seed: int,
        choice: int,
        stop: Sequence[str],
        logprobs: int | None,
        schema: dict[str, Any] | bool | None,
    ) -> FakeBegun:
        if not prompt_ids:
            raise UsageError("the prompt is empty")
        if isinstance(schema, dict) and "$bad" in schema:
            raise UsageError("the schema cannot be followed: $bad")
        if "999999999" in dict(sampling.logit_bias):
            raise UsageError("the bias names no token")
        self.schemas.append(schema)
        return FakeBegun(tuple(prompt_ids), seed, choice, logprobs)

    def encode_messages(self, messages: Sequence[dict[str, str]], *, system: str | None = None) -> list[int]:
        return list(map(ord, messages[-1]["content"]))

    def take_request_number(self) -> int:
        self.numbers += 1
        return self.numbers

    def link_counters(self) -> StreamCounters:
        return StreamCounters()

    def memory_bytes(self) -> int:
        return 10

    def peak_memory_bytes(self) -> int:
        return 20


class Brake:
    """Holds every round in its first layer until it is released."""

    def __init__(self, session: FakeSession) -> None:
        self._released = threading.Event()
        self.reached = threading.Event()
        session.in_layer = self._hold

    def _hold(self, layer: int) -> None:
        self.reached.set()
        assert self._released.wait(LONG_S)

    def release(self) -> None:
        self._released.set()


class Exchange:
    """One request to an application, which runs beside the test."""

    def __init__(
        self, app: Any, method: str, path: str, body: bytes | Sequence[bytes], headers: dict[str, str]
    ) -> None:
        parts = [body] if isinstance(body, bytes) else list(body)
        self._parts = [
            {"type": "http.request", "body": part, "more_body": number < len(parts)}
            for number, part in enumerate(parts, start=1)
        ]
        self._left = asyncio.Event()
        self._changed = asyncio.Event()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.pieces: list[bytes] = []
        named = {"host": "127.0.0.1:8000", "content-type": "application/json", **headers}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path.partition("?")[0],
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in named.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
            "state": {},
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    def hold_body(self) -> None:
        """Never send the last part of the body."""
        self._parts.pop()

    async def _receive(self) -> dict[str, Any]:
        if self._parts:
            return self._parts.pop(0)
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        elif message.get("body"):
            self.pieces.append(message["body"])
        self._changed.set()

    def leave(self) -> None:
        """Close the connection."""
        self._left.set()

    async def comes(self, text: str) -> None:
        """Wait until a text was received."""
        async with asyncio.timeout(LONG_S):
            while text not in self.text:
                self._changed.clear()
                await self._changed.wait()

    async def ends(self) -> Exchange:
        """Wait until the application is done."""
        async with asyncio.timeout(LONG_S):
            await self.task
        return self

    @property
    def text(self) -> str:
        return b"".join(self.pieces).decode()

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def events(self) -> list[Any]:
        """The documents of a stream, and its last word."""
        lines = [line.removeprefix("data: ") for line in self.text.split("\n\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    @property
    def comments(self) -> list[str]:
        return [line for line in self.text.split("\n\n") if line.startswith(":")]


class Served:
    """An application over a session, with its service running."""

    def __init__(self, session: Any, *, most_waiting: int = 64, access: Access | None = None) -> None:
        self.session = session
        self.lines: list[str] = []
        self.may_load = threading.Event()
        self.service = AnswerService(self._open, most_waiting=most_waiting)
        self.app = make_app(self.service, access or Access(), self.lines.append)

    def _open(self) -> Any:
        assert self.may_load.wait(LONG_S)
        if isinstance(self.session, BaseException):
            raise self.session
        return self.session

    @contextmanager
    def running(self, *, loaded: bool = True) -> Iterator[Served]:
        """Start the service, and stop it at the end."""
        self.service.start()
        try:
            if loaded:
                self.may_load.set()
                until(lambda: self.service.session is not None)
            yield self
        finally:
            self.may_load.set()
            self.service.stop(at_once=True)
            self.service.thread.join(LONG_S)
        assert not self.service.thread.is_alive()

    def begin(
        self, path: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None
    ) -> Exchange:
        """Send a request."""
        is_raw = isinstance(body, bytes | tuple)
        raw = b"" if body is None else body if is_raw else json.dumps(body).encode()
        return Exchange(self.app, method or ("GET" if body is None else "POST"), path, raw, headers or {})

    def ask(self, path: str, body: Any = None, **how: Any) -> Exchange:
        """Send a request, and wait for the end of its response."""

        async def exchanged() -> Exchange:
            return await self.begin(path, body, **how).ends()

        return asyncio.run(exchanged())

    def ask_for_fault(self, path: str, body: Any = None, **how: Any) -> Exchange:
        """Send a request that the application fails at: it answers, and then raises for its server."""

        async def exchanged() -> Exchange:
            found = self.begin(path, body, **how)
            with suppress(Exception):
                await found.ends()
            return found

        return asyncio.run(exchanged())


class Sink:
    """Keeps what an answer gives."""

    def __init__(self) -> None:
        self.pieces: list[Any] = []
        self.ticket: Ticket | None = None

    def __call__(self, piece: Any) -> None:
        self.pieces.append(piece)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces if isinstance(piece, TextDelta))

    @property
    def last(self) -> str | None:
        """Finish reason, or the message of a failure; None while it goes on."""
        if not self.pieces:
            return None
        piece = self.pieces[-1]
        return piece.finish_reason if isinstance(piece, TextDelta) else piece.message
