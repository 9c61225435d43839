"""What every HTTP request passes first: the names of hosts and origins, the key, and the size of its body.

A page from elsewhere may let a browser send requests to a server on this machine, under a name of its own that it
lets point here (DNS rebinding). So a request must name this server by an address, by `localhost` or by a name that
was allowed; one that says from which page it comes must come from this server's own or from one that was allowed.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from subspec_cli.serving.response_body import error_document

MOST_BODY_BYTES: Final = 16 << 20
MOST_BODY_S: Final = 120
"""Longest time that a request may take to arrive."""
_TOO_LARGE: Final = f"the request has more than {MOST_BODY_BYTES >> 20} MiB"
_OPEN_PATHS: Final = frozenset(("/", "/health", "/favicon.ico"))
"""What needs no key: nothing that says or does anything."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may ask."""

    api_key: str | None = None
    """None asks for none."""
    hosts: tuple[str, ...] = ()
    """Names of this server beside addresses and `localhost`."""
    origins: tuple[str, ...] = ()
    """Origins of pages beside this server's own; `*` is all."""


OnRefusal = Callable[[Scope, int], None]
"""Receives a request that was not let in, and the status of its answer."""


class Gate:
    """The middleware that lets requests in, or answers them with the reason."""

    def __init__(self, app: ASGIApp, access: Access, on_refusal: OnRefusal) -> None:
        self._app = app
        self._access = access
        self._on_refusal = on_refusal
        self._hosts = frozenset(name.lower() for name in (*access.hosts, "localhost"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            self._on_refusal(scope, refusal.status_code)
            # The page of an allowed origin can read why. A preflight that is refused must not be answered as allowed.
            answer = refusal if _is_preflight(scope) else with_cors(refusal, self._access)
            await answer(scope, receive, send)
            return
        await self._app(scope, _Body(receive).receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if not self._is_own(host):
            return _refused(
                403, f"this server is not called {host[:100]!r}: --allowed-host NAME allows a name"
            )
        origin = headers.get("origin")
        if origin is not None and not self._is_allowed(origin, host):
            return _refused(403, f"pages of {origin[:100]!r} may not ask: --cors-origin ORIGIN allows them")
        if scope["path"] not in _OPEN_PATHS and not _is_preflight(scope) and not self._has_key(headers):
            return _refused(401, "the API key is missing or wrong", code="invalid_api_key")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MOST_BODY_BYTES:
            return _refused(413, _TOO_LARGE)
        return None

    def _is_own(self, host: str) -> bool:
        name = _name_in(host)
        if name is None:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._hosts
        return True

    def _is_allowed(self, origin: str, host: str) -> bool:
        if "*" in self._access.origins or origin in self._access.origins:
            return True
        _, _, place = origin.partition("://")
        return place.lower() == host.lower()

    def _has_key(self, headers: dict[str, str]) -> bool:
        if self._access.api_key is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self._access.api_key.encode())
        return same and scheme.lower() == "bearer"


class Heads:
    """The middleware that answers HEAD as GET, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, send_without_body)


def with_cors(app: ASGIApp, access: Access) -> ASGIApp:
    """Return an application whose answers may be read by the pages of allowed origins."""
    return CORSMiddleware(app, access.origins, allow_methods=["*"], allow_headers=["*"])


class _Body:
    """The body of a request, with bounds on its size and on the time that it takes."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._left = MOST_BODY_BYTES
        self._is_whole = False
        self._end_s = time.monotonic() + MOST_BODY_S

    async def receive(self) -> Message:
        """Return the next part; raises HTTPException if it is too much or comes too late."""
        if self._is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self._end_s - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"the request is not whole after {MOST_BODY_S} s") from None
        self._is_whole = not message.get("more_body", False)
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise HTTPException(413, _TOO_LARGE)
        return message


def _is_preflight(scope: Scope) -> bool:
    names = {name for name, _ in scope["headers"]}
    return bool(scope["method"] == "OPTIONS" and b"access-control-request-method" in names)


def _name_in(host: str) -> str | None:
    """Return the name in a Host header, without its port; None if there is none."""
    try:
        found = urlsplit(f"//{host}")
        name, _ = found.hostname, found.port
    except ValueError:
        return None
    # Tabs and line ends are dropped while a URL is split.
    return name if found.netloc == host and found.username is None else None


def _refused(status: int, message: str, *, code: str | None = None) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    return JSONResponse(error_document(message, kind=kind, code=code), status, headers)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def named_hosts(host: str, allowed: Iterable[str]) -> tuple[str, ...]:
    """Return the names of a server that listens on `host`: what was allowed, and `host` itself if it is a name."""
    return tuple(dict.fromkeys((host, *allowed)))
