"""The prepare pipeline: what it writes and what a rerun reuses."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from checkpoints import tiny_tensors, write_checkpoint, write_weights
from fakes_store import LAYERS, Quantizer, content, place_of, resolve_model, run

from subspec_cli.checkpoint.checkpoint import layer_entries, open_checkpoint
from subspec_cli.checkpoint.tensor_reader import read_hashed_tensors
from subspec_cli.errors import UnsupportedModelError
from subspec_cli.hub.source_model import ResolvedModel
from subspec_cli.substitutes import preparation
from subspec_cli.substitutes.disk_space import estimate_file_bytes
from subspec_cli.substitutes.manifest import (
    HEAD_NAME,
    JOURNAL_NAME,
    MANIFEST_NAME,
    TUNING_TEXT_NAME,
    layer_file_name,
    write_manifest,
)
from subspec_cli.substitutes.prepared_model import (
    check_pairing,
    find_prepared,
    load_layer,
    prepared_directory,
)
from subspec_cli.substitutes.settings import TUNED, SubstituteSettings
from subspec_cli.substitutes.source_stamp import make_stamp

FINISHED = [".lock", HEAD_NAME, *(layer_file_name(layer) for layer in range(LAYERS)), MANIFEST_NAME]


@pytest.fixture(autouse=True)
def subspec_home(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))


@pytest.fixture
def model(tmp_path) -> ResolvedModel:
    return resolve_model(str(write_checkpoint(tmp_path / "model", layers=LAYERS, shards=2)))


def test_writes_every_layer_and_a_manifest_that_fits(model):
    seen = []
    prepared = run(model, seen=seen)
    checkpoint = open_checkpoint(model.directory)
    assert sorted(path.name for path in prepared.directory.iterdir()) == sorted(FINISHED)
    assert find_prepared(None) == find_prepared(model.model_id, 8) == prepared
    check_pairing(prepared, checkpoint)
    for layer in range(LAYERS):
        source, digest = read_hashed_tensors(layer_entries(checkpoint, layer))
        assert prepared.manifest.layers[layer].source_sha256 == digest
        found = load_layer(prepared, layer)
        assert len(found) == len(source) == 12
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert found["mlp.up_proj.weight.top"].numel() == source[name].numel()
    layer = sum(entry.size_bytes for entry in layer_entries(checkpoint, 0))
    table = checkpoint.tensors["model.embed_tokens.weight"].size_bytes
    assert [(item.done_layers, item.reused_layers) for item in seen] == [(1, 0), (2, 0), (3, 0), (3, 0)]
    assert [item.done_bytes for item in seen] == [layer, 2 * layer, 3 * layer, 3 * layer + table]
    assert {(item.total_layers, item.total_bytes) for item in seen} == {(LAYERS, 3 * layer + table)}
    assert prepared.manifest.source_stamp == make_stamp(checkpoint)


def test_second_time_returns_at_once_and_becomes_the_most_recent(model):
    first = run(model)
    run(model, bits=4)
    os.utime(first.directory / MANIFEST_NAME, (1, 1))
    before = content(first.directory)
    seen, quantizer = [], Quantizer()
    assert run(model, quantizer, seen=seen) == first
    assert quantizer.calls == 0
    assert (seen[-1].done_layers, seen[-1].reused_layers) == (LAYERS, LAYERS)
    assert content(first.directory) == before
    assert find_prepared(None) == first


def test_force_makes_all_again_and_an_interrupted_force_is_not_taken_for_done(model):
    run(model)
    quantizer = Quantizer()
    run(model, quantizer, force=True)
    assert quantizer.calls == LAYERS
    with pytest.raises(KeyboardInterrupt):
        run(model, Quantizer(1), force=True)
    assert JOURNAL_NAME in content(place_of(model))
    run(model)
    assert JOURNAL_NAME not in content(place_of(model))


def test_only_what_is_damaged_or_missing_is_made_again(model):
    prepared = run(model)
    whole = content(prepared.directory)
    (prepared.directory / "layer-00001.safetensors").unlink()
    quantizer = Quantizer()
    run(model, quantizer)
    assert quantizer.calls == 1
    moved = (prepared.directory / "layer-00001.safetensors").rename(model.directory / "moved")
    (prepared.directory / "layer-00001.safetensors").symlink_to(moved)  # no load would open it
    quantizer = Quantizer()
    run(model, quantizer)
    assert quantizer.calls == 1
    assert not (prepared.directory / "layer-00001.safetensors").is_symlink()
    path = prepared.directory / "layer-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    (prepared.directory / "layer-00000.safetensors").write_bytes(b"short")
    quantizer = Quantizer()
    run(model, quantizer)
    assert quantizer.calls == 2
    assert content(prepared.directory) == whole


def test_damaged_manifest_is_made_again_and_a_newer_one_is_not_touched(model):
    prepared = run(model)
    path = prepared.directory / MANIFEST_NAME
    path.write_text("{")
    quantizer = Quantizer()
    run(model, quantizer)
    assert quantizer.calls == LAYERS
    path.write_text('{"format_version": 4}')
    with pytest.raises(UnsupportedModelError, match="has format 4"):
        run(model)
    assert path.read_text() == '{"format_version": 4}'
    run(model, force=True)


def test_other_libraries_do_not_continue_a_journal_but_accept_a_finished_set(model):
    with pytest.raises(KeyboardInterrupt):
        run(model, Quantizer(2))
    quantizer = Quantizer()
    run(model, quantizer, versions={"torch": "2.14.0"})
    assert quantizer.calls == LAYERS
    quantizer = Quantizer()
    run(model, quantizer, versions={"torch": "2.15.0"})
    assert quantizer.calls == 0


def test_weights_changed_in_place_are_noticed_layer_by_layer(model):
    run(model)
    tensors = tiny_tensors(layers=LAYERS)
    name = "model.layers.1.mlp.up_proj.weight"
    dtype, shape, data = tensors[name]
    write_weights(model.directory, tensors | {name: (dtype, shape, data[2:] + data[:2])}, shards=2)
    with pytest.raises(UnsupportedModelError, match="written again"):
        check_pairing(find_prepared(model.model_id), open_checkpoint(model.directory))
    quantizer = Quantizer()
    prepared = run(model, quantizer)
    assert quantizer.calls == 1
    check_pairing(prepared, open_checkpoint(model.directory))


def test_manifest_with_layers_beyond_the_model(model):
    prepared = run(model)
    extra = replace(prepared.manifest.layers[2], layer=3, name=layer_file_name(3))
    (prepared.directory / extra.name).write_bytes((prepared.directory / layer_file_name(2)).read_bytes())
    path = prepared.directory / MANIFEST_NAME
    write_manifest(path, replace(prepared.manifest, layers=(*prepared.manifest.layers, extra)))
    assert run(model) == prepared


def test_estimate_is_above_quanto_like_sizes(model):
    checkpoint = open_checkpoint(model.directory)
    elements = sum(entry.size_bytes // 2 for entry in layer_entries(checkpoint, 0))
    for bits, group_size in ((2, 128), (4, 128), (8, 0)):
        packed = elements * (bits + (32 / group_size if group_size else 0)) / 8
        estimate = estimate_file_bytes(checkpoint, 0, SubstituteSettings(bits, "minmax"))
        assert packed <= estimate <= 1.1 * packed
    wide = SubstituteSettings(2, "minmax", (("mlp.up_proj", 8),))
    more = estimate_file_bytes(checkpoint, 0, wide)
    assert more - estimate_file_bytes(checkpoint, 0, SubstituteSettings(2, "minmax")) > 64 * 32 * 0.75


def test_what_comes_before_the_first_layer_is_no_part_of_its_time(model, monkeypatch):
    """A rate that counts it would say that hours are left."""
    clock, seen = [0.0], []

    def work(layer, tensors):
        clock[0] += 2
        return Quantizer()(layer, tensors)

    def find_text(_sha256):
        clock[0] += 1000
        return "0" * 64

    monkeypatch.setattr(preparation, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    run(model, work, find_text=find_text, seen=seen)
    assert [state.elapsed_s for state in seen][:LAYERS] == [2.0 * (layer + 1) for layer in range(LAYERS)]


def test_a_copy_in_another_place_takes_the_layers_that_are_there(model, tmp_path):
    """Only where the 16-bit bytes and the build are the same, and only files that are sound."""
    first = run(model)
    copy = resolve_model(str(shutil.copytree(model.directory, tmp_path / "copy", copy_function=shutil.copy)))
    notices = []
    quantizer = Quantizer()
    second = run(copy, quantizer, notices=notices)
    assert quantizer.calls == 0
    assert notices == [f"layers of the same weights are in {first.directory}: they are copied"]
    assert second.manifest.layers == first.manifest.layers
    assert [second.manifest.model_id, second.directory] != [first.manifest.model_id, first.directory]
    for layer in range(LAYERS):
        load_layer(second, layer)
    for path in second.directory.iterdir():
        path.unlink()
    (first.directory / layer_file_name(1)).write_bytes(b"damaged")
    run(copy, quantizer)
    assert quantizer.calls == 1
    run(copy, quantizer, force=True)
    assert quantizer.calls == 1 + LAYERS
    run(copy, quantizer, bits=4)
    assert quantizer.calls == 1 + 2 * LAYERS
    run(model, quantizer := Quantizer(), versions={"torch": "3"}, force=True)
    assert quantizer.calls == LAYERS


def test_tuned_layers_are_taken_only_from_a_model_whose_bytes_are_all_the_same(model, tmp_path):
    """Each was rounded for what the whole model says and for what the layers before it make of that."""

    def tuned(resolved, text="0"):
        quantizer = Quantizer()
        run(resolved, quantizer, find_text=lambda _sha256: text * 64)
        return quantizer.calls

    assert tuned(model) == LAYERS
    copy = shutil.copytree(model.directory, tmp_path / "copy", copy_function=shutil.copy)
    assert tuned(resolve_model(str(copy))) == 0
    other = shutil.copytree(model.directory, tmp_path / "other")
    tensors = tiny_tensors(layers=LAYERS)
    name = f"model.layers.{LAYERS - 1}.mlp.up_proj.weight"
    dtype, shape, data = tensors[name]
    write_weights(other, tensors | {name: (dtype, shape, data[2:] + data[:2])}, shards=2)
    assert tuned(resolve_model(str(other))) == LAYERS
    another = shutil.copytree(model.directory, tmp_path / "another")
    assert tuned(resolve_model(str(another)), text="1") == LAYERS
    write_weights(model.directory, tensors | {name: (dtype, shape, data[4:] + data[:4])}, shards=2)
    place = prepared_directory(model.model_id, model.commit, SubstituteSettings(8, TUNED))
    (place / TUNING_TEXT_NAME).write_text("of the old weights")
    assert tuned(model) == LAYERS
    assert not (place / TUNING_TEXT_NAME).exists()


def test_a_layer_of_other_weights_is_not_taken(model, tmp_path):
    run(model)
    tensors = tiny_tensors(layers=LAYERS)
    name = "model.layers.1.mlp.up_proj.weight"
    dtype, shape, data = tensors[name]
    copy = shutil.copytree(model.directory, tmp_path / "copy")
    write_weights(copy, tensors | {name: (dtype, shape, data[2:] + data[:2])}, shards=2)
    quantizer = Quantizer()
    run(resolve_model(str(copy)), quantizer)
    assert quantizer.calls == 1
