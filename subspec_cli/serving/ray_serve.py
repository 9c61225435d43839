"""The HTTP application as a deployment of Ray Serve: its proxy spreads requests over replicas of one model."""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import ray
from ray import serve
from ray.exceptions import RayError

from subspec_cli.config import Config
from subspec_cli.errors import ResourceError, SubspecError
from subspec_cli.serving.gate import Access
from subspec_cli.serving.ray_cluster import LOCAL, Cluster
from subspec_cli.serving.replica import Place, Share, open_replica, this_place
from subspec_cli.serving.replica_shares import Placement
from subspec_cli.units import printable

if TYPE_CHECKING:
    from subspec_cli.session.session import Session

_NAME: Final = "subspec"
_POLL_S: Final = 0.5
_FACTS_AT_A_TIME: Final = 16
"""Requests beside those for answers, such as `/health`, that a replica takes at a time."""


@dataclass(frozen=True, slots=True)
class ServeOrder:
    """What all replicas of a server are opened with."""

    config: Config
    """With a name of the model, and with a device."""
    access: Access


class Desk:
    """The one actor that knows all replicas of a server: whose turn it is to load, what to log, what failed."""

    def __init__(self, config: Config, replicas: int, wanted_threads: str | None) -> None:
        self._placement = Placement(config, replicas, wanted_threads)
        self._lines: list[str] = []
        self._error: SubspecError | None = None

    def place(self, replica: str, place: Place) -> None:
        """Note where a replica is; one that takes the place of a dead one is told apart by its id."""
        self._lines += self._placement.place(replica, place)
        self._placement.forget_one_beyond(replica)

    def share(self, replica: str) -> Share | None:
        """Return what a replica loads the model with; None while it waits for its turn."""
        return self._placement.share(replica)

    def loaded(self, replica: str) -> None:
        """Note that a replica answers."""
        self._placement.loaded(replica)

    def failed(self, replica: str, error: SubspecError) -> None:
        """Note why a replica could not load the model."""
        self._placement.lost(replica)
        self._error = error
        self._lines.append(f"a replica could not be started: {error.message}")

    def log(self, line: str) -> None:
        """Take a line for the command's log."""
        self._lines.append(line)

    def take_lines(self) -> list[str]:
        """Hand out the lines that have come."""
        lines, self._lines = self._lines, []
        return lines

    def error(self) -> SubspecError | None:
        """Return why the last replica that failed did."""
        return self._error


class ServedReplica:
    """One replica of the server: a service and the application over it."""

    def __init__(self, order: ServeOrder, desk: Any) -> None:  # noqa: ANN401 - an actor of Ray
        from subspec_cli.serving.service import AnswerService

        self._order = order
        self._desk = desk
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._log, daemon=True).start()
        self._id = serve.get_replica_context().replica_id.unique_id
        self._service = AnswerService(self._open, most_waiting=order.config.serve.queue)
        self._service.start()
        while self._service.thread.is_alive() and self._service.session is None:
            time.sleep(0.05)
        if self._service.error is not None:
            if isinstance(self._service.error, SubspecError):
                ray.get(desk.failed.remote(self._id, self._service.error))
            raise self._service.error

    def __serve_build_asgi_app__(self) -> Callable[..., Awaitable[None]]:
        """Return the application, for Ray Serve."""
        from subspec_cli.serving.app import make_app

        return make_app(self._service, self._order.access, self._lines.put)

    def check_health(self) -> None:
        """Let Ray Serve replace a replica whose service has failed."""
        if self._service.error is not None:
            raise self._service.error

    def __del__(self) -> None:
        """End the service: Ray Serve has waited for the requests that were open."""
        self._service.stop(at_once=True)

    def _log(self) -> None:
        """Pass lines on. Ray would cancel what the handler of a cancelled request sends, so this thread does it."""
        while True:
            ray.get(self._desk.log.remote(self._lines.get()))

    def _open(self) -> Session:
        from subspec_cli.reporter import Reporter

        began_s, desk, host = time.monotonic(), self._desk, printable(socket.gethostname())
        ray.get(desk.place.remote(self._id, this_place()))
        while (share := ray.get(desk.share.remote(self._id))) is None:
            time.sleep(_POLL_S)
        reporter = Reporter(note=lambda text: self._lines.put(f"note: {host}: {text}"))
        session = open_replica(share, None, self._order.config.serve.parallel, reporter)
        about = session.description
        ray.get(desk.loaded.remote(self._id))
        self._lines.put(
            f"a replica of {about.model_id} is ready on {host} after {time.monotonic() - began_s:.1f} s: "
            f"{about.device} {about.dtype}, context {about.context_tokens:,} tokens, {about.exactness}, "
            f"{about.plan.resident_layers} resident + {about.plan.streamed_layers} streamed layers"
        )
        return session


class RayServer:
    """A server on Ray Serve. Use `run` once, in a cluster that was joined."""

    def __init__(self, cluster: Cluster, order: ServeOrder, port: int, log: Callable[[str], None]) -> None:
        self._cluster = cluster
        self._order = order
        self._port = port
        self._log = log
        self._stopped = threading.Event()

    def run(self, ready: Callable[[], None]) -> None:
        """Serve until an interrupt; raises what a replica failed with while the first ones were loaded."""
        desk = (
            ray.remote(Desk)
            .options(num_cpus=0)
            .remote(self._order.config, self._cluster.replicas, os.environ.get("OMP_NUM_THREADS"))
        )
        passing = threading.Thread(target=self._pass_on, args=(desk,), daemon=True)
        passing.start()
        try:
            self._deploy(desk)
            ready()
            while True:
                time.sleep(_POLL_S)
        finally:
            serve.delete(_NAME)  # answers in flight are finished, as long as the grace lasts
            if self._order.config.serve.ray == LOCAL:  # on a cluster Serve may have other applications
                serve.shutdown()
            self._stopped.set()
            passing.join()

    def _deploy(self, desk: Any) -> None:  # noqa: ANN401 - an actor of Ray
        settings, options = self._order.config.serve, self._cluster.actor_options
        del options["scheduling_strategy"]  # Ray Serve spreads replicas itself
        deployment = serve.deployment(serve.ingress()(ServedReplica)).options(
            name=_NAME,
            num_replicas=self._cluster.replicas,
            ray_actor_options=options,
            # The service refuses with 429 what is beyond its queue; Ray must not hold it back before.
            max_ongoing_requests=settings.parallel + settings.queue + _FACTS_AT_A_TIME,
            graceful_shutdown_timeout_s=settings.grace_s,
            max_constructor_retry_count=1,
        )
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # the command says itself what it does
        serve.start(proxy_location="HeadOnly", http_options={"host": settings.host, "port": self._port})
        try:
            serve.run(deployment.bind(self._order, desk), name=_NAME, route_prefix="/")
        except RuntimeError as error:
            raise ray.get(desk.error.remote()) or ResourceError(
                f"Ray Serve could not start the replicas: {printable(str(error))[:300]}",
                "the log of the node says why",
            ) from error

    def _pass_on(self, desk: Any) -> None:  # noqa: ANN401 - an actor of Ray
        while True:
            is_last = self._stopped.wait(_POLL_S)
            try:
                lines = ray.get(desk.take_lines.remote())
            except RayError:
                return
            for line in lines:
                self._log(line)
            if is_last:
                return
