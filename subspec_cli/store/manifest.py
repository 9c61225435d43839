"""manifest.json: what a prepared model was made from and what its files must be. Strict, no timestamps."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from subspec_cli.errors import IntegrityError, UnsupportedModelError
from subspec_cli.store.files import atomic_write, read_small_file
from subspec_cli.store.json_object import parse_json_object
from subspec_cli.units import printable

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
JOURNAL_NAME = "manifest.partial.json"
"""The same, of a preparation that has not ended: only the layers that are done."""

_MAX_MANIFEST_BYTES = 16 << 20
_AGAIN = "prepare the model again: subspec prepare MODEL --force"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WORD = re.compile(r"[A-Za-z0-9._-]{1,40}")
_MANIFEST_FIELDS = {
    "format_version": int,
    "model_id": str,
    "source_directory": str,
    "commit": str,
    "fingerprint": str,
    "source_stamp": str,
    "dtype": str,
    "settings": dict,
    "group_size": int,
    "layers": list,
    "tool_version": str,
    "library_versions": dict,
}
_SETTINGS_FIELDS = {"bits": int, "optimizer": str}
_LAYER_FIELDS = {"name": str, "layer": int, "size_bytes": int, "sha256": str, "source_sha256": str}


@dataclass(frozen=True, slots=True)
class SubstituteSettings:
    """How substitutes are quantized."""

    bits: int
    optimizer: str

    @property
    def label(self) -> str:
        """Short name, also in the directory's: qint4-minmax."""
        return f"qint{self.bits}-{self.optimizer}"


@dataclass(frozen=True, slots=True)
class LayerFile:
    """One file of substitutes."""

    name: str
    layer: int
    size_bytes: int
    sha256: str
    source_sha256: str
    """Of the layer's 16-bit bytes, in reading order."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A prepared model, and all it takes to know whether it fits its source."""

    model_id: str
    source_directory: str
    commit: str
    fingerprint: str
    """Of the checkpoint it was made from (`Checkpoint.fingerprint`)."""
    source_stamp: str
    """`Checkpoint.stamp` for a directory; empty for the hub, whose commits do not change."""
    dtype: str
    settings: SubstituteSettings
    group_size: int
    layers: tuple[LayerFile, ...]
    tool_version: str
    library_versions: Mapping[str, str]
    format_version: int = FORMAT_VERSION

    def is_of(self, other: Manifest) -> bool:
        """Whether both describe the same substitutes of the same model, but for the weights' content."""
        return self._identity() == other._identity()

    def is_made_like(self, other: Manifest) -> bool:
        """Whether layers of both may stand in one directory: `is_of`, by the same program and libraries."""
        return (
            self.is_of(other)
            and self.tool_version == other.tool_version
            and self.library_versions == other.library_versions
        )

    def _identity(self) -> tuple[object, ...]:
        return (self.model_id, self.commit, self.fingerprint, self.dtype, self.settings, self.group_size)


def layer_file_name(layer: int) -> str:
    """layer-00017.safetensors."""
    return f"layer-{layer:05d}.safetensors"


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write atomically; equal manifests give equal bytes. Raises ResourceError."""
    atomic_write(path, (json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n").encode())


def read_manifest(path: Path) -> Manifest:
    """Read a manifest or a journal.

    Raises:
        UnsupportedModelError: written by a newer version.
        IntegrityError: missing, damaged, or with names that are not its own.
        ResourceError: unreadable.
    """
    shown = printable(str(path))
    found = parse_json_object(read_small_file(path, _MAX_MANIFEST_BYTES), shown, IntegrityError, _AGAIN)
    version = found.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise UnsupportedModelError(
            f"{shown} has format {version}, this version of subspec reads format {FORMAT_VERSION}",
            "update subspec, or prepare the model again with --force",
        )
    if version != FORMAT_VERSION:
        raise _damaged(shown, f"has the format version {ascii(version)[:40]}, expected {FORMAT_VERSION}")
    _checked(found, _MANIFEST_FIELDS, shown)
    layers = tuple(_read_layer(item, shown) for item in found["layers"])
    if [item.layer for item in layers] != sorted({item.layer for item in layers}):
        raise _damaged(shown, "lists its layers twice or out of order")
    if not all(isinstance(text, str) for text in found["library_versions"].values()):
        raise _damaged(shown, "has library_versions that are not texts")
    return Manifest(**{**found, "settings": _read_settings(found["settings"], shown), "layers": layers})


def _read_settings(found: object, shown: str) -> SubstituteSettings:
    settings = SubstituteSettings(**_checked(found, _SETTINGS_FIELDS, f"{shown}: settings"))
    if not 1 <= settings.bits <= 16 or not _WORD.fullmatch(settings.optimizer):
        raise _damaged(shown, f"has settings that cannot be: {ascii(found)[:100]}")
    return settings


def _read_layer(found: object, shown: str) -> LayerFile:
    file = LayerFile(**_checked(found, _LAYER_FIELDS, f"{shown}: layers"))
    # The only name ever opened is the one made from the number, so a manifest cannot lead elsewhere.
    if file.layer < 0 or file.name != layer_file_name(file.layer):
        raise _damaged(shown, f"names {ascii(file.name)[:100]} as the file of layer {file.layer}")
    if (
        file.size_bytes <= 0
        or not _SHA256.fullmatch(file.sha256)
        or not _SHA256.fullmatch(file.source_sha256)
    ):
        raise _damaged(shown, f"has a size or a hash that cannot be, at layer {file.layer}")
    return file


def _checked(found: object, fields: Mapping[str, type], shown: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise _damaged(shown, f"holds a {type(found).__name__}, expected an object")
    if unknown := sorted(found.keys() - fields.keys()):
        raise _damaged(shown, f"has unknown keys: {ascii(', '.join(unknown))[:100]}")
    if missing := sorted(fields.keys() - found.keys()):
        raise _damaged(shown, f"lacks the keys: {', '.join(missing)}")
    for key, kind in fields.items():
        if type(found[key]) is not kind:
            raise _damaged(shown, f"has a {type(found[key]).__name__} at {key}, expected {kind.__name__}")
    return found


def _damaged(shown: str, text: str) -> IntegrityError:
    return IntegrityError(f"{shown} {text}", _AGAIN)
