"""Bad models and damaged sets, through the whole command line: one line, the right status, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from checkpoints import bf16, framed, tiny_tensors, write_checkpoint, write_weights
from fakes_store import LAYERS, resolve_model, run

from subspec_cli.__main__ import main
from subspec_cli.substitutes.manifest import MANIFEST_NAME, read_manifest, write_manifest

SINGLE, INDEX, SECOND = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-00002-of-00002.safetensors",
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def edit(directory, name, **changes):
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def set_config(**changes):
    return lambda directory: edit(directory, "config.json", **changes)


def set_shard(data):
    return lambda directory: (directory / SECOND).write_bytes(data)


def cut_shard(directory):
    (directory / SECOND).write_bytes((directory / SECOND).read_bytes()[:-1])


def lengthen_shard(directory):
    (directory / SECOND).write_bytes((directory / SECOND).read_bytes() + b"x")


def lead_out(directory):
    shutil.copy(directory / SECOND, directory.parent / "x.safetensors")
    index = json.loads((directory / INDEX).read_text())
    files = {name: file.replace(SECOND, "../x.safetensors") for name, file in index["weight_map"].items()}
    edit(directory, INDEX, weight_map=files)


def replace_by(make, name=SECOND):
    def damage(directory):
        (directory / name).unlink(missing_ok=True)
        make(directory / name)

    return damage


def link_to_itself(path):
    path.symlink_to(path.name)


def link_to_zeros(path):
    path.symlink_to("/dev/zero")


def link_to_nothing(path):
    path.symlink_to("nowhere")


def change_tensors(change):
    def damage(directory):
        tensors = tiny_tensors(layers=LAYERS)
        change(tensors)
        write_weights(directory, tensors, shards=2)

    return damage


def plant_nan(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"] = bf16(np.full((64, 32), np.nan, np.float32))


def only_pickles(directory):
    for path in directory.glob("model*"):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"")


NORM = "model.norm.weight"
DAMAGED = {
    "F12 only pickles": (only_pickles, 3, "only pickle weights (pytorch_model.bin)"),
    "F30 empty shard": (set_shard(b""), 6, "has 0 bytes"),
    "F30 header of 2^63": (
        set_shard(bytes([0] * 7 + [128]) + b"{}"),
        6,
        "9223372036854775808 bytes, at most",
    ),
    "F31 header no JSON": (set_shard(framed("nonsense")), 6, "not JSON at byte"),
    "F32 one byte short": (cut_shard, 6, "bytes by its header, has"),
    "F32 one byte over": (lengthen_shard, 6, "bytes by its header, has"),
    "F35 git-lfs pointer": (set_shard(b"version https://git-lfs.github.com/spec/v1\n"), 6, "git-lfs pointer"),
    "F35 HTML page": (set_shard(b"<!DOCTYPE html><html></html>"), 6, "an HTML page"),
    "F37 NaN": (change_tensors(plant_nan), 6, "holds 2048 values that are NaN or infinite"),
    "F38 name leads out": (lead_out, 6, "'../x.safetensors', which is no safetensors file inside"),
    "F40 named pipe": (replace_by(os.mkfifo), 6, "is a named pipe, not a file"),
    "F40 link to a device": (replace_by(link_to_zeros), 6, "is a character device, not a file"),
    "F41 tensor missing": (change_tensors(lambda t: t.pop(NORM)), 6, f"1 tensors are missing: {NORM}"),
    "F42 tensor unexpected": (
        change_tensors(lambda t: t.update({"model.extra": t[NORM]})),
        6,
        "1 tensors are not expected: model.extra",
    ),
    "F42 wrong shape": (
        change_tensors(lambda t: t.update({NORM: bf16(np.ones(7, np.float32))})),
        6,
        "has shape [7], expected [32]",
    ),
    "F43 no config": (lambda directory: (directory / "config.json").unlink(), 3, "no config.json in"),
    "F43 config no JSON": (lambda directory: (directory / "config.json").write_text("{"), 3, "not JSON"),
    "F43 a billion layers": (set_config(num_hidden_layers=10**9), 3, "num_hidden_layers is 1000000000"),
    "F44 mixture of experts": (
        set_config(architectures=["MixtralForCausalLM"], num_local_experts=8),
        3,
        "mixture-of-experts model MixtralForCausalLM is not supported",
    ),
    "F45 remote code": (set_config(auto_map={"AutoModel": "evil.Evil"}), 3, "needs remote code"),
    "F46 no tokenizer": (lambda directory: (directory / "tokenizer.json").unlink(), 3, "no tokenizer in"),
    "F47 quantized": (set_config(quantization_config={"quant_method": "awq"}), 3, "already quantized (awq)"),
    "T36 link to nothing": (replace_by(link_to_nothing), 6, "nowhere, which is not there"),
    "A07 weights": (replace_by(link_to_itself), 6, f"{SECOND} in "),
    "A07 only file of the weights": (replace_by(link_to_itself, SINGLE), 6, "is a link that leads to itself"),
    "A07 config": (replace_by(link_to_itself, "config.json"), 6, "config.json in "),
    "A13 tokenizer": (
        replace_by(os.mkfifo, "tokenizer.json"),
        6,
        "tokenizer.json is a named pipe, not a file",
    ),
    "A13 its settings": (replace_by(os.mkfifo, "tokenizer_config.json"), 6, "is a named pipe, not a file"),
    "A13 generation": (replace_by(os.mkdir, "generation_config.json"), 6, "is a directory, not a file"),
    "A13 chat template": (replace_by(link_to_zeros, "chat_template.jinja"), 6, "is a character device"),
    "A13 index": (replace_by(os.mkfifo, INDEX), 6, f"{INDEX} is a named pipe, not a file"),
}


def told(capsys):
    """The error's line, after seeing that it is one, and that nothing reaches the terminal raw."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert not set(captured.err) & set("\x1b\x9b\u202e")
    (line,) = [line for line in captured.err.splitlines() if line.startswith("subspec: error: ")]
    assert "internal error" not in line
    return line


@pytest.mark.parametrize(("damage", "status", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_bad_model_is_refused_in_one_line_and_leaves_nothing(tmp_path, capsys, damage, status, message):
    """The directory's own name holds what a terminal would obey."""
    directory = write_checkpoint(tmp_path / "evil\x1b[2J\x9b\u202e", layers=LAYERS, shards=2)
    damage(directory)
    if (directory / "config.json").exists() and status == 3:
        (directory / "evil.py").write_text("open('ran', 'w')\n")
    assert main(["prepare", str(directory)]) == status
    assert message in told(capsys)
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "home").rglob("layer-*"))
    assert not list((tmp_path / "home").rglob(f"{MANIFEST_NAME}"))


def cut_manifest(path, manifest):
    path.write_text(path.read_text()[:100])


def newer_manifest(path, manifest):
    path.write_text(json.dumps({"format_version": 99}))


def older_manifest(path, manifest):
    path.write_text(path.read_text().replace('"format_version": 3', '"format_version": 1'))


def extra_key(path, manifest):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"\x1b[2J": 1}))


def strange_file(path, manifest):
    content = json.loads(path.read_text())
    content["layers"][0]["name"] = "../../\x1b[2Jx"
    path.write_text(json.dumps(content))


def lost_layer(path, manifest):
    content = json.loads(path.read_text())
    del content["layers"][-1]
    path.write_text(json.dumps(content))


MANIFESTS = {
    "F59 cut": (cut_manifest, 6, "is not JSON at byte"),
    "F59 newer": (newer_manifest, 3, "has format 99, this version of subspec reads format 3"),
    "F59 older": (older_manifest, 3, "has the old format 1"),
    "F59 extra key": (extra_key, 6, "has unknown keys: '\\x1b[2J'"),
    "F59 path": (strange_file, 6, "names '../../\\x1b[2Jx' as the file of layer 0"),
    "F59 lost layer": (lost_layer, 6, "lists 2 layers, the model has 3"),
}


@pytest.mark.parametrize(("damage", "status", "message"), MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_bad_manifest_is_refused_before_anything_is_loaded(tmp_path, capsys, damage, status, message):
    directory = write_checkpoint(tmp_path / "model", layers=LAYERS)
    prepared = run(resolve_model(str(directory)))
    damage(prepared.directory / MANIFEST_NAME, prepared.manifest)
    assert main(["run", "--model", str(directory), "hello"]) == status
    assert message in told(capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda directory: edit(directory, "config.json", rope_theta=5.0), "is not prepared"),
        (lambda directory: os.utime(directory / SINGLE, (5, 5)), "written again since it was prepared"),
    ],
)
def test_a_source_that_changed_is_never_paired_with_old_substitutes(tmp_path, capsys, change, message):
    directory = write_checkpoint(tmp_path / "model", layers=LAYERS)
    prepared = run(resolve_model(str(directory)))
    change(directory)
    status = main(["run", "--model", str(directory), "hello"])
    line = told(capsys)
    assert status == 3
    assert "another version" in line or message in line
    assert read_manifest(prepared.directory / MANIFEST_NAME) == prepared.manifest


def test_a_set_moved_to_another_models_place_is_not_taken_for_it(tmp_path, capsys):
    """F58: the manifest says whose it is, whatever its directory is called."""
    places = [write_checkpoint(tmp_path / name, layers=LAYERS, seed=n) for n, name in enumerate("ab")]
    first, second = (run(resolve_model(str(place))) for place in places)
    shutil.copy(first.directory / MANIFEST_NAME, second.directory / MANIFEST_NAME)
    assert main(["run", "--model", str(places[1]), "hello"]) == 2
    assert f"{places[1]} is not prepared" in told(capsys)
    write_manifest(second.directory / MANIFEST_NAME, second.manifest)
    shutil.copy(first.directory / "layer-00000.safetensors", second.directory)
    assert main(["models", "verify", str(places[1])]) == 6
    assert "layer-00000.safetensors: wrong SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["prepare", "plan"])
def test_too_little_address_space_is_told_before_a_library_crashes(tmp_path, command):
    """`ulimit -v` in a process of its own; libraries end with a segmentation fault within it."""
    done = subprocess.run(
        ["bash", "-c", f'ulimit -v 600000; exec "$0" -m subspec_cli {command} demo', sys.executable],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 7
    assert "not enough address space to load torch: ulimit -v 600000 allows 585.9 MiB" in done.stderr
