"""Stand-ins for the store's tests: a hub on 127.0.0.1, a quantizer that counts, ready-made manifests."""

from __future__ import annotations

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from subspec_cli.store import prepare
from subspec_cli.store.checkpoint import open_checkpoint
from subspec_cli.store.hub import ResolvedModel
from subspec_cli.store.manifest import Manifest, SubstituteSettings
from subspec_cli.store.prepared import prepared_directory
from subspec_cli.store.quality import MatrixQuality

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "org/tiny"
LAYERS = 3
SETTINGS = SubstituteSettings(4, "minmax")
SHA256 = "a" * 64


class FakeHub(ThreadingHTTPServer):
    """Serves one repository; `answers` replaces an answer by path suffix: (status, headers, body)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.files: dict[str, bytes] = {}
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> set[str]:
        return {
            line.split("/")[-1] for line in self.requests if line.startswith("GET") and "/resolve/" in line
        }


class FakeHubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *args) -> None:
        return

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        for suffix, (status, headers, body) in self.server.answers.items():
            if path.endswith(suffix):
                return self.send(status, headers, body)
        files = self.server.files
        siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        if path in (f"/api/models/{MODEL}", *(f"/api/models/{MODEL}/revision/{r}" for r in ("main", COMMIT))):
            return self.send_json({"id": MODEL, "sha": COMMIT, "siblings": siblings})
        if path == f"/api/models/{MODEL}/tree/{COMMIT}":
            return self.send_json(
                [
                    {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for n, d in files.items()
                ]
            )
        if path.startswith(f"/{MODEL}/resolve/{COMMIT}/"):
            data = files[path.split("/")[-1]]
            return self.send(
                200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, data
            )
        if path.startswith(f"/api/models/{MODEL}/revision/"):
            return self.send(404, {"X-Error-Code": "RevisionNotFound"}, b"")
        return self.send(404, {"X-Error-Code": "RepoNotFound"}, b"")

    def send_json(self, value) -> None:
        self.send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Quantizer:
    """Keeps the top byte of each bf16; counts its calls, and fails at one of them."""

    def __init__(self, fail_at: int = -1, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.calls = 0
        self.fail_at = fail_at
        self.error = error

    def __call__(self, tensors):
        import torch

        self.calls += 1
        if self.calls - 1 == self.fail_at:
            raise self.error
        assert "self_attn.q_proj.weight" in tensors
        assert "input_layernorm.weight" in tensors
        made = {f"{name}.top": tensor.flatten().view(torch.uint8)[1::2] for name, tensor in tensors.items()}
        return made, {"q": MatrixQuality(1024, 512, 40.0, 0.25)}


def run(model: ResolvedModel, quantizer=None, *, bits=8, checkpoint=None, seen=None, **changes):
    fixed = {
        "layer_count": LAYERS,
        "dtype": "bfloat16",
        "group_size": 128,
        "versions": {"torch": "2.13.0"},
        "force": False,
        "progress": (seen if seen is not None else []).append,
    }
    return prepare.prepare_model(
        model,
        checkpoint or open_checkpoint(model.directory),
        SubstituteSettings(bits, "minmax"),
        quantizer or Quantizer(),
        **(fixed | changes),
    )


def place_of(model: ResolvedModel, bits=8) -> Path:
    return prepared_directory(model.model_id, model.commit, SubstituteSettings(bits, "minmax"))


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != ".lock"}


def manifest_of(model_id="org/tiny", *, layers=(), settings=SETTINGS, **more) -> Manifest:
    fields = {
        "source_directory": "/models/tiny",
        "commit": "c" * 40,
        "fingerprint": "f" * 40,
        "source_stamp": "",
        "dtype": "bfloat16",
        "group_size": 128,
        "tool_version": "0.1.0",
        "library_versions": {"torch": "2.13.0"},
    }
    return Manifest(model_id=model_id, settings=settings, layers=tuple(layers), **(fields | more))
