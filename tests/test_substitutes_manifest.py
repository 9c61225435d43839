"""A manifest reads back as it was written; anything else is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from fakes_store import SETTINGS, SHA256, manifest_of

from subspec_cli.errors import IntegrityError, UnsupportedModelError
from subspec_cli.substitutes.manifest import LayerFile, layer_file_name, read_manifest, write_manifest
from subspec_cli.substitutes.quality import MatrixQuality, OutputQuality

QUALITY = {"q": MatrixQuality(1024, 544, 40.5, 0.125), "down": MatrixQuality(2048, 1088, 80.25, 0.0)}
TUNED = replace(QUALITY["down"], outputs=OutputQuality(900, 5.5, 0.5, 0.25))
Q_FIELDS = {"weights": 1024, "stored_bytes": 544, "signal": 40.5, "noise": 0.125}


def test_manifest_reads_back_and_is_always_the_same_bytes(tmp_path):
    manifest = manifest_of(
        layers=[LayerFile(layer_file_name(n), n, 10 + n, SHA256, SHA256, QUALITY) for n in range(3)],
        settings=replace(SETTINGS, overrides=(("mlp.down_proj", 8), ("self_attn.o_proj", 2))),
    )
    for name in ("a", "b"):
        write_manifest(tmp_path / name, manifest)
    assert read_manifest(tmp_path / "a") == manifest
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert SETTINGS.label == "qint4-minmax"
    assert manifest.settings.label == "qint4-minmax-down8-o2"
    assert manifest.settings.widths == {2, 4, 8}
    assert [manifest.settings.bits_of(name) for name in ("mlp.down_proj.weight", "mlp.up_proj")] == [8, 4]


def test_a_tuned_set_says_how_each_matrix_was_rounded_and_others_stay_as_they_were(tmp_path):
    files = [LayerFile(layer_file_name(0), 0, 10, SHA256, SHA256, {"q": QUALITY["q"], "down": TUNED})]
    write_manifest(tmp_path / "a", manifest_of(layers=files))
    assert read_manifest(tmp_path / "a").layers[0].quality["down"].outputs.is_tuned
    written = json.loads((tmp_path / "a").read_text())["layers"][0]["quality"]
    assert written["q"] == Q_FIELDS
    assert written["down"]["outputs"] == {"rows": 900, "signal": 5.5, "plain_noise": 0.5, "tuned_noise": 0.25}


def layer(**more) -> dict:
    return {
        "name": layer_file_name(0),
        "layer": 0,
        "size_bytes": 1,
        "sha256": SHA256,
        "source_sha256": SHA256,
        "quality": {"q": Q_FIELDS},
    } | more


def quality(**more) -> dict:
    return layer(quality={"down": Q_FIELDS | more})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("dtype"), "lacks the keys: dtype"),
        (lambda m: m.update(extra=1), "unknown keys: 'extra'"),
        (lambda m: m.update(group_size="128"), "a str at group_size, expected int"),
        (lambda m: m.update(group_size=True), "a bool at group_size"),
        (lambda m: m.update(format_version=0), "format version 0, expected 3"),
        (lambda m: m.update(format_version="1"), "format version '1'"),
        (lambda m: m.pop("format_version"), "format version None"),
        (lambda m: m.update(library_versions={"torch": 2}), "library_versions"),
        (lambda m: m["settings"].update(bits=99), "settings that cannot be"),
        (lambda m: m["settings"].update(optimizer="../x"), "settings that cannot be"),
        (lambda m: m["settings"].update(optimizer="tuoed"), "settings that cannot be"),
        (lambda m: m.update(tuning_text_sha256="b" * 63), "a tuning_text_sha256 that cannot be"),
        (lambda m: m.update(tuning_text_sha256=1), "a tuning_text_sha256 that cannot be"),
        (lambda m: m["settings"].pop("bits"), "settings lacks the keys: bits"),
        (lambda m: m.update(layers=[3]), "holds a int, expected an object"),
        (lambda m: m.update(layers=[layer(name="../../x")]), "'../../x' as the file of layer 0"),
        (lambda m: m.update(layers=[layer(layer=-1, name="layer--0001.safetensors")]), "file of layer -1"),
        (lambda m: m.update(layers=[layer(sha256="a" * 63)]), "a size or a hash that cannot be, at layer 0"),
        (lambda m: m.update(layers=[layer(size_bytes=0)]), "a size or a hash"),
        (lambda m: m.update(layers=[layer(), layer()]), "twice or out of order"),
        (lambda m: m.update(layers=[quality(outputs=None)]), "NoneType at outputs, expected dict"),
        (lambda m: m.update(layers=[quality(outputs={"rows": 1})]), "outputs lacks the keys: plain_noise"),
        (lambda m: m["settings"].update(bits=3), "settings that cannot be"),
        (lambda m: m["settings"].update(overrides={}), "a dict at overrides, expected list"),
        (lambda m: m["settings"].update(overrides=["mlp.down_proj"]), "settings that cannot be"),
        (lambda m: m["settings"].update(overrides=[["mlp.down_proj", True]]), "settings that cannot be"),
        (lambda m: m["settings"].update(overrides=[["mlp.down_proj", 3]]), "settings that cannot be"),
        (lambda m: m["settings"].update(overrides=[["mlp.side_proj", 8]]), "settings that cannot be"),
        (lambda m: m["settings"].update(overrides=[["../o_proj", 8]]), "settings that cannot be"),
        (lambda m: m["settings"].update(overrides=[["a.v_proj", 8], ["a.k_proj", 8]]), "cannot be"),
        (lambda m: m.update(layers=[layer(quality=[])]), "a list at quality, expected dict"),
        (lambda m: m.update(layers=[layer(quality={"x\x1b": {}})]), "unknown matrices: 'x.x1b'"),
        (lambda m: m.update(layers=[quality(more=1)]), "unknown keys: 'more'"),
        (lambda m: m.update(layers=[quality(noise=1)]), "a int at noise, expected float"),
        (lambda m: m.update(layers=[quality(noise=float("nan"))]), "a quality that cannot be, of down"),
        (lambda m: m.update(layers=[quality(signal=-1.0)]), "a quality that cannot be"),
        (lambda m: m.update(layers=[quality(weights=0)]), "a quality that cannot be"),
    ],
)  # fmt: skip
def test_manifest_is_strict(tmp_path, change, message):
    path = tmp_path / "manifest.json"
    write_manifest(path, manifest_of())
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match=message) as caught:
        read_manifest(path)
    assert str(path) in caught.value.message
    assert "--force" in caught.value.hint


def test_truncated_and_newer_manifest(tmp_path):
    path = tmp_path / "manifest.json"
    write_manifest(path, manifest_of())
    text = path.read_text()
    path.write_text(text[:50])
    with pytest.raises(IntegrityError, match="not JSON at byte"):
        read_manifest(path)
    path.write_text(json.dumps({"format_version": 4, "new": True}))
    with pytest.raises(UnsupportedModelError, match="has format 4, this version of subspec reads format 3"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("found", "hint"),
    [
        (
            {"model_id": "org/a b", "settings": {"bits": 8, "optimizer": "hqq"}},
            "subspec prepare 'org/a b' --force --bits 8 --optimizer hqq",
        ),
        ({"model_id": "a\x1b", "settings": {"bits": "x"}}, "subspec prepare 'a\\x1b' --force"),
        ({"model_id": 3}, "subspec prepare MODEL --force"),
    ],
)
def test_manifest_of_an_older_format_names_the_command_that_makes_it_again(tmp_path, found, hint):
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"format_version": 1} | found))
    with pytest.raises(UnsupportedModelError, match=r"has the old format 1, .* reads format 3") as caught:
        read_manifest(path)
    assert caught.value.hint == f"prepare the model again: {hint}"
