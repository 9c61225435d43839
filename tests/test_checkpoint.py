"""Opening a model's directory: what is accepted, what is refused, and that reads give the exact bytes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import (
    bf16,
    safetensors_bytes,
    tiny_config,
    tiny_tensors,
    write_checkpoint,
    write_weights,
)

from subspec_cli.checkpoint.checkpoint import (
    check_unchanged,
    layer_count_in_tensors,
    layer_entries,
    open_checkpoint,
)
from subspec_cli.checkpoint.source_directory import WeightIndex
from subspec_cli.checkpoint.tensor_reader import read_hashed_tensors, read_tensors
from subspec_cli.checkpoint.tensor_table import indexed_tensors
from subspec_cli.errors import ExitCode, IntegrityError, SubspecError, UnsupportedModelError, UsageError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def refused(directory: Path, kind: type[SubspecError], message: str) -> SubspecError:
    with pytest.raises(kind, match=message) as caught:
        open_checkpoint(directory)
    assert "\x1b" not in caught.value.message
    return caught.value


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_single_and_sharded_hold_the_same_tensors(tmp_path, shards):
    import torch

    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", shards=shards))
    raw = tiny_tensors()
    assert checkpoint.config == tiny_config()
    assert set(checkpoint.tensors) == set(raw)
    assert len(checkpoint.files) == shards
    assert layer_count_in_tensors(checkpoint) == 3
    assert len(checkpoint.fingerprint) == 40
    for name, tensor in read_tensors(checkpoint.tensors.values()).items():
        assert tensor.dtype == torch.bfloat16
        assert tuple(tensor.shape) == raw[name][1]
        assert tensor.flatten().view(torch.uint8).numpy().tobytes() == raw[name][2]
        assert tensor.data_ptr() % 64 == 0


def test_every_dtype_is_read(tmp_path):
    import torch

    write_checkpoint(tmp_path)
    tensors = {
        "i": ("I64", (2,), bytes([1] + [0] * 15)),
        "f": ("F32", (1,), bytes([0, 0, 128, 63])),
        "h": ("F16", (1, 1), bytes([0, 60])),
        "u": ("U8", (3,), b"\x01\x02\x03"),
        "none": ("F32", (0, 4), b""),
        "scalar": bf16(np.ones(())),
    }
    (tmp_path / SINGLE).write_bytes(safetensors_bytes(tensors))
    found = read_tensors(open_checkpoint(tmp_path).tensors.values())
    assert found["i"].tolist() == [1, 0]
    assert (found["f"].item(), found["h"].item(), found["scalar"].item()) == (1.0, 1.0, 1.0)
    assert found["u"].tolist() == [1, 2, 3]
    assert found["none"].shape == (0, 4)
    assert found["scalar"].dtype == torch.bfloat16


def test_layers(tmp_path):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, layers=12, shards=4))
    entries = layer_entries(checkpoint, 1)
    assert len(entries) == 12
    assert {entry.name.split(".")[2] for entry in entries} == {"1"}
    assert [(e.path.name, e.offset_bytes) for e in entries] == sorted(
        (e.path.name, e.offset_bytes) for e in entries
    )
    assert layer_count_in_tensors(checkpoint) == 12
    with pytest.raises(IntegrityError, match="no tensor of layer 12"):
        layer_entries(checkpoint, 12)


def test_odd_layer_numbers_count_for_nothing(tmp_path):
    write_checkpoint(tmp_path)
    tensors = tiny_tensors(layers=1)
    extra = {f"model.layers.{n}.x": bf16(np.ones(1)) for n in ("007", "9" * 300, "-1", "1e3")}
    write_weights(tmp_path, tensors | extra)
    assert layer_count_in_tensors(open_checkpoint(tmp_path)) == 1


def test_fingerprint_follows_config_index_and_headers_not_place(tmp_path):
    first = open_checkpoint(write_checkpoint(tmp_path / "a", shards=2)).fingerprint
    assert open_checkpoint(write_checkpoint(tmp_path / "b", shards=2, seed=9)).fingerprint == first
    others = {
        open_checkpoint(write_checkpoint(tmp_path / "c", shards=3)).fingerprint,
        open_checkpoint(write_checkpoint(tmp_path / "d", shards=2, eos_token_id=1)).fingerprint,
        open_checkpoint(write_checkpoint(tmp_path / "e", shards=2, layers=4)).fingerprint,
        first,
    }
    assert len(others) == 4


def test_missing_parts(tmp_path):
    assert refused(tmp_path / "no", UsageError, "no such directory").exit_code == ExitCode.USAGE
    assert refused(tmp_path, UnsupportedModelError, "no config.json in").exit_code == ExitCode.UNSUPPORTED
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    refused(tmp_path, UnsupportedModelError, "no tokenizer in")
    (tmp_path / "vocab.json").write_text("{}")
    refused(tmp_path, UnsupportedModelError, "no tokenizer in")
    (tmp_path / "merges.txt").write_text("")
    open_checkpoint(tmp_path)
    (tmp_path / SINGLE).unlink()
    refused(tmp_path, UnsupportedModelError, "neither model.safetensors nor model.safetensors.index.json")


def test_only_pickles(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / SINGLE).unlink()
    for name in ("pytorch_model.bin", "x\x1b.pt"):
        (tmp_path / name).write_bytes(b"")
    error = refused(tmp_path, UnsupportedModelError, r"only pickle weights \(pytorch_model.bin, x\\x1b.pt\)")
    assert "subspec reads safetensors" in error.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON at byte 0"),
        ("[1]", "holds a list"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ('{"auto_map": {"AutoModel": "x.Y"}}', "needs remote code, which is not run"),
        ('{"a": "' + "x" * (9 << 20) + '"}', "at most 8388608 are read"),
    ],
)  # fmt: skip
def test_config_that_rules_the_model_out(tmp_path, text, message):
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert refused(tmp_path, UnsupportedModelError, message).exit_code == ExitCode.UNSUPPORTED


def test_an_empty_map_of_code_is_none(tmp_path):
    open_checkpoint(write_checkpoint(tmp_path, auto_map={}))


def test_an_index_that_cannot_be_used_is_named(tmp_path):
    write_checkpoint(tmp_path, shards=2)
    good = (tmp_path / INDEX).read_text()

    def changed(change, message):
        (tmp_path / INDEX).write_text(good)
        edit_json(tmp_path / INDEX, change)
        refused(tmp_path, IntegrityError, message)

    changed(lambda index: index.update(weight_map={}), "no weight_map")
    changed(lambda index: index.update(weight_map=[1]), "no weight_map")
    changed(
        lambda index: index["weight_map"].update({"model.norm.weight": "model-9.safetensors"}),
        "lacks 1 of the 3 files that model.safetensors.index.json names: model-9.safetensors",
    )
    (tmp_path / INDEX).write_text("{")
    refused(tmp_path, IntegrityError, "not JSON at byte 1")
    (tmp_path / INDEX).unlink()
    refused(tmp_path, UnsupportedModelError, "but neither")


def test_the_index_decides_where_a_tensor_is(tmp_path):
    write_checkpoint(tmp_path, shards=2)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    good = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    tensors = open_checkpoint(tmp_path).tensors
    held = {
        file: [entry for name, entry in tensors.items() if good[name] == file] for file in (first, second)
    }
    stray = replace(held[first][0], path=tmp_path / second)
    held[second].append(stray)
    assert indexed_tensors(held, WeightIndex(b"", good)) == tensors, "the other copy is left aside"
    unnamed = {name: file for name, file in good.items() if name != "model.norm.weight"}
    assert indexed_tensors(held, WeightIndex(b"", unnamed)) == tensors, "one file alone holds it"
    both = {name: file for name, file in good.items() if name != stray.name}
    assert stray.name not in indexed_tensors(held, WeightIndex(b"", both)), "nobody says which"
    ghost = good | {"ghost": second, "model.layers.0.self_attn.rotary_emb.inv_freq": first}
    assert indexed_tensors(held, WeightIndex(b"", ghost)) == tensors, "nobody holds it, nobody needs it"


def test_damaged_shard_is_named(tmp_path):
    write_checkpoint(tmp_path, shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(tmp_path, IntegrityError, "model-00002-of-00002.safetensors should have")


def test_changes_after_opening_are_seen(tmp_path):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, shards=2))
    check_unchanged(checkpoint)
    shard = tmp_path / checkpoint.files[1].name
    data = shard.read_bytes()
    stamp = checkpoint.stamp
    os.utime(shard, ns=(1, 1))
    with pytest.raises(IntegrityError, match="changed while it was in use"):
        check_unchanged(checkpoint)
    assert open_checkpoint(tmp_path).stamp != stamp
    assert open_checkpoint(tmp_path).fingerprint == checkpoint.fingerprint
    shard.write_bytes(data[:-2])
    with pytest.raises(IntegrityError, match=f"{len(data)} bytes then, {len(data) - 2} now"):
        check_unchanged(checkpoint)
    with pytest.raises(IntegrityError, match=f"ends at byte {len(data) - 2}, expected 2 bytes more"):
        read_tensors(checkpoint.tensors.values())
    shard.unlink()
    with pytest.raises(IntegrityError, match="ENOENT"):
        check_unchanged(checkpoint)
    with pytest.raises(IntegrityError, match="ENOENT"):
        read_tensors(checkpoint.tensors.values())


def test_weights_written_in_use_are_noticed_although_the_time_is_put_back(tmp_path):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, shards=2))
    shard = tmp_path / checkpoint.files[1].name
    status = shard.stat()
    with open(shard, "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\0" * 8)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(IntegrityError, match=r"in use .*its modification time was put back") as caught:
        check_unchanged(checkpoint)
    assert caught.value.hint


def test_another_name_mode_or_reader_of_a_file_in_use_is_no_change(tmp_path):
    """As when another snapshot of the hub's cache is made, or a backup runs."""
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, shards=2))
    one, two = (tmp_path / file.name for file in checkpoint.files)
    os.link(one, tmp_path / "another-name")
    two.chmod(0o400)
    two.read_bytes()
    assert all((tmp_path / file.name).stat().st_ctime_ns > file.ctime_ns for file in checkpoint.files)
    check_unchanged(checkpoint)
    os.utime(one)
    with pytest.raises(IntegrityError, match="in use"):
        check_unchanged(checkpoint)


def test_hash_of_a_layer_is_of_its_bytes_alone(tmp_path):
    hashes = []
    for shards, seed in ((1, 0), (5, 0), (1, 1)):
        checkpoint = open_checkpoint(
            write_checkpoint(tmp_path / f"{shards}-{seed}", shards=shards, seed=seed)
        )
        tensors, digest = read_hashed_tensors(layer_entries(checkpoint, 1))
        assert len(tensors) == 12
        hashes.append(digest)
    assert hashes[0] == hashes[1] != hashes[2]
