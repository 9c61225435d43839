"""manifest.json: what a prepared model was made from, and the hashes of its files. Strict; no timestamps."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from subspec_cli.errors import IntegrityError, UnsupportedModelError
from subspec_cli.files.atomic_write import atomic_write
from subspec_cli.files.json_object import parse_json_object
from subspec_cli.files.regular_file import read_small_file
from subspec_cli.hub.command_hints import prepare_command
from subspec_cli.setting_rules import BIT_WIDTHS
from subspec_cli.substitutes.quality import MATRIX_KINDS, MatrixQuality, OutputQuality, matrix_kind
from subspec_cli.substitutes.settings import OPTIMIZERS, SubstituteSettings
from subspec_cli.units import printable

FORMAT_VERSION = 3
_OLDEST_FORMAT = 2
"""Sets of this format have no head file, and run as they are."""
MANIFEST_NAME = "manifest.json"
HEAD_NAME: Final = "head.safetensors"
JOURNAL_NAME = "manifest.partial.json"
"""The manifest of a preparation that has not ended: it lists only the files that are done."""
TUNING_TEXT_NAME = "tuning-text.json"
"""The model's own text that substitutes were tuned with."""

_MAX_MANIFEST_BYTES = 16 << 20
_RETRY_HINT = "prepare the model again: subspec prepare MODEL --force"
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
_SETTINGS_FIELDS = {"bits": int, "optimizer": str, "overrides": list}
_FILE_FIELDS = {
    "name": str,
    "size_bytes": int,
    "sha256": str,
    "source_sha256": str,
    "quality": dict,
}
_LAYER_FIELDS = {**_FILE_FIELDS, "layer": int}
_QUALITY_FIELDS = {"weights": int, "stored_bytes": int, "signal": float, "noise": float}
_OUTPUT_FIELDS = {"rows": int, "signal": float, "plain_noise": float, "tuned_noise": float}

Part: TypeAlias = int | Literal["head"]
"""What a file replaces: the layer of this number, or the head."""


@dataclass(frozen=True, slots=True)
class LayerFile:
    """The substitute file of one layer."""

    name: str
    layer: int
    size_bytes: int
    sha256: str
    source_sha256: str
    """SHA-256 of the layer's 16-bit bytes, in reading order."""
    quality: Mapping[str, MatrixQuality] = field(default_factory=dict)
    """Size and quantization error by the kind of matrix."""

    @property
    def part(self) -> Part:
        """The layer's number."""
        return self.layer


@dataclass(frozen=True, slots=True)
class HeadFile:
    """The file of the draft's head: the vocabulary table in 4 bits."""

    name: str
    size_bytes: int
    sha256: str
    source_sha256: str
    """SHA-256 of the table's 16-bit bytes."""
    quality: MatrixQuality

    @property
    def part(self) -> Part:
        """The head."""
        return "head"


StoredFile: TypeAlias = LayerFile | HeadFile


@dataclass(frozen=True, slots=True)
class Manifest:
    """Describes a prepared model, with all that is needed to check that it fits its source."""

    model_id: str
    source_directory: str
    commit: str
    fingerprint: str
    """`Checkpoint.fingerprint` of the source."""
    source_stamp: str
    """`make_stamp` of a directory; empty for a model on the hub, where commits do not change."""
    dtype: str
    settings: SubstituteSettings
    group_size: int
    layers: tuple[LayerFile, ...]
    tool_version: str
    library_versions: Mapping[str, str]
    head: HeadFile | None = None
    """None in older sets, and where no low-bit kernel takes the table's shape."""
    tuning_text_sha256: str | None = None
    """Of the file of the text that layers were tuned with; None in sets of other optimizers, and in older ones."""
    format_version: int = FORMAT_VERSION

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """All files of the set, in the order in which they are made."""
        return self.layers if self.head is None else (*self.layers, self.head)

    def with_files(self, files: Iterable[StoredFile]) -> Manifest:
        """Return this manifest with these files alone."""
        known = list(files)
        layers = sorted((file for file in known if isinstance(file, LayerFile)), key=lambda file: file.layer)
        head = next((file for file in known if isinstance(file, HeadFile)), None)
        return replace(self, layers=tuple(layers), head=head)

    def is_same_set_as(self, other: Manifest) -> bool:
        """Whether both describe the same substitutes of the same model. The weights' content is not compared."""
        return self._identity() == other._identity()

    def is_same_build_as(self, other: Manifest) -> bool:
        """Whether layers of both may share a directory: `is_same_set_as`, made by the same program and libraries."""
        return (
            self.is_same_set_as(other)
            and self.tool_version == other.tool_version
            and self.library_versions == other.library_versions
        )

    def _identity(self) -> tuple[object, ...]:
        return (self.model_id, self.commit, self.fingerprint, self.dtype, self.settings, self.group_size)


def layer_file_name(layer: int) -> str:
    """layer-00017.safetensors."""
    return f"layer-{layer:05d}.safetensors"


def file_path(directory: Path, name: str) -> Path:
    """Path of a file of a set. Raises IntegrityError for a link: nobody but this program writes the directory."""
    path = directory / name
    if path.is_symlink():
        raise IntegrityError(
            f"{printable(str(path))} is a link to {printable(os.readlink(path))}, not a file"
        )
    return path


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest atomically. Equal manifests give equal bytes. Raises ResourceError."""
    found = asdict(manifest, dict_factory=lambda pairs: {key: v for key, v in pairs if v is not None})
    atomic_write(path, (json.dumps(found, indent=1, sort_keys=True) + "\n").encode())


def read_manifest(path: Path) -> Manifest:
    """Read a manifest or a journal.

    Raises:
        UnsupportedModelError: written by a newer version, or in an older format.
        IntegrityError: missing, damaged, or naming files that are not its own.
        ResourceError: unreadable.
    """
    shown = printable(str(path))
    found = parse_json_object(read_small_file(path, _MAX_MANIFEST_BYTES), shown, IntegrityError, _RETRY_HINT)
    version = found.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise UnsupportedModelError(
            f"{shown} has format {version}, this version of subspec reads format {FORMAT_VERSION}",
            "update subspec, or prepare the model again with --force",
        )
    if type(version) is int and 1 <= version < _OLDEST_FORMAT:
        raise UnsupportedModelError(
            f"{shown} has the old format {version}, this version of subspec reads format {FORMAT_VERSION}",
            f"prepare the model again: {_command_for(found)}",
        )
    if type(version) is not int or version < 1:
        raise _damaged(shown, f"has the format version {ascii(version)[:40]}, expected {FORMAT_VERSION}")
    head, text_sha256 = found.pop("head", None), found.pop("tuning_text_sha256", None)
    _checked(found, _MANIFEST_FIELDS, shown)
    layers = tuple(_read_layer(item, shown) for item in found["layers"])
    if [item.layer for item in layers] != sorted({item.layer for item in layers}):
        raise _damaged(shown, "lists its layers twice or out of order")
    if not all(isinstance(text, str) for text in found["library_versions"].values()):
        raise _damaged(shown, "has library_versions that are not texts")
    if text_sha256 is not None and not (isinstance(text_sha256, str) and _SHA256.fullmatch(text_sha256)):
        raise _damaged(shown, "has a tuning_text_sha256 that cannot be")
    made = {
        "tuning_text_sha256": text_sha256,
        "settings": _read_settings(found["settings"], shown),
        "layers": layers,
        "head": None if head is None else _read_head(head, shown),
    }
    return Manifest(**{**found, **made})


def _read_settings(found: object, shown: str) -> SubstituteSettings:
    fields = _checked(found, _SETTINGS_FIELDS, f"{shown}: settings")
    overrides = tuple(tuple(pair) if isinstance(pair, list) else pair for pair in fields["overrides"])
    settings = SubstituteSettings(**{**fields, "overrides": overrides})
    if (
        settings.bits not in BIT_WIDTHS
        or settings.optimizer not in OPTIMIZERS
        or not all(_is_override(pair) for pair in overrides)
        or [name for name, _ in overrides] != sorted({name for name, _ in overrides})
    ):
        raise _damaged(shown, f"has settings that cannot be: {ascii(found)[:100]}")
    return settings


def _is_override(pair: object) -> bool:
    if not isinstance(pair, tuple) or [type(item) for item in pair] != [str, int]:
        return False
    return bool(_WORD.fullmatch(pair[0])) and matrix_kind(pair[0]) in MATRIX_KINDS and pair[1] in BIT_WIDTHS


def _read_qualities(found: Mapping[str, object], shown: str) -> dict[str, MatrixQuality]:
    if unknown := sorted(found.keys() - set(MATRIX_KINDS)):
        raise _damaged(shown, f"has the quality of unknown matrices: {ascii(', '.join(unknown))[:100]}")
    return {kind: _read_quality(item, kind, shown) for kind, item in found.items()}


def _read_quality(found: object, kind: str, shown: str) -> MatrixQuality:
    quality = _read_matrix_quality(found, f"{shown}: quality")
    powers = [quality.signal, quality.noise]
    if (outputs := quality.outputs) is not None:
        powers += [outputs.signal, outputs.plain_noise, outputs.tuned_noise, outputs.rows]
    if quality.weights <= 0 or quality.stored_bytes <= 0 or not all(0 <= p < math.inf for p in powers):
        raise _damaged(shown, f"has a quality that cannot be, of {kind}")
    return quality


def _read_matrix_quality(found: object, shown: str) -> MatrixQuality:
    if not isinstance(found, dict) or "outputs" not in found:
        return MatrixQuality(**_checked(found, _QUALITY_FIELDS, shown))
    fields = _checked(found, {**_QUALITY_FIELDS, "outputs": dict}, shown)
    outputs = OutputQuality(**_checked(fields["outputs"], _OUTPUT_FIELDS, f"{shown}: outputs"))
    return MatrixQuality(**{**fields, "outputs": outputs})


def _command_for(found: Mapping[str, Any]) -> str:
    """The command that prepares again what an older manifest describes; unreadable options are left out."""
    model_id, settings = found.get("model_id"), found.get("settings")
    if not isinstance(model_id, str) or not isinstance(settings, dict):
        return "subspec prepare MODEL --force"
    optimizer = settings.get("optimizer")
    return prepare_command(
        model_id,
        bits=settings["bits"] if settings.get("bits") in BIT_WIDTHS else None,
        optimizer="hqq" if optimizer == "hqq" else None,
        force=True,
    )


def _read_layer(found: object, shown: str) -> LayerFile:
    fields = _checked(found, _LAYER_FIELDS, f"{shown}: layers")
    file = LayerFile(**{**fields, "quality": _read_qualities(fields["quality"], shown)})
    # Only the name made from the number is ever opened, so a manifest cannot lead elsewhere.
    if file.layer < 0 or file.name != layer_file_name(file.layer):
        raise _damaged(shown, f"names {ascii(file.name)[:100]} as the file of layer {file.layer}")
    _check_size_and_hashes(file, f"layer {file.layer}", shown)
    return file


def _read_head(found: object, shown: str) -> HeadFile:
    fields = _checked(found, _FILE_FIELDS, f"{shown}: head")
    file = HeadFile(**{**fields, "quality": _read_quality(fields["quality"], "the head", shown)})
    if file.name != HEAD_NAME:
        raise _damaged(shown, f"names {ascii(file.name)[:100]} as the file of the head")
    _check_size_and_hashes(file, "the head", shown)
    return file


def _check_size_and_hashes(file: StoredFile, what: str, shown: str) -> None:
    hashes = (file.sha256, file.source_sha256)
    if file.size_bytes <= 0 or not all(_SHA256.fullmatch(sha256) for sha256 in hashes):
        raise _damaged(shown, f"has a size or a hash that cannot be, at {what}")


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
    return IntegrityError(f"{shown} {text}", _RETRY_HINT)
