"""The manifest reads back what was written and nothing else."""

from __future__ import annotations

import json

import pytest
from test_store_fakes import SETTINGS, SHA256, manifest_of

from subspec_cli.errors import IntegrityError, UnsupportedModelError
from subspec_cli.store.manifest import LayerFile, layer_file_name, read_manifest, write_manifest


def test_manifest_reads_back_and_is_always_the_same_bytes(tmp_path):
    manifest = manifest_of(
        layers=[LayerFile(layer_file_name(n), n, 10 + n, SHA256, SHA256) for n in range(3)]
    )
    for name in ("a", "b"):
        write_manifest(tmp_path / name, manifest)
    assert read_manifest(tmp_path / "a") == manifest
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert SETTINGS.label == "qint4-minmax"


def layer(**more) -> dict:
    return {
        "name": layer_file_name(0),
        "layer": 0,
        "size_bytes": 1,
        "sha256": SHA256,
        "source_sha256": SHA256,
    } | more


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m.pop("dtype"), "lacks the keys: dtype"),
        (lambda m: m.update(extra=1), "unknown keys: 'extra'"),
        (lambda m: m.update(group_size="128"), "a str at group_size, expected int"),
        (lambda m: m.update(group_size=True), "a bool at group_size"),
        (lambda m: m.update(format_version=0), "format version 0, expected 1"),
        (lambda m: m.update(format_version="1"), "format version '1'"),
        (lambda m: m.pop("format_version"), "format version None"),
        (lambda m: m.update(library_versions={"torch": 2}), "library_versions"),
        (lambda m: m["settings"].update(bits=99), "settings that cannot be"),
        (lambda m: m["settings"].update(optimizer="../x"), "settings that cannot be"),
        (lambda m: m["settings"].pop("bits"), "settings lacks the keys: bits"),
        (lambda m: m.update(layers=[3]), "holds a int, expected an object"),
        (lambda m: m.update(layers=[layer(name="../../x")]), "'../../x' as the file of layer 0"),
        (lambda m: m.update(layers=[layer(layer=-1, name="layer--0001.safetensors")]), "file of layer -1"),
        (lambda m: m.update(layers=[layer(sha256="a" * 63)]), "a size or a hash that cannot be, at layer 0"),
        (lambda m: m.update(layers=[layer(size_bytes=0)]), "a size or a hash"),
        (lambda m: m.update(layers=[layer(), layer()]), "twice or out of order"),
    ],
)  # fmt: skip
def test_manifest_is_strict(tmp_path, change, told):
    path = tmp_path / "manifest.json"
    write_manifest(path, manifest_of())
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match=told) as caught:
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
    path.write_text(json.dumps({"format_version": 2, "new": True}))
    with pytest.raises(UnsupportedModelError, match="has format 2, this version of subspec reads format 1"):
        read_manifest(path)
