"""Whether the hub answers at all: asked before a plan, which should not wait for a network that is not there."""

from __future__ import annotations

import socket
from threading import Thread
from typing import Final
from urllib.parse import urlsplit
from urllib.request import getproxies

from subspec_cli.errors import NetworkError
from subspec_cli.units import printable

_WAIT_S: Final = 1.0
_PORTS: Final = {"http": 80, "https": 443}


def check_reachable(model_id: str) -> None:
    """Raise NetworkError at once if the hub is switched off, or after a second if nobody takes a connection.

    Behind a proxy nothing is checked: only a request can tell.
    """
    from huggingface_hub import constants

    hint = "a plan also takes a directory with config.json alone, or the path of that file"
    if constants.HF_HUB_OFFLINE:
        name = printable(model_id)
        raise NetworkError(
            f"offline mode is set (HF_HUB_OFFLINE), and {name} is not whole in the cache", hint
        )
    endpoint = urlsplit(constants.ENDPOINT)
    if endpoint.scheme in getproxies() or not endpoint.hostname:
        return
    address = (endpoint.hostname, endpoint.port or _PORTS.get(endpoint.scheme, 443))
    if not _takes_connections(address):
        raise NetworkError(f"cannot reach {printable(constants.ENDPOINT)}", hint)


def _takes_connections(address: tuple[str, int]) -> bool:
    found: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=_WAIT_S).close()
        except OSError:
            return
        found.append(True)

    # In a thread, because a name server that does not answer is waited for without a limit of ours.
    thread = Thread(target=connect, name="hub-check", daemon=True)
    thread.start()
    thread.join(_WAIT_S)
    return bool(found)
