"""The sets of substitutes on a machine: what is listed, found, removed and verified."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import as_hub_snapshot, tiny_tensors, write_checkpoint, write_weights
from fake_hub import COMMIT
from fakes_store import LAYERS, Quantizer, content, resolve_model, run

from subspec_cli.errors import BusyError, UsageError
from subspec_cli.files.home import prepared_root
from subspec_cli.files.lock import directory_lock
from subspec_cli.hub.source_model import ResolvedModel
from subspec_cli.substitutes.integrity import Finding, Verifier
from subspec_cli.substitutes.inventory import (
    COMPLETE,
    PARTIAL,
    UNREADABLE,
    all_but_latest,
    find_stored,
    list_stored,
    remove_stored,
)
from subspec_cli.substitutes.last_use import LAST_USED_NAME, last_used_s, mark_used
from subspec_cli.substitutes.manifest import JOURNAL_NAME, MANIFEST_NAME, layer_file_name, write_manifest
from subspec_cli.substitutes.prepared_model import find_prepared


@pytest.fixture(autouse=True)
def subspec_home(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))


@pytest.fixture
def model(tmp_path) -> ResolvedModel:
    return resolve_model(str(write_checkpoint(tmp_path / "model", layers=LAYERS, shards=2)))


@pytest.fixture
def on_hub(tmp_path, monkeypatch) -> ResolvedModel:
    """A model in the hub's cache whose blobs are named as the hub names large files."""
    import hashlib

    from huggingface_hub import constants

    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    snapshot = as_hub_snapshot(write_checkpoint(tmp_path / "source", layers=LAYERS, shards=2), cache, COMMIT)
    for path in sorted(snapshot.glob("*.safetensors")):
        blob = path.resolve()
        named = blob.rename(blob.with_name(hashlib.sha256(blob.read_bytes()).hexdigest()))
        path.unlink()
        path.symlink_to(Path("../../blobs") / named.name)
    return ResolvedModel("org/tiny", snapshot, COMMIT, is_local=False)


def findings_of(model: str | None = None) -> list[Finding]:
    stored = list_stored() if model is None else find_stored(model)
    verifier = Verifier(stored, lambda state: None)
    return [finding for item in stored for finding in verifier.verify(item)]


def flip(path: Path, offset: int) -> None:
    """Change the byte at `offset` in place and keep the file's times, as a failing disk does."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# --- listing ----------------------------------------------------------------------------------------------------


def test_every_set_is_listed_with_its_state_the_latest_first(model):
    first = run(model)
    with pytest.raises(KeyboardInterrupt):
        run(model, Quantizer(2), bits=2)
    broken = run(model, bits=4)
    (broken.directory / MANIFEST_NAME).write_text("{")
    for number, name in enumerate((MANIFEST_NAME, JOURNAL_NAME)):
        for path in prepared_root().glob(f"*/{name}"):
            os.utime(path, (1000 + number, 1000 + number))
    os.utime(first.directory / MANIFEST_NAME, (2000, 2000))
    (prepared_root() / "mine").mkdir()
    (prepared_root() / "note.txt").write_text("hello")
    found = list_stored()
    assert [item.state for item in found] == [COMPLETE, PARTIAL, UNREADABLE]
    assert found[0].manifest == first.manifest
    assert [item.model_id for item in found] == [model.model_id, model.model_id, broken.directory.name]
    assert len(found[1].manifest.layers) == 2
    assert "not JSON" in found[2].problem
    assert found[0].size_bytes == sum(path.stat().st_size for path in first.directory.iterdir())
    shards = sum(path.stat().st_size for path in model.directory.glob("*.safetensors"))
    assert found[0].target().size_bytes == shards
    shutil.rmtree(model.directory)
    assert found[0].target() is None


def test_nothing_prepared_is_an_empty_list():
    assert list_stored() == []


def test_a_lost_layer_file_makes_a_set_partial(model):
    (run(model).directory / layer_file_name(1)).unlink()
    assert [item.state for item in list_stored()] == [PARTIAL]


def test_last_use_is_noted_beside_the_manifest(model, monkeypatch):
    directory = run(model).directory
    before = content(directory)
    assert list_stored()[0].last_used_s is None
    assert mark_used(directory)
    os.utime(directory / LAST_USED_NAME, (7, 7))
    assert last_used_s(directory) == 7
    mark_used(directory)
    assert last_used_s(directory) > 1e9
    assert {name: data for name, data in content(directory).items() if name != LAST_USED_NAME} == before
    assert list_stored()[0].state == COMPLETE


def test_a_place_that_cannot_be_written_is_no_reason_not_to_run(model, tmp_path, monkeypatch):
    directory = run(model).directory
    victim = tmp_path / "victim"
    (directory / LAST_USED_NAME).symlink_to(victim)
    assert not mark_used(directory)
    assert not victim.exists()

    def refuse(*args, **how):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    assert not mark_used(directory)


# --- choosing and removing --------------------------------------------------------------------------------------


def test_sets_are_found_by_any_name_of_the_model_also_when_it_is_gone(model, monkeypatch):
    run(model)
    run(model, bits=4)
    monkeypatch.chdir(model.directory.parent)
    for name in (model.model_id, "./model", "model", f"{model.model_id}/../model"):
        assert len(find_stored(name)) == 2
    shutil.rmtree(model.directory)
    assert len(find_stored(model.model_id)) == len(find_stored("model")) == 2
    with pytest.raises(UsageError, match="org/other is not prepared") as caught:
        find_stored("org/other")
    assert caught.value.hint == "subspec models list shows what is"


def test_an_unreadable_set_can_be_named_by_its_model(model):
    prepared = run(model)
    write_manifest(prepared.directory / MANIFEST_NAME, replace(prepared.manifest, format_version=1))
    assert [item.state for item in find_stored(model.model_id)] == [UNREADABLE]


def test_removing_deletes_what_was_written_and_nothing_else(model):
    prepared = run(model)
    mark_used(prepared.directory)
    (prepared.directory / ".layer-00000.safetensors.tmp.12345").write_bytes(b"half")
    source = content(model.directory)
    (stored,) = list_stored()
    size_bytes = stored.size_bytes
    assert remove_stored(stored) == size_bytes > 5
    assert not prepared.directory.exists()
    assert list_stored() == []
    assert content(model.directory) == source
    with pytest.raises(UsageError, match="is not prepared"):
        find_prepared(model.model_id)


def test_files_of_others_in_the_directory_stay(model):
    directory = run(model).directory
    (directory / "notes.txt").write_text("mine")
    (directory / "layer-00001.safetensors").unlink()
    (directory / "layer-00001.safetensors").mkdir()
    remove_stored(list_stored()[0])
    assert sorted(path.name for path in directory.iterdir()) == ["layer-00001.safetensors", "notes.txt"]


def test_a_link_is_removed_and_not_followed(model, tmp_path):
    directory = run(model).directory
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (directory / layer_file_name(0)).unlink()
    (directory / layer_file_name(0)).symlink_to(elsewhere)
    remove_stored(list_stored()[0])
    assert not directory.exists()
    assert elsewhere.read_text() == "mine"


def test_a_set_that_is_being_prepared_is_not_removed(model):
    before = content(run(model).directory)
    (stored,) = list_stored()
    with directory_lock(stored.directory), pytest.raises(BusyError, match=rf"pid {os.getpid()}"):
        remove_stored(stored)
    assert content(stored.directory) == before


def test_all_but_the_latest_keeps_the_one_that_run_takes(model):
    places = [run(model, bits=bits).directory for bits in (8, 4)]
    with pytest.raises(KeyboardInterrupt):
        run(model, Quantizer(1), bits=2)
    os.utime(places[0] / MANIFEST_NAME, (2_000_000_000,) * 2)
    os.utime(places[1] / MANIFEST_NAME, (1_000_000_000,) * 2)
    chosen = all_but_latest(find_stored(model.model_id))
    assert sorted(item.state for item in chosen) == [COMPLETE, PARTIAL]
    for item in chosen:
        remove_stored(item)
    assert find_prepared(None).directory == places[0]
    remove_stored(list_stored()[0])
    with pytest.raises(KeyboardInterrupt):
        run(model, Quantizer(1), bits=2)
    assert all_but_latest(find_stored(model.model_id)) == []


# --- verifying --------------------------------------------------------------------------------------------------


def test_a_sound_set_has_no_findings_and_everything_is_read(model, on_hub):
    run(model)
    run(model, bits=4)
    run(on_hub)
    stored, seen = list_stored(), []
    verifier = Verifier(stored, seen.append)
    assert [verifier.verify(item) for item in stored] == [[], [], []]
    assert seen[-1].done_bytes == seen[-1].total_bytes
    targets = sum(
        path.stat().st_size for place in (model, on_hub) for path in place.directory.glob("*.safetensors")
    )
    files = sum(file.size_bytes for item in stored for file in item.manifest.files)
    assert seen[-1].total_bytes == targets + files


def test_each_damaged_file_is_named_with_both_figures(model, tmp_path):
    prepared = run(model)
    paths = [prepared.directory / layer_file_name(number) for number in range(3)]
    flip(paths[0], -1)
    paths[1].write_bytes(b"short")
    paths[2].rename(tmp_path / "moved")
    paths[2].symlink_to(tmp_path / "moved")
    found = findings_of()
    assert [item.path for item in found] == paths
    assert found[0].expected == prepared.manifest.layers[0].sha256
    assert len(found[0].found) == 64
    assert (found[1].expected, found[1].found) == (
        f"{prepared.manifest.layers[1].size_bytes} bytes",
        "5 bytes",
    )
    assert "is a link to" in found[2].what
    assert all(item.is_damage and str(item.path) in item.text for item in found)
    paths[2].unlink()
    assert findings_of()[2].what == "missing"


def test_a_flipped_bit_in_the_target_names_the_files_of_the_layer(model):
    prepared = run(model)
    shard = sorted(model.directory.glob("*.safetensors"))[1]
    flip(shard, -100)
    (found,) = findings_of()
    assert found.path == shard
    assert found.what == "wrong SHA-256 of the 16-bit layer 2"
    assert found.expected == prepared.manifest.layers[2].source_sha256
    assert found.is_damage


def test_the_hubs_own_hash_covers_what_is_neither_layer_nor_head(on_hub):
    run(on_hub)
    shard = sorted(on_hub.directory.glob("*.safetensors"))[1]
    flip(shard.resolve(), -10)  # in the last norm
    (found,) = findings_of("org/tiny")
    assert (found.path, found.what, found.expected) == (shard, "wrong SHA-256", shard.resolve().name)


def test_a_damaged_header_in_the_hubs_cache_is_found_by_the_files_hash(on_hub):
    run(on_hub)
    shard = sorted(on_hub.directory.glob("*.safetensors"))[0]
    flip(shard.resolve(), 9)
    (found,) = findings_of()
    assert (found.path, found.expected) == (shard, shard.resolve().name)
    shard.unlink()
    assert "lacks" in findings_of()[0].what
    assert findings_of()[0].is_damage


def test_a_target_that_is_gone_is_reported(model):
    run(model)
    shutil.rmtree(model.directory)
    (found,) = findings_of()
    assert "no such directory" in found.what


def test_a_target_written_again_is_outdated_not_damaged(model):
    run(model)
    write_weights(model.directory, tiny_tensors(layers=LAYERS, seed=5), shards=2)
    (found,) = findings_of()
    assert not found.is_damage
    assert f"to follow them: subspec prepare {model.model_id} --bits 8" in found.text


def test_a_set_that_cannot_be_read_or_has_just_begun(model):
    prepared = run(model)
    (prepared.directory / MANIFEST_NAME).write_text("[]")
    (found,) = findings_of()
    assert found.path == prepared.directory / MANIFEST_NAME
    assert "expected a JSON object" in found.what
    (prepared.directory / MANIFEST_NAME).unlink()
    assert findings_of() == []
