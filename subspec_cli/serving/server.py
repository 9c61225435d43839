"""Running the application: it listens before the model is loaded, and stops when it is told to."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from subspec_cli.serving.app import make_app
from subspec_cli.serving.gate import Access
from subspec_cli.serving.service import AnswerService, State

_LAST_WORDS_S: Final = 0.5
"""Time to hand out what the service says at a second signal."""
_MOST_SILENCE_S: Final = 30.0
"""Longest time between the start of a connection, or the end of a response, and a request's last header."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """The address as a browser takes it."""
        host = {"0.0.0.0": "localhost", "::": "localhost"}.get(self.host, self.host)  # noqa: S104 - only shown
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"


class _Connection(H11Protocol):
    """A connection that ends if no whole head of a request comes: half-sent ones would hold it for ever."""

    _silence: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._silence is not None:
            self._silence.cancel()

    def _await_request(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
        last = self.cycle
        self._silence = self.loop.call_later(
            _MOST_SILENCE_S, lambda: self.transport.close() if self.cycle is last else None
        )


class _Server(uvicorn.Server):
    """A server that stops its service first: answers in flight are finished, as long as the grace lasts."""

    def __init__(
        self, config: uvicorn.Config, service: AnswerService, log: Callable[[str], None], grace_s: float
    ) -> None:
        super().__init__(config)
        self._service = service
        self._log = log
        self._grace_s = grace_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at the first signal with grace, at the second at once."""
        again = self.should_exit
        super().handle_exit(sig, frame)
        threading.Thread(target=self._stop_at_once if again else self._stop, daemon=True).start()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop with grace also when the terminal is closed, unless that is ignored."""
        with super().capture_signals(), ExitStack() as stack:
            number = getattr(signal, "SIGHUP", None)  # not on Windows
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                stack.callback(signal.signal, number, signal.signal(number, self.handle_exit))
            yield

    def stop_when_failed(self) -> None:
        """End the server if its service has failed."""
        if self._service.state is State.FAILED:
            self.should_exit = True

    def _stop(self) -> None:
        if count := self._service.in_flight:
            self._log(
                f"stopping: {count} answers in flight have {self._grace_s:g} s; a second signal ends them"
            )
        self._service.stop()
        self._service.thread.join(self._grace_s)
        self._service.stop(at_once=True)

    def _stop_at_once(self) -> None:
        """Tell those in flight, and leave a moment later also if a client does not read or the model is loading."""
        self._service.stop(at_once=True)
        self._service.thread.join(_LAST_WORDS_S)
        time.sleep(_LAST_WORDS_S)
        self.force_exit = True


def run_server(
    service: AnswerService,
    access: Access,
    listener: socket.socket,
    log: Callable[[str], None],
    *,
    grace_s: float,
) -> None:
    """Serve until a signal comes, which is raised again at the end; raises what the service failed with."""
    app = make_app(service, access, log)
    config = uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        log_config=None,
        # Errors are logged by the application, in a line each.
        log_level="critical",
        access_log=False,
        server_header=False,
        lifespan="off",
        # The service tells everyone when its grace is over; a client that does not read has a moment more.
        timeout_graceful_shutdown=int(grace_s) + 5,
    )
    server = _Server(config, service, log, grace_s)
    watch = threading.Thread(target=_watch, args=(service, server), daemon=True)
    service.start()
    watch.start()
    try:
        server.run([listener])
    finally:
        service.stop(at_once=True)
        service.thread.join()
    if service.error is not None:
        raise service.error


def _watch(service: AnswerService, server: _Server) -> None:
    """End the server when its service fails."""
    service.thread.join()
    server.stop_when_failed()
