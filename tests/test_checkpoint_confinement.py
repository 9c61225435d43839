"""No name and no link in a model leads out of its directory."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from checkpoints import as_hub_snapshot, write_checkpoint
from fake_hub import COMMIT

from subspec_cli.checkpoint.checkpoint import check_unchanged, layer_entries, open_checkpoint
from subspec_cli.checkpoint.tensor_reader import read_tensors
from subspec_cli.errors import IntegrityError, UsageError
from subspec_cli.hub.model_outline import outline_model
from subspec_cli.hub.source_model import open_model
from subspec_cli.reporter import SILENT

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def refused(directory: Path, message: str) -> None:
    with pytest.raises(IntegrityError, match=message):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/../../x.safetensors",
        "./x.safetensors",
        "C:\\x.safetensors",
        "C:x.safetensors",
        "a\\b.safetensors",
        "a\0.safetensors",
        "",
        "model.bin",
        3,
    ],
)
def test_index_cannot_lead_out(tmp_path, name):
    (tmp_path / "x.safetensors").write_bytes(b"secret")
    write_checkpoint(tmp_path / "m", shards=2)
    path = tmp_path / "m" / INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    refused(tmp_path / "m", "no safetensors file inside the model directory")


def test_a_directory_of_links_that_the_user_made_is_read(tmp_path):
    """Links to another disk, and to a snapshot of the hub's cache, which are links themselves."""
    write_checkpoint(tmp_path / "disk", shards=2)
    snapshot = as_hub_snapshot(write_checkpoint(tmp_path / "m", shards=2), tmp_path / "cache", COMMIT)
    for number, source in enumerate((tmp_path / "disk", snapshot)):
        directory = tmp_path / f"links-{number}"
        directory.mkdir()
        for path in source.iterdir():
            (directory / path.name).symlink_to(path)
        checkpoint = open_checkpoint(directory)
        assert read_tensors(layer_entries(checkpoint, 0))
        assert checkpoint.stamp == open_checkpoint(source).stamp
        shard = checkpoint.directory / checkpoint.files[0].name
        os.utime(shard)
        with pytest.raises(IntegrityError, match="changed while it was in use"):
            check_unchanged(checkpoint)


@pytest.mark.parametrize(
    "linked", ["config.json", "tokenizer.json", INDEX, "model-00002-of-00002.safetensors"]
)
def test_links_out_of_a_users_directory_are_followed_when_asked_to(tmp_path, linked):
    model = write_checkpoint(tmp_path / "m", shards=2)
    (tmp_path / "elsewhere").mkdir()
    (model / linked).rename(tmp_path / "elsewhere" / linked)
    (model / linked).symlink_to(tmp_path / "elsewhere" / linked)
    told = rf"{linked} in .*/m is a link to .*/elsewhere/{linked}, outside the directory"
    doors = (outlined, opened)
    for door in doors:
        with pytest.raises(UsageError, match=told) as raised:
            door(model)
        assert "--follow-links" in raised.value.hint
    for door in doors:
        door(model, follow_links=True)


def outlined(model, **how):
    outline_model(str(model), reporter=SILENT, **how)


def opened(model, **how):
    with open_model(str(model), reporter=SILENT, **how):
        pass


def test_links_of_a_snapshot_and_within_a_directory_need_no_flag(tmp_path):
    snapshot = as_hub_snapshot(write_checkpoint(tmp_path / "s"), tmp_path / "cache", COMMIT)
    model = write_checkpoint(tmp_path / "m")
    (model / SINGLE).rename(model / "real")
    (model / SINGLE).symlink_to("real")
    (tmp_path / "link").symlink_to("m")
    for directory in (snapshot, model, tmp_path / "link"):
        opened(directory)


@pytest.mark.parametrize("name", [SINGLE, "config.json", "tokenizer.json", "generation_config.json"])
def test_links_out_of_a_snapshot_are_refused(tmp_path, name):
    """The files of a snapshot come from elsewhere. The command in the hint makes a directory that works."""
    snapshot = as_hub_snapshot(write_checkpoint(tmp_path / "m"), tmp_path / "cache", COMMIT)
    path = snapshot / name
    (tmp_path / "elsewhere").write_bytes(path.read_bytes() if path.exists() else b"{}")
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match=f"{name} in .* is a link to {tmp_path}/elsewhere") as caught:
        open_checkpoint(snapshot)
    command = caught.value.hint.partition(": ")[2].replace("DIRECTORY", str(tmp_path / "copy"))
    subprocess.run(command, shell=True, check=True)
    open_checkpoint(tmp_path / "copy")


def test_a_blob_that_is_on_another_disk_is_read(tmp_path):
    snapshot = as_hub_snapshot(write_checkpoint(tmp_path / "m"), tmp_path / "cache", COMMIT)
    blob = (snapshot / SINGLE).resolve()
    blob.symlink_to(blob.rename(tmp_path / "elsewhere"))
    assert read_tensors(layer_entries(open_checkpoint(snapshot), 0))


def test_links_within_and_a_linked_directory_are_fine(tmp_path):
    write_checkpoint(tmp_path / "m")
    (tmp_path / "m" / SINGLE).rename(tmp_path / "m" / "real")
    (tmp_path / "m" / SINGLE).symlink_to("real")
    (tmp_path / "link").symlink_to("m")
    assert open_checkpoint(tmp_path / "link").directory == tmp_path / "m"


def test_hub_cache_links_to_its_own_blobs_only(tmp_path):
    snapshot = as_hub_snapshot(write_checkpoint(tmp_path / "m", shards=2), tmp_path / "cache", COMMIT)
    checkpoint = open_checkpoint(snapshot)
    assert read_tensors(layer_entries(checkpoint, 0))
    assert {entry.path.parent for entry in checkpoint.tensors.values()} == {snapshot}
    (tmp_path / "cache" / "models--evil" / "blobs").mkdir(parents=True)
    link = snapshot / "config.json"
    for target in ("../../../models--evil/blobs/x", "../../refs/main", "../../blobs/a/b"):
        link.unlink()
        link.symlink_to(target)
        refused(snapshot, "outside the hub's cache of this model")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_weights_that_are_no_file(tmp_path, make):
    write_checkpoint(tmp_path)
    (tmp_path / SINGLE).unlink()
    make(tmp_path / SINGLE)
    refused(tmp_path, "not a file")
