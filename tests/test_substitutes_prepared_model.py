"""Finding prepared models, and checked loads of their layers."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace

import pytest
from checkpoints import safetensors_bytes, write_checkpoint
from fakes_store import SETTINGS, SHA256, manifest_of, write_prepared

from subspec_cli.checkpoint.checkpoint import open_checkpoint
from subspec_cli.errors import ExitCode, IntegrityError, UnsupportedModelError, UsageError
from subspec_cli.files.home import prepared_root
from subspec_cli.substitutes.last_use import mark_used
from subspec_cli.substitutes.manifest import LayerFile, layer_file_name
from subspec_cli.substitutes.prepared_model import (
    PreparedModel,
    check_pairing,
    find_prepared,
    load_layer,
    prepared_directory,
)
from subspec_cli.substitutes.settings import SubstituteSettings


@pytest.fixture(autouse=True)
def subspec_home(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))


def with_layer(tensors) -> PreparedModel:
    data = safetensors_bytes(tensors)
    file = LayerFile(layer_file_name(0), 0, len(data), hashlib.sha256(data).hexdigest(), SHA256)
    prepared = write_prepared(manifest_of(layers=[file]))
    (prepared.directory / file.name).write_bytes(data)
    return prepared


def test_directory_is_safe_short_and_distinct():
    one = prepared_directory("org/tiny", "c" * 40, SETTINGS)
    assert one.parent == prepared_root()
    assert one.name.startswith("org--tiny--cccccccc--qint4-minmax--")
    names = {
        prepared_directory(model, commit, settings).name.lower()
        for model in ("org/tiny", "Org/tiny", "org--tiny", "/a b/\u00e9\x1b", "/" + "x" * 900, "demo")
        for commit in ("c" * 40, "d" * 40)
        for settings in (SETTINGS, SubstituteSettings(8, "minmax"), SubstituteSettings(4, "hqq"))
    }
    assert len(names) == 36
    assert all(
        len(name) < 200 and name.isascii() and name.isprintable() and "/" not in name for name in names
    )


def test_most_recent_of_all_or_of_a_model(tmp_path):
    directory = write_checkpoint(tmp_path / "local")
    demo = write_prepared(manifest_of("demo"), age_s=5)
    local = write_prepared(manifest_of(str(directory)), age_s=4)
    older = write_prepared(manifest_of("org/tiny", commit="d" * 40), age_s=3)
    eight = write_prepared(manifest_of("org/tiny", settings=SubstituteSettings(8, "minmax")), age_s=1)
    newer = write_prepared(manifest_of("org/tiny"), age_s=2)
    (prepared_root() / "unfinished").mkdir()
    assert find_prepared(None) == find_prepared("org/tiny") == find_prepared(None, 8) == eight
    assert find_prepared("org/tiny", 4) == newer
    assert find_prepared("demo") == demo
    assert find_prepared(str(directory)) == find_prepared(f"{directory}/../local") == local
    os.utime(older.directory / "manifest.json", (2_000_000_001,) * 2)
    assert find_prepared("org/tiny") == older


NOTHING_YET = "subspec prepare demo (shipped), or another: subspec prepare Qwen/Qwen2.5-7B-Instruct"


def test_nothing_prepared_names_the_command(tmp_path):
    for model, bits, message, hint in (
        (None, None, "no model is prepared yet", NOTHING_YET),
        ("org/tiny", None, "org/tiny is not prepared", "subspec prepare org/tiny"),
        ("org/tiny", 8, "org/tiny is not prepared", "subspec prepare org/tiny --bits 8"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            find_prepared(model, bits)
        assert (caught.value.hint, caught.value.exit_code) == (hint, ExitCode.USAGE)
    write_prepared(manifest_of())
    with pytest.raises(UsageError, match="org/tiny is prepared with qint4-minmax, not with 8 bits"):
        find_prepared("org/tiny", 8)
    with pytest.raises(UsageError, match="no model is prepared with 8-bit substitutes yet"):
        find_prepared(None, 8)
    with pytest.raises(UsageError, match="no such directory"):
        find_prepared("./nowhere")


def test_the_model_used_last_is_the_default():
    used = write_prepared(manifest_of("org/tiny"), age_s=9)
    demo = write_prepared(manifest_of("demo"))
    assert find_prepared(None) == demo
    mark_used(used.directory)
    assert find_prepared(None) == used
    newer = write_prepared(manifest_of("org/tiny", commit="d" * 40), age_s=8)
    assert find_prepared(None) == newer  # of the model used last, what was prepared last
    eight = write_prepared(manifest_of("demo", settings=SubstituteSettings(8, "minmax")), age_s=2)
    assert find_prepared(None, 8) == eight


def test_the_last_name_of_a_prepared_model_is_enough(tmp_path, monkeypatch):
    directory = write_checkpoint(tmp_path / "far" / "smol-135m")
    local = write_prepared(manifest_of(str(directory)))
    tiny = write_prepared(manifest_of("org/tiny"))
    assert (find_prepared("smol-135m"), find_prepared("tiny")) == (local, tiny)
    write_prepared(manifest_of("other/tiny"))
    with pytest.raises(UsageError, match="tiny may be org/tiny or other/tiny") as caught:
        find_prepared("tiny")
    assert caught.value.hint == "give the whole name, such as org/tiny"
    for typed, meant in (("smol-135", "smol-135m"), ("Smol-135M", "smol-135m"), ("org/tiyn", "org/tiny")):
        with pytest.raises(UsageError, match="is not prepared") as caught:
            find_prepared(typed)
        assert caught.value.hint == f"did you mean --model {meant}? if not: subspec prepare {typed}"
    # A directory of this name, here, is what the user sees and means.
    write_checkpoint(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"{tmp_path}/tiny is not prepared"):
        find_prepared("tiny")


def test_damaged_manifest_of_another_model_is_no_obstacle():
    wanted = write_prepared(manifest_of("demo"), age_s=9)
    broken = write_prepared(manifest_of("org/tiny"))
    (broken.directory / "manifest.json").write_text("{")
    os.utime(broken.directory / "manifest.json", (2_000_000_000,) * 2)
    assert find_prepared("demo") == wanted
    for model in ("org/tiny", None):
        with pytest.raises(IntegrityError, match="not JSON"):
            find_prepared(model)


def test_layer_is_loaded_as_written():
    import torch

    prepared = with_layer(
        {
            "a.weight._data": ("U8", (2, 3), b"abcdef"),
            "a.scale": ("BF16", (1,), b"\x80\x3f"),
            "n": ("F32", (), bytes(4)),
        }
    )
    found = load_layer(prepared, 0)
    assert found["a.weight._data"].tolist() == [[97, 98, 99], [100, 101, 102]]
    assert found["a.scale"].dtype == torch.bfloat16
    assert found["a.scale"].item() == 1.0
    assert found["n"].shape == ()


def test_unaligned_tensor_is_copied_not_misread():
    found = load_layer(with_layer({"a": ("U8", (1,), b"x"), "b": ("F32", (1,), b"\0\0\x80\x3f")}), 0)
    assert found["b"].item() == 1.0


def test_damaged_layer_names_file_hashes_and_repair():
    prepared = with_layer({"a": ("U8", (4,), b"abcd")})
    path = prepared.directory / layer_file_name(0)
    good = path.read_bytes()
    bad = good[:-1] + b"x"
    path.write_bytes(bad)
    with pytest.raises(IntegrityError) as caught:
        load_layer(prepared, 0)
    for part in (str(path), hashlib.sha256(bad).hexdigest(), prepared.manifest.layers[0].sha256):
        assert part in caught.value.message
    assert caught.value.hint == "subspec models verify org/tiny --repair"
    path.write_bytes(good + b"x")
    with pytest.raises(IntegrityError, match=rf"has {len(good) + 1} bytes, expected {len(good)}"):
        load_layer(prepared, 0)
    path.unlink()
    with pytest.raises(IntegrityError, match="ENOENT") as caught:
        load_layer(prepared, 0)
    assert caught.value.hint == "subspec models verify org/tiny --repair"
    os.mkfifo(path)
    with pytest.raises(IntegrityError, match="named pipe"):
        load_layer(prepared, 0)
    with pytest.raises(IntegrityError, match="lists no layer 1"):
        load_layer(prepared, 1)


def test_layer_that_is_a_link_out_of_its_directory_is_not_opened(tmp_path):
    prepared = with_layer({"a": ("U8", (4,), b"abcd")})
    path = prepared.directory / layer_file_name(0)
    elsewhere = path.rename(tmp_path / "elsewhere")
    path.symlink_to(elsewhere)
    with pytest.raises(IntegrityError, match=r"is a link to .*elsewhere") as caught:
        load_layer(prepared, 0)
    assert caught.value.hint == "subspec models verify org/tiny --repair"


def test_hashed_file_is_still_parsed_with_suspicion():
    data = b"not a safetensors file at all"
    file = LayerFile(layer_file_name(0), 0, len(data), hashlib.sha256(data).hexdigest(), SHA256)
    prepared = write_prepared(manifest_of(layers=[file]))
    (prepared.directory / file.name).write_bytes(data)
    with pytest.raises(IntegrityError, match="claims a header"):
        load_layer(prepared, 0)


def test_source_must_be_the_one_prepared(tmp_path):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m"))
    layers = [LayerFile(layer_file_name(n), n, 1, SHA256, SHA256) for n in range(3)]
    good = manifest_of(fingerprint=checkpoint.fingerprint, source_stamp=checkpoint.stamp, layers=layers)
    here = prepared_directory("org/tiny", "c" * 40, SETTINGS)
    check_pairing(PreparedModel(here, good), checkpoint)
    check_pairing(PreparedModel(here, replace(good, source_stamp="")), checkpoint)
    with pytest.raises(UnsupportedModelError, match=checkpoint.fingerprint) as caught:
        check_pairing(PreparedModel(here, replace(good, fingerprint="0" * 40)), checkpoint)
    assert "0" * 40 in caught.value.message
    assert caught.value.hint == "subspec prepare org/tiny --bits 4"
    with pytest.raises(UnsupportedModelError, match="written again since it was prepared"):
        check_pairing(PreparedModel(here, replace(good, source_stamp="0" * 16)), checkpoint)
    with pytest.raises(IntegrityError, match="lists 2 layers, the model has 3"):
        check_pairing(PreparedModel(here, replace(good, layers=tuple(layers[:2]))), checkpoint)
