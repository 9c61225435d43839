"""Connections and addresses of the server, on loopback."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
import uvicorn
from fakes_serving import LONG_S
from uvicorn.server import ServerState

from subspec_cli.serving import server
from subspec_cli.serving.server import Address

WHOLE = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def exchanged(send: list[bytes], monkeypatch: pytest.MonkeyPatch, *, answer_s: float = 0.0) -> bytes:
    """What comes back over one connection until the server closes it; parts are sent with pauses between them."""
    monkeypatch.setattr(server, "_MOST_SILENCE_S", 0.2)

    async def app(scope: Any, receive: Any, respond: Any) -> None:
        await asyncio.sleep(answer_s)
        await respond({"type": "http.response.start", "status": 204, "headers": []})
        await respond({"type": "http.response.body", "body": b""})

    config = uvicorn.Config(app, http=server._Connection, lifespan="off", log_config=None)
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(
        lambda: server._Connection(config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    try:
        reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
        async with asyncio.timeout(LONG_S):
            for part in send:
                if not reader.at_eof():
                    writer.write(part)
                await asyncio.sleep(0.02)
            found = await reader.read()
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
    finally:
        listening.close()
        await listening.wait_closed()
    return found


@pytest.mark.parametrize("send", [[], [WHOLE[:20]], [bytes([byte]) for byte in WHOLE[:-1]]])
def test_a_connection_without_a_whole_head_is_closed(
    send: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asyncio.run(exchanged(send, monkeypatch)) == b""


def test_a_half_sent_head_after_a_response_is_closed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asyncio.run(exchanged([WHOLE, WHOLE[:20]], monkeypatch))
    assert found.count(b"HTTP/1.1 204") == 1


def test_an_answer_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asyncio.run(exchanged([WHOLE], monkeypatch, answer_s=0.5))
    assert found.count(b"HTTP/1.1 204") == 1


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80/"),
        ("0.0.0.0", "http://localhost:80/"),
        ("::", "http://localhost:80/"),
        ("::1", "http://[::1]:80/"),
    ],
)
def test_addresses_are_shown_as_a_browser_takes_them(host: str, url: str) -> None:
    assert Address(host, 80).url == url
