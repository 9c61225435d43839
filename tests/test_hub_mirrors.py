"""Mirrors and proxies that leave headers out or change them: it works, or the header that lacks is named."""

from __future__ import annotations

import gzip
import hashlib
import re

import pytest
from checkpoints import write_checkpoint
from fake_hub import COMMIT, MODEL, FakeHub, Fault, running
from fakes_store import HASTE, LAYERS, resolve_model

from subspec_cli.errors import ExitCode, NetworkError
from subspec_cli.hub.model_outline import outline_model
from subspec_cli.reporter import Reporter

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def hub(server, tmp_path):
    """Shards of more than one first piece (256 KiB); one connection breaks."""
    source = write_checkpoint(tmp_path / "large", layers=LAYERS, hidden=128, shards=2)
    server.files = {path.name: path.read_bytes() for path in source.iterdir()}
    server.faults = {ONE: Fault(times=2, after_bytes=270_000)}
    return server


def without(*names):
    return lambda request, status, headers, body: (status, headers | dict.fromkeys(names, ""), body)


def tagged(change):
    """Plain ETags alone, changed."""

    def proxy(request, status, headers, body):
        tag = (headers.get("X-Linked-Etag") or headers.get("ETag", "")).strip('"')
        return (
            status,
            without("X-Linked-Etag")(request, status, headers, body)[1] | {"ETag": change(tag)},
            body,
        )

    return proxy


def in_chunks(request, status, headers, body):
    return status, headers | {"Transfer-Encoding": "chunked", "X-Linked-Size": ""}, body


def compressed(request, status, headers, body):
    """All at once, whatever range was asked for, with another length."""
    if status == 206:
        name = request.path.rpartition("/")[2]
        status, body = 200, request.server.files[name]
    if status != 200:
        return status, headers, body
    changed = {"Content-Encoding": "gzip", "ETag": '"abc-gzip"', "Content-Range": "", "X-Linked-Etag": ""}
    return status, headers | changed | {"X-Linked-Size": ""}, gzip.compress(body)


def whole(request):
    return request.server.files[request.path.rpartition("/")[2]]


def never_ranges(request, status, headers, body):
    if status != 206:
        return status, headers, body
    return 200, headers | {"Content-Range": ""}, whole(request)


def refuses_ranges(request, status, headers, body):
    return (416, headers | {"Content-Range": ""}, b"") if status == 206 else (status, headers, body)


def other_range(first, total="*", unit="bytes"):
    """Answers of another range than the one asked for."""

    def proxy(request, status, headers, body):
        if status != 206:
            return status, headers, body
        asked = int(request.headers["Range"].removeprefix("bytes=").split("-")[0])
        data = whole(request)[first(asked) :]
        text = f"{unit} {first(asked)}-{first(asked) + len(data) - 1}/{total}"
        return 206, headers | {"Content-Range": text}, data

    return proxy


def no_head(request, status, headers, body):
    return (405, {}, b"") if request.command == "HEAD" else (status, headers, body)


def redirected(request, status, headers, body):
    """To a path on the same host, as after a model was renamed."""
    if "moved" in request.path:
        return status, headers, body
    return 307, {"Location": f"{request.path}?moved=1"}, b""


LISTED = {
    "no commit": without("X-Repo-Commit"),
    "no tags": without("X-Linked-Etag", "X-Linked-Size", "ETag", "X-Repo-Commit"),
    "tags of MD5": tagged(lambda tag: f'"{tag[:32]}"'),
    "tags of MD5 in parts": tagged(lambda tag: f'"{tag[:32]}-7"'),
    "SHA-1 as tags": tagged(lambda tag: "f" * 40),
    "compressed": compressed,
    "no HEAD": no_head,
}
"""What works because the listing has sizes and hashes."""
SHOWN = {
    "weak": tagged(lambda tag: f'W/"{tag}"'),
    "no quotes": tagged(lambda tag: tag),
    "gzip suffix": tagged(lambda tag: f'W/"{tag}-gzip"'),
    "chunks": in_chunks,
    "200 to ranges": never_ranges,
    "416 to ranges": refuses_ranges,
    "range from the beginning": other_range(lambda asked: 0),
    "range in blocks": other_range(lambda asked: asked - asked % 65536),
    "range from later on": other_range(lambda asked: asked + 10),
    "range without Content-Range": without("Content-Range"),
    "range in other words": other_range(lambda asked: asked, unit="octets"),
    "relative redirect": redirected,
}
"""What works with the headers that are there."""


def check_works(hub, cache):
    directory = resolve_model(MODEL).directory
    assert sorted(path.name for path in directory.iterdir()) == sorted(hub.files)
    for path in directory.iterdir():
        assert path.read_bytes() == hub.files[path.name]
        assert path.resolve().name == hub.etag(path.name)
    blobs = list((cache / "models--org--tiny" / "blobs").iterdir())
    assert len(blobs) == len(hub.files)


@pytest.mark.parametrize("proxy", LISTED.values(), ids=LISTED.keys())
def test_what_the_listing_says_is_enough(hub, cache, proxy):
    hub.proxy, hub.lists_hashes = proxy, True
    check_works(hub, cache)


@pytest.mark.parametrize("proxy", SHOWN.values(), ids=SHOWN.keys())
def test_headers_in_other_forms(hub, cache, proxy):
    hub.proxy = proxy
    check_works(hub, cache)


def test_a_relative_redirect_keeps_the_token_and_another_host_does_not_get_it(hub, cache, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.proxy = redirected
    with running(FakeHub(hub.files)) as storage:
        hub.storage = storage
        check_works(hub, cache)
        assert storage.fetched() == {ONE, TWO}
        assert storage.authorized == []
    assert all(f"/{MODEL}/resolve/{COMMIT}/{name}" in hub.authorized for name in hub.files)


@pytest.mark.parametrize(
    ("proxy", "message"),
    [
        (without("ETag", "X-Linked-Etag"), "no usable ETag for config.json, and its listing lacks the hash"),
        (LISTED["tags of MD5"], "no usable ETag for config.json"),
        (in_chunks, "no usable Content-Length for config.json, and its listing lacks the size"),
        (
            lambda request, status, headers, body: (status, headers | {"Content-Encoding": "lzma"}, body),
            "config.json comes with Content-Encoding lzma",
        ),
    ],
    ids=["no tags", "tags of MD5", "chunks", "unknown encoding"],
)
def test_what_lacks_is_named(hub, cache, proxy, message):
    hub.proxy = proxy
    hub.lists_sizes = "lzma" in message
    with pytest.raises(NetworkError, match=re.escape(message)) as caught:
        resolve_model(MODEL)
    assert caught.value.exit_code == ExitCode.NETWORK
    assert "HF_ENDPOINT" in caught.value.hint
    assert not list(cache.rglob("blobs/*"))


def test_a_login_page_is_told_from_a_file_although_the_listing_is_good(hub):
    hub.lists_hashes = True
    page = b"<html>please log in</html>"
    hub.answers[ONE] = (200, {"Content-Type": "text/html"}, page)
    with pytest.raises(NetworkError, match=f"does not answer like a Hugging Face hub: {ONE} is a web page"):
        resolve_model(MODEL)


def test_an_outline_is_made_of_a_mirror_too(hub):
    hub.proxy, hub.lists_hashes, hub.faults = LISTED["no tags"], True, {}
    outline = outline_model(MODEL, None, reporter=Reporter(), retry_policy=HASTE)
    assert outline.commit == COMMIT


def test_a_partial_file_that_is_complete_is_not_asked_for(hub, cache):
    """Killed between the last byte and the rename. A request would be answered by 416."""
    blobs = cache / "models--org--tiny" / "blobs"
    blobs.mkdir(parents=True)
    tag = hashlib.sha256(TWO.encode()).hexdigest()[:8]
    (blobs / f"{hub.etag(TWO)}.{tag}.subspec.incomplete").write_bytes(hub.files[TWO])
    check_works(hub, cache)
    assert TWO not in hub.fetched()


def test_a_listing_that_is_redirected_on_its_host(hub, cache):
    hub.answers[f"/api/models/{MODEL}"] = (307, {"Location": f"/api/models/{MODEL}/revision/main"}, b"")
    check_works(hub, cache)
