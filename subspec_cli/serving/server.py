"""Running the application: it listens before the model is loaded, and stops when it is told to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import uvicorn

from subspec_cli.serving.app import make_app
from subspec_cli.serving.gate import Access
from subspec_cli.serving.service import AnswerService, State


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
        if again:
            threading.Thread(target=self._service.stop, kwargs={"at_once": True}, daemon=True).start()
        else:
            threading.Thread(target=self._stop, daemon=True).start()

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
        log_config=None,
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
