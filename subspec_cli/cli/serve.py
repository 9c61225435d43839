"""`subspec serve`: the OpenAI API and a page over one model."""

from __future__ import annotations

import os
import socket
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from subspec_cli.cli.completion import complete_model
from subspec_cli.cli.options import Settings, with_settings
from subspec_cli.cli.ray_options import check_ray
from subspec_cli.config import Config, DraftConfig, MemoryConfig, ModelConfig, SamplingConfig, ServeConfig
from subspec_cli.errors import ResourceError, UsageError
from subspec_cli.units import counted

if TYPE_CHECKING:
    from subspec_cli.cli.output import Output
    from subspec_cli.serving.server import Address
    from subspec_cli.session.session import Session

ServedArg = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="Hub id, local directory or demo.",
        show_default="the model used last",
        autocompletion=complete_model,
    ),
]
_KEY_VARIABLE = "SUBSPEC_API_KEY"


@with_settings(ServeConfig, ModelConfig, MemoryConfig, DraftConfig, SamplingConfig)
def serve(settings: Settings, model: ServedArg = None) -> None:  # noqa: ARG001 - it is config.model.model
    """Answer over HTTP as the OpenAI API does, with a page to talk to the model."""
    config = settings.config
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} is not installed", "pip install 'subspec-cli[serve]'")
    from subspec_cli.cli.answer_text import loading_line
    from subspec_cli.cli.output import Output

    check_ray(config.serve.ray, config.serve.replicas)
    key = config.serve.api_key or os.environ.get(_KEY_VARIABLE) or None
    _check_reach(config.serve, key)
    output = Output()
    output.note(loading_line(config, settings.file, "serve"))
    with _listening(config.serve) as listener:
        if config.serve.ray is None:
            _serve(config, key, listener, output)
            return
        port = listener.getsockname()[1]
    _serve_on_ray(config, key, port, output)


def _check_reach(serve: ServeConfig, key: str | None) -> None:
    """Refuse to answer anyone by accident."""
    from subspec_cli.serving.gate import is_loopback

    if key is not None and not (key.isascii() and key.isprintable()):
        raise UsageError(
            "the API key has characters that no header can carry", "take printable ASCII characters"
        )
    if key is None and not is_loopback(serve.host) and not serve.anyone:
        raise UsageError(
            f"--host {serve.host} lets other machines ask, and there is no key",
            f"set {_KEY_VARIABLE} or --api-key; --anyone asks for none",
        )


def _listening(serve: ServeConfig) -> socket.socket:
    """Return a socket that listens; raises UsageError or ResourceError if the address cannot be used."""
    try:
        found = socket.getaddrinfo(serve.host, serve.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UsageError(f"--host {serve.host}: {error.strerror or error}", "--host 127.0.0.1") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name != "nt":  # where it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
        listener.set_inheritable(False)
    except OSError as error:
        listener.close()
        raise ResourceError(
            f"cannot listen on {serve.host} port {serve.port}: {error.strerror}", "--port 0 takes a free port"
        ) from error
    return listener


def _serve(config: Config, key: str | None, listener: socket.socket, output: Output) -> None:
    from subspec_cli.cli.answer_text import session_lines
    from subspec_cli.reporter import Reporter
    from subspec_cli.serving.gate import Access, named_hosts
    from subspec_cli.serving.server import Address, run_server
    from subspec_cli.serving.service import AnswerService
    from subspec_cli.session import open_session

    serve = config.serve
    address = Address(serve.host, listener.getsockname()[1])
    output.note(f"listening on {address.url} while the model is loaded")

    def open_served() -> Session:
        reporter = Reporter(lambda _: service.check_wanted(), output.note)
        session = open_session(config, reporter, parallel=serve.parallel)
        for line in session_lines(session):
            output.note(line)
        output.note(_ready_line(address, session))
        return session

    service = AnswerService(open_served, most_waiting=serve.queue)
    access = Access(key, named_hosts(serve.host, serve.allowed_host), serve.cors_origin)
    run_server(service, access, listener, output.note, grace_s=serve.grace_s)


def _serve_on_ray(config: Config, key: str | None, port: int, output: Output) -> None:
    from subspec_cli.cli.ray_options import named_model, on_device
    from subspec_cli.serving.gate import Access, named_hosts
    from subspec_cli.serving.ray_cluster import ray_cluster
    from subspec_cli.serving.server import Address

    served, config = config.serve, named_model(config)
    access = Access(key, named_hosts(served.host, served.allowed_host), served.cors_origin)
    with ray_cluster(str(served.ray), served.replicas, config.memory.device) as cluster:
        from subspec_cli.serving.ray_serve import RayServer, ServeOrder

        order = ServeOrder(on_device(config, cluster.device), access)
        url, replicas = Address(served.host, port).url, counted(cluster.replicas, "replica")
        output.note(f"loading {replicas} on Ray ({served.ray})")
        RayServer(cluster, order, port, output.note).run(
            lambda: output.note(f"ready: {url} is a page, {url}v1 the API; {replicas} behind it")
        )


def _ready_line(address: Address, session: Session) -> str:
    at_a_time = counted(session.plan.sequences, "answer")
    return f"ready: {address.url} is a page, {address.url}v1 the API; {at_a_time} at a time"
