"""Outlining a model on the hub: kilobytes are read, nothing is written, and other files are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from checkpoints import framed, safetensors_bytes, tiny_config, tiny_tensors, write_checkpoint
from fake_hub import COMMIT, MODEL, Fault
from fakes_store import resolve_model

from subspec_cli.checkpoint.checkpoint import open_checkpoint
from subspec_cli.checkpoint.repository import read_repository
from subspec_cli.errors import AccessError, IntegrityError, NetworkError, UnsupportedModelError, UsageError
from subspec_cli.hub import model_outline
from subspec_cli.hub.model_outline import outline_model
from subspec_cli.hub.retry import RetryPolicy
from subspec_cli.reporter import Reporter

HASTY = RetryPolicy(tries=2, first_wait_s=0.01, stall_s=2.0)
SHARD = "model-00001-of-00002.safetensors"
SINGLE = "model.safetensors"


def outline(model=MODEL, revision=None):
    return outline_model(model, revision, reporter=Reporter(), retry_policy=HASTY)


def serve_large(server, layers=3, padding=4 << 20):
    """Serve one file of megabytes, and return its bytes."""
    tensors = tiny_tensors(layers=layers)
    tensors["model.embed_tokens.weight"] = ("BF16", (padding // 64, 32), bytes(padding))
    data = safetensors_bytes(tensors)
    config = json.dumps(tiny_config(layers=layers, vocab_size=padding // 64)).encode()
    kept = {name: content for name, content in server.files.items() if name.startswith("tokenizer")}
    server.files = kept | {"config.json": config, SINGLE: data}
    return data


def test_an_outline_of_two_shards_is_that_of_the_files(server, tmp_path, cache):
    found, local = outline(), open_checkpoint(tmp_path / "source")
    assert (found.model_id, found.commit) == (MODEL, COMMIT)
    ours = read_repository(local)
    placed = {
        name: replace(entry, path=tmp_path / "source" / entry.path)
        for name, entry in found.repository.tensors.items()
    }
    assert replace(found.repository, tensors=placed) == ours, "one decision for plan, prepare and run"
    assert found.tokenizer_bytes == sum(
        path.stat().st_size for path in (tmp_path / "source").glob("tokenizer*")
    )
    needed = server.files.keys() - {"README.md", "consolidated.safetensors", "pytorch_model.bin"}
    assert found.missing_bytes == sum(len(server.files[name]) for name in needed)
    assert not cache.exists()


def test_kilobytes_are_read_of_a_model_of_megabytes(server, cache):
    data = serve_large(server)
    found = outline()
    assert len(found.repository.tensors) == len(tiny_tensors())
    assert server.sent_bytes < 40 << 10 < len(data)
    assert found.received_bytes < 40 << 10
    assert [asked for name, asked in server.ranges if name == SINGLE] == ["bytes=0-32767"]
    assert not cache.exists()


def test_a_header_longer_than_the_first_range_is_read_to_its_end(server):
    data = serve_large(server, layers=60)
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    assert header_bytes > 64 << 10
    assert len(outline().repository.tensors) == len(tiny_tensors(layers=60))
    asked = [asked for name, asked in server.ranges if name == SINGLE]
    assert asked == ["bytes=0-32767", f"bytes=32768-{header_bytes - 1}"]


def test_a_server_without_ranges_is_left_after_the_header(server):
    server.has_ranges = False
    serve_large(server, layers=60, padding=64 << 20)
    server.bytes_per_s = 64e6
    assert len(outline().repository.tensors) == len(tiny_tensors(layers=60))
    assert server.sent_bytes < 16 << 20


def test_a_model_whole_in_the_cache_asks_nothing(server):
    resolve_model(MODEL)
    server.requests.clear()
    found = outline()
    assert (found.commit, found.missing_bytes, found.received_bytes) == (COMMIT, 0, 0)
    assert server.requests == []


def test_what_the_cache_holds_already_is_not_missing(server, cache):
    serve_large(server)
    whole = outline().missing_bytes
    resolve_model(MODEL)
    (cache / "models--org--tiny" / "snapshots" / COMMIT / SINGLE).unlink()
    assert outline().missing_bytes == len(server.files[SINGLE]) < whole


def test_a_directory_and_a_bad_revision(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("network used"))
    directory = write_checkpoint(tmp_path / "model")
    assert outline(str(directory)).commit == open_checkpoint(directory).fingerprint
    with pytest.raises(UsageError, match="has no revisions"):
        outline(str(directory), "main")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a git-lfs pointer"),
        (b"<!doctype html><html>log in</html>", "is an HTML page"),
        (b"\x01\x02", "has 2 bytes"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "claims a header of 1099511627776 bytes"),
        ((4000).to_bytes(8, "little") + b"{}", "claims a header of 4000 bytes but has only"),
        (framed("{}") + b"\0" * 100, r"should have \d+ bytes by its header"),
        (framed('{"a": 1, "a": 2}'), "has the key 'a' twice"),
        (b"", "has 0 bytes"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(server, content, message):
    serve_large(server)
    server.files[SINGLE] = content
    with pytest.raises(IntegrityError, match=message):
        outline()


def test_index_and_files_must_agree(server):
    index = json.loads(server.files["model.safetensors.index.json"])
    index["weight_map"]["model.norm.weight"] = SHARD
    index["weight_map"]["model.embed_tokens.weight"] = "model-00002-of-00002.safetensors"
    server.files["model.safetensors.index.json"] = json.dumps(index).encode()
    with pytest.raises(IntegrityError, match=r"lacks the tensor|which model.safetensors.index.json puts"):
        outline()
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    server.files["model.safetensors.index.json"] = json.dumps(index).encode()
    with pytest.raises(IntegrityError, match="no safetensors file inside the model directory"):
        outline()


def test_a_small_file_of_other_content_is_refused(server):
    server.served["config.json"] = server.files["config.json"].replace(b"qwen2", b"qwen9")
    with pytest.raises(IntegrityError, match=r"config.json arrived with the SHA-1"):
        outline()


def test_models_that_are_not_run_are_refused_before_their_headers_are_read(server):
    server.files["config.json"] = b'{"auto_map": {"a": "b"}}'
    with pytest.raises(UnsupportedModelError, match="remote code"):
        outline()
    assert server.fetched() == {"config.json"}


def test_a_model_without_tokenizer_or_safetensors_is_refused(server):
    files = server.files
    server.files = {name: data for name, data in files.items() if not name.startswith("tokenizer")}
    with pytest.raises(UnsupportedModelError, match="no tokenizer in org/tiny"):
        outline()
    server.files = {"config.json": files["config.json"], "pytorch_model.bin": b"x"}
    with pytest.raises(UnsupportedModelError, match="only pickle weights"):
        outline()


def test_refusals_are_those_of_prepare(server):
    server.answers[f"/api/models/{MODEL}"] = (403, {"X-Error-Code": "GatedRepo"}, b"")
    with pytest.raises(AccessError, match="is gated"):
        outline()
    server.answers[f"/api/models/{MODEL}"] = (503, {}, b"")
    with pytest.raises(NetworkError, match="answered 503"):
        outline()


def test_a_broken_connection_is_tried_again_and_then_reported(server):
    serve_large(server)
    server.faults[SINGLE] = Fault(times=1, after_bytes=1000)
    assert outline().repository.tensors
    server.faults[SINGLE] = Fault(times=9, after_bytes=1000)
    with pytest.raises(NetworkError, match="cannot reach"):
        outline()


def test_offline_with_a_cold_cache(server, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    notes = []
    with pytest.raises(NetworkError, match="offline mode is set"):
        outline_model(MODEL, reporter=Reporter(note=notes.append), retry_policy=HASTY)
    assert server.requests == []
    assert notes == [], "nothing is tried again: no wait changes the mode"


def test_small_files_are_bounded(server, monkeypatch):
    monkeypatch.setattr(model_outline, "MAX_CONFIG_BYTES", 10)
    with pytest.raises(IntegrityError, match="at most 10 are read"):
        outline()
