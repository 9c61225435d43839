"""A hub on 127.0.0.1: the endpoints that the hub library and the downloads use, and ways to make them fail."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "org/tiny"


def git_sha1(data: bytes) -> str:
    """Git's hash of a content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Fault:
    """What the next GETs of one file get instead of the full answer."""

    times: int = 1
    status: int = 0
    """Sent at once, with `headers` and no body."""
    headers: dict[str, str] = field(default_factory=dict)
    after_bytes: int | None = None
    """The connection is reset after this many bytes of the body ..."""
    stall_s: float = 0.0
    """... and stays silent for this long before the reset."""


class FakeHub(ThreadingHTTPServer):
    """Serves one repository; files whose names end in .safetensors are large (LFS) ones, named by SHA-256."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.files = files or {}
        self.served: dict[str, bytes] = {}
        """Sent in place of the announced content."""
        self.announced: dict[str, dict[str, str]] = {}
        """Headers by file name that replace the true ones."""
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        """Replaces an answer by path suffix: (status, headers, body)."""
        self.faults: dict[str, Fault] = {}
        """By file name."""
        self.head_faults: dict[str, Fault] = {}
        """By path suffix; of HEAD and of the model's listing."""
        self.commit = COMMIT
        self.storage: FakeHub | None = None
        """Another server, to which large files are redirected."""
        self.has_ranges = True
        self.bytes_per_s: float | None = None
        """Highest rate of each connection."""
        self.requests: list[str] = []
        self.ranges: list[tuple[str, str]] = []
        """(file name, Range) of every GET of a file."""
        self.authorized: list[str] = []
        """Paths that were requested with a token."""
        self.sent_bytes = 0
        self.on_get = lambda name: None
        """Called before a file is sent."""
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> set[str]:
        return {name for name, _ in self.ranges}

    def count(self, size: int) -> None:
        with self._lock:
            self.sent_bytes += size

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """Ignore errors: clients may disconnect."""

    def etag(self, name: str) -> str:
        data = self.files[name]
        return hashlib.sha256(data).hexdigest() if is_large(name) else git_sha1(data)


def is_large(name: str) -> bool:
    return name.endswith(".safetensors")


@contextmanager
def running(hub: FakeHub):
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()


class FakeHubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def setup(self) -> None:
        super().setup()
        # A small buffer: bytes in it when a client is killed would count as downloaded.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)

    def log_message(self, *args) -> None:
        return

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def respond(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        if self.headers.get("Authorization"):
            hub.authorized.append(path)
        if (spoilt := self.spoilt(path)) is not None:
            return self.send(*spoilt)
        if path in (
            f"/api/models/{MODEL}",
            *(f"/api/models/{MODEL}/revision/{r}" for r in ("main", hub.commit)),
        ):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
            return self.send_json({"id": MODEL, "sha": hub.commit, "siblings": siblings})
        for revision in (hub.commit, "main"):
            if path.startswith(f"/{MODEL}/resolve/{revision}/"):
                return self.send_file(path.removeprefix(f"/{MODEL}/resolve/{revision}/"))
        if path.startswith("/storage/"):
            return self.send_content(path.removeprefix("/storage/"), {"ETag": '"of-the-storage"'})
        if path.startswith(f"/api/models/{MODEL}/revision/"):
            return self.send(404, {"X-Error-Code": "RevisionNotFound"}, b"")
        return self.send(404, {"X-Error-Code": "RepoNotFound"}, b"")

    def spoilt(self, path: str) -> tuple[int, dict[str, str], bytes] | None:
        """The answer that a test put in place of the real one."""
        for suffix, answer in self.server.answers.items():
            if path.endswith(suffix):
                return answer
        for suffix, fault in self.server.head_faults.items():
            if path.endswith(suffix) and fault.times > 0 and (self.command == "HEAD" or "/api/" in path):
                fault.times -= 1
                return fault.status, fault.headers, b""
        return None

    def send_file(self, name: str) -> None:
        hub = self.server
        if name not in hub.files:
            return self.send(404, {"X-Error-Code": "EntryNotFound"}, b"")
        headers = {"X-Repo-Commit": hub.commit}
        if not is_large(name):
            headers["ETag"] = f'"{hub.etag(name)}"'
        else:
            headers["X-Linked-Etag"] = f'"{hub.etag(name)}"'
            headers["X-Linked-Size"] = str(len(hub.files[name]))
        headers |= hub.announced.get(name, {})
        if is_large(name) and hub.storage is not None:
            location = {"Location": f"{hub.storage.url}/storage/{quote(name)}"}
            return self.send(302, headers | location, b"")
        return self.send_content(name, headers)

    def send_content(self, name: str, headers: dict[str, str]) -> None:
        hub = self.server
        data = hub.served.get(name, hub.files[name])
        if self.command == "HEAD":
            return self.send(200, headers, data)
        asked = self.headers.get("Range", "")
        hub.ranges.append((name, asked))
        hub.on_get(name)
        fault = hub.faults.get(name)
        if fault is not None and fault.times > 0:
            fault.times -= 1
            if fault.status:
                return self.send(fault.status, fault.headers, b"")
        else:
            fault = None
        status = 200
        if asked and hub.has_ranges:
            first, last = asked.removeprefix("bytes=").split("-")
            if int(first) >= len(data):
                return self.send(416, {"Content-Range": f"bytes */{len(data)}"}, b"")
            status, total, data = 206, len(data), data[int(first) : int(last) + 1]
            headers = headers | {"Content-Range": f"bytes {first}-{int(first) + len(data) - 1}/{total}"}
        return self.send(status, headers, data, fault)

    def send_json(self, value) -> None:
        self.send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def send(self, status: int, headers: dict[str, str], body: bytes, fault: Fault | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        whole = body if fault is None else body[: fault.after_bytes]
        hub, step = self.server, 32 << 10
        for start in range(0, len(whole), step):
            piece = whole[start : start + step]
            self.wfile.write(piece)
            hub.count(len(piece))
            if hub.bytes_per_s:
                time.sleep(len(piece) / hub.bytes_per_s)
        if fault is not None:
            self.wfile.flush()
            time.sleep(fault.stall_s)
            self.close_connection = True
            # Without lingering, closing a socket is a reset, as by a router that forgot the connection.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
