"""The real hub library against a hub of our own on 127.0.0.1."""

from __future__ import annotations

import pytest
from checkpoints import as_hub_snapshot, write_checkpoint
from fake_hub import COMMIT, MODEL
from fakes_store import resolve_model

from subspec_cli.checkpoint.checkpoint import open_checkpoint
from subspec_cli.errors import (
    AccessError,
    ExitCode,
    IntegrityError,
    NetworkError,
    ResourceError,
    UnsupportedModelError,
    UsageError,
)
from subspec_cli.hub import model_name
from subspec_cli.hub.cache import repo_cache
from subspec_cli.hub.source_model import find_source_directory


def test_downloads_what_the_model_needs_and_nothing_else(server, cache):
    resolved = resolve_model(MODEL)
    assert (resolved.model_id, resolved.commit, resolved.is_local) == (MODEL, COMMIT, False)
    assert resolved.directory == cache / "models--org--tiny" / "snapshots" / COMMIT
    open_checkpoint(resolved.directory)
    assert server.fetched() == set(server.files) - {
        "README.md",
        "consolidated.safetensors",
        "pytorch_model.bin",
    }
    assert find_source_directory(MODEL, COMMIT) == resolved.directory


def test_second_time_fetches_nothing_and_a_commit_asks_nothing(server):
    first = resolve_model(MODEL, "main")
    server.ranges.clear()
    assert resolve_model(MODEL, "main") == first
    assert not server.fetched()
    server.requests.clear()
    assert resolve_model(MODEL, COMMIT) == first
    assert server.requests == []


def test_single_file_model(server, tmp_path):
    source = write_checkpoint(tmp_path / "single")
    server.files = {path.name: path.read_bytes() for path in source.iterdir()} | {
        "model-extra.safetensors": b"x"
    }
    open_checkpoint(resolve_model(MODEL).directory)
    assert "model-extra.safetensors" not in server.fetched()


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        ((401, {"X-Error-Code": "RepoNotFound"}, b""), AccessError, "not found on the hub, or is private"),
        ((404, {}, b""), AccessError, "was not found on the hub"),
        ((403, {"X-Error-Code": "GatedRepo"}, b""), AccessError, "is gated and you are not logged in"),
        ((403, {}, b"nope"), AccessError, r"refuses org/tiny \(403\): you are not logged in"),
        ((403, {"X-Error-Message": "Access to this resource is disabled."}, b""), AccessError, "disabled"),
        ((404, {"X-Error-Code": "RevisionNotFound"}, b""), UsageError, "org/tiny has no revision main"),
        ((429, {"Retry-After": "3600"}, b""), NetworkError, "answered 429, asks to wait 3600 s"),
        ((503, {}, b"\x1b[2J"), NetworkError, "http://127.0.0.1:.* answered 503"),
        ((200, {"Content-Type": "text/html"}, b"<html></html>"), NetworkError, "answer like a Hugging Face"),
    ],
)  # fmt: skip
def test_refusals_before_anything_is_kept(server, cache, answer, kind, message):
    server.answers[f"/api/models/{MODEL}"] = answer
    with pytest.raises(kind, match=message) as caught:
        resolve_model(MODEL)
    assert "\x1b" not in caught.value.message
    assert caught.value.hint
    assert not cache.exists()


def test_wrong_token_is_reported_by_its_source_never_its_value(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.answers[f"/api/models/{MODEL}"] = (
        401,
        {"X-Error-Message": "Invalid credentials in Authorization header"},
        b"",
    )
    with pytest.raises(AccessError, match="the token in HF_TOKEN has no access") as caught:
        resolve_model(MODEL)
    assert "hf_secret" not in caught.value.message + caught.value.hint


def test_unknown_model_and_revision(server):
    with pytest.raises(AccessError, match="org/other was not found"):
        resolve_model("org/other")
    with pytest.raises(UsageError, match="no revision v9") as caught:
        resolve_model(MODEL, "v9")
    assert caught.value.exit_code == ExitCode.USAGE


def test_models_that_cannot_be_run_cost_no_download(server, cache):
    files = server.files
    server.files = {"pytorch_model.bin": b"x", "config.json": files["config.json"]}
    with pytest.raises(UnsupportedModelError, match=r"only pickle weights \(pytorch_model.bin\)"):
        resolve_model(MODEL)
    server.files = {name: data for name, data in files.items() if name != "config.json"}
    with pytest.raises(UnsupportedModelError, match=r"no config\.json in"):
        resolve_model(MODEL)
    assert not cache.exists()
    server.files = files | {"config.json": b'{"auto_map": {"a": "b"}}'}
    with pytest.raises(UnsupportedModelError, match="remote code"):
        resolve_model(MODEL)
    assert server.fetched() == {"config.json"}


def test_caller_judges_the_config_before_the_weights(server, tmp_path):
    def refuse(config):
        raise UnsupportedModelError(f"no family for {config['model_type']}")

    with pytest.raises(UnsupportedModelError, match="no family for qwen2"):
        resolve_model(MODEL, accept_config=refuse)
    assert server.fetched() == {"config.json"}
    with pytest.raises(UnsupportedModelError, match="no family for qwen2"):
        resolve_model(str(tmp_path / "source"), accept_config=refuse)


def test_offline_with_a_cold_and_a_warm_cache(server, monkeypatch, cache):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        NetworkError, match=r"offline mode is set \(HF_HUB_OFFLINE\).*the cache lacks config.json"
    ):
        resolve_model(MODEL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    warm = resolve_model(MODEL)
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model(MODEL) == warm
    shard = "model-00001-of-00002.safetensors"
    (warm.directory / shard).unlink()
    with pytest.raises(NetworkError, match=f"the cache lacks {shard}") as caught:
        resolve_model(MODEL)
    assert caught.value.exit_code == ExitCode.NETWORK
    assert server.requests == []


def test_refused_connection(cache, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(
        NetworkError, match=r"cannot reach http://127.0.0.1:1: .*; the cache lacks config.json"
    ):
        resolve_model(MODEL)
    directory = as_hub_snapshot(write_checkpoint(tmp_path / "m"), cache, COMMIT)
    assert resolve_model(MODEL).directory == directory


def test_find_local_never_asks_and_names_the_command(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("network used"))
    with pytest.raises(IntegrityError, match=f"org/tiny at {COMMIT} is not in the cache") as caught:
        find_source_directory(MODEL, COMMIT)
    assert f"subspec prepare org/tiny --revision {COMMIT}" in caught.value.hint
    directory = as_hub_snapshot(write_checkpoint(tmp_path / "m"), cache, COMMIT)
    assert find_source_directory(MODEL, COMMIT) == directory
    (directory / "model.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"lacks model\.safetensors in the cache"):
        find_source_directory(MODEL, COMMIT)
    directory = write_checkpoint(tmp_path / "local")
    assert find_source_directory(str(directory)) == directory


def test_directory_and_demo(tmp_path, monkeypatch):
    directory = write_checkpoint(tmp_path / "my model")
    resolved = resolve_model(str(directory))
    assert (resolved.model_id, resolved.directory, resolved.is_local) == (str(directory), directory, True)
    assert resolved.commit == open_checkpoint(directory).fingerprint
    monkeypatch.setattr(model_name, "DEMO_DIRECTORY", directory)
    demo = resolve_model("demo")
    assert (demo.model_id, demo.commit, demo.is_local) == ("demo", resolved.commit, True)
    assert find_source_directory("demo") == directory
    with pytest.raises(UsageError, match="has no revisions"):
        resolve_model("demo", "main")


def test_without_a_home_directory_no_directory_is_made_for_downloads(monkeypatch):
    """The hub library would make one that is called `~`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    with pytest.raises(ResourceError, match="no home directory is known") as caught:
        repo_cache("org/model")
    assert "HF_HOME" in caught.value.hint
