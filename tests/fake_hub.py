"""A hub on 127.0.0.1: the endpoints that the hub library and the downloads use, and ways to make them fail."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
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


Proxy = Callable[["FakeHubHandler", int, dict[str, str], bytes], tuple[int, dict[str, str], bytes]]
"""From (request, status, headers, body) to what is sent: status, headers (an empty one is left out) and body."""


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
        self.proxy: Proxy | None = None
        """Changes the answers about files, as a mirror or a proxy does."""
        self.lists_hashes = False
        self.lists_sizes = True
        self.commit = COMMIT
        self.datasets: dict[str, str] = {}
        """Commits by `datasets/` and a dataset's name; their files are those of `files`."""
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
            siblings = [self.listed(name) for name in hub.files]
            return self.send_json({"id": MODEL, "sha": hub.commit, "siblings": siblings})
        for repository, commit in {MODEL: hub.commit, **hub.datasets}.items():
            for start in (f"/{repository}/resolve/{revision}/" for revision in (commit, "main")):
                if path.startswith(start):
                    return self.send_file(path.removeprefix(start), commit)
        if path.startswith("/storage/"):
            return self.send_content(path.removeprefix("/storage/"), {"ETag": '"of-the-storage"'})
        if path.startswith(f"/api/models/{MODEL}/revision/"):
            return self.send(404, {"X-Error-Code": "RevisionNotFound"}, b"")
        return self.send(404, {"X-Error-Code": "RepoNotFound"}, b"")

    def listed(self, name: str) -> dict[str, object]:
        """One file in the listing."""
        hub, size = self.server, len(self.server.files[name])
        size_fields = {"size": size} if hub.lists_sizes else {}
        if not hub.lists_hashes:
            return {"rfilename": name, **size_fields}
        lfs = {"lfs": {"size": size, "sha256": hub.etag(name), "pointerSize": 134}} if is_large(name) else {}
        return {
            "rfilename": name,
            "blobId": git_sha1(hub.files[name]) if not lfs else "0" * 40,
            **size_fields,
            **lfs,
        }

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

    def send_file(self, name: str, commit: str) -> None:
        hub = self.server
        if name not in hub.files:
            return self.send(404, {"X-Error-Code": "EntryNotFound"}, b"")
        headers = {"X-Repo-Commit": commit}
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
        if self.server.proxy is not None and "/api/" not in self.path:
            status, headers, body = self.server.proxy(self, status, headers, body)
        is_chunked = headers.get("Transfer-Encoding") == "chunked"
        length = {} if is_chunked else {"Content-Length": str(len(body))}
        self.send_response(status)
        for name, value in (length | headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        whole = body if fault is None else body[: fault.after_bytes]
        hub, step = self.server, 32 << 10
        for start in range(0, len(whole), step):
            piece = whole[start : start + step]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if is_chunked else piece)
            hub.count(len(piece))
            if hub.bytes_per_s:
                time.sleep(len(piece) / hub.bytes_per_s)
        if is_chunked and fault is None:
            self.wfile.write(b"0\r\n\r\n")
        if fault is not None:
            self.wfile.flush()
            time.sleep(fault.stall_s)
            self.close_connection = True
            # Without lingering, closing a socket is a reset, as by a router that forgot the connection.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
