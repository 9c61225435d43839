"""No name and no link in a model leads out of its directory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from checkpoints import as_hub_snapshot, write_checkpoint
from fake_hub import COMMIT

from subspec_cli.checkpoint.checkpoint import layer_entries, open_checkpoint
from subspec_cli.checkpoint.tensor_reader import read_tensors
from subspec_cli.errors import IntegrityError

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


@pytest.mark.parametrize("name", [SINGLE, "config.json", "tokenizer.json"])
def test_links_out_of_a_directory_are_refused(tmp_path, name):
    write_checkpoint(tmp_path / "m")
    (tmp_path / "m" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "m" / name).symlink_to(tmp_path / "elsewhere")
    refused(tmp_path / "m", f"{name} in .* is a link to {tmp_path}/elsewhere")


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
        refused(snapshot, "outside the model directory")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_weights_that_are_no_file(tmp_path, make):
    write_checkpoint(tmp_path)
    (tmp_path / SINGLE).unlink()
    make(tmp_path / SINGLE)
    refused(tmp_path, "not a file")
