"""residuals.json: the residual files beside the substitutes of a prepared model, and the hashes of all three.

A layer counts once it is listed. The list is written after each layer, so an interrupted preparation goes on there.

A pass reads residuals without hashing them, so a file is used only as it was when its hash was last compared. Its
times are listed; with other times (a copy, a damage) it is hashed as a whole before it is used. No program can
set change times back.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from subspec_cli.checkpoint.checkpoint import SourceFile, source_file
from subspec_cli.checkpoint.geometry import ModelGeometry, StoredBytes
from subspec_cli.checkpoint.layer_tensors import block_entries
from subspec_cli.checkpoint.residual_names import parts_of
from subspec_cli.checkpoint.safetensors_header import TensorEntry, read_header
from subspec_cli.errors import IntegrityError, SubspecError, UnsupportedModelError
from subspec_cli.files.atomic_write import atomic_write
from subspec_cli.files.json_object import parse_json_object
from subspec_cli.files.lock import directory_lock
from subspec_cli.files.regular_file import has_size, read_small_file, sha256_file
from subspec_cli.hub.command_hints import repair_command
from subspec_cli.substitutes.manifest import Manifest
from subspec_cli.units import counted, format_bytes, printable

RESIDUALS_NAME: Final = "residuals.json"
RESIDUAL_NAME: Final = re.compile(r"residual-[0-9]{5,6}\.safetensors")
_FORMAT: Final = 1
_MOST_BYTES: Final = 16 << 20
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_FIELDS: Final[Mapping[str, type]] = {
    "layer": int,
    "size_bytes": int,
    "sha256": str,
    "source_sha256": str,
    "substitute_sha256": str,
    "weights": int,
    "raw_weights": int,
}
_TIMES: Final = ("mtime_ns", "ctime_ns")
"""Fields that lists of earlier versions lack."""


@dataclass(frozen=True, slots=True)
class ResidualFile:
    """The residuals of one layer, and what they belong to."""

    layer: int
    size_bytes: int
    sha256: str
    source_sha256: str
    """Of the layer's 16-bit bytes, as in the manifest."""
    substitute_sha256: str
    """Of the substitute file whose codes are the base."""
    weights: int
    """Weights of the layer's matrices."""
    raw_weights: int
    """Those of matrices that have no residual and are streamed from the source."""
    mtime_ns: int = 0
    ctime_ns: int = 0
    """Times of the file when its hash was last compared; 0 in lists of earlier versions."""

    def with_times(self, status: os.stat_result) -> ResidualFile:
        """Return this record with the times that the file had just before it was hashed."""
        return replace(self, mtime_ns=status.st_mtime_ns, ctime_ns=status.st_ctime_ns)

    @property
    def name(self) -> str:
        """residual-00017.safetensors."""
        return f"residual-{self.layer:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class ResidualSet:
    """The residuals of all layers of a prepared model."""

    directory: Path
    files: tuple[ResidualFile, ...]
    opened: tuple[SourceFile, ...]
    """The files as they were found: each pass reads them, so a change must be noticed."""

    def blocks(self, tensors: Mapping[str, TensorEntry], layer: int) -> list[list[TensorEntry]]:
        """The entries of each block of a layer as it is streamed: residuals, and those of `tensors` that have none.

        Raises IntegrityError for a file that is not as it was written.
        """
        file = self.files[layer]
        path = self.directory / file.name
        if path.is_symlink() or not has_size(path, file.size_bytes):
            raise IntegrityError(f"{printable(str(path))} is missing or has another size")
        found = {entry.name: entry for entry in read_header(path).entries}
        return [
            [
                part
                for entry in block
                for part in (
                    [found[name] for name in parts_of(entry.name)]
                    if parts_of(entry.name)[0] in found
                    else [entry]
                )
            ]
            for block in block_entries(tensors, layer)
        ]

    def streamed(self, geometry: ModelGeometry, tensors: Mapping[str, TensorEntry]) -> StoredBytes:
        """The sizes of layers and blocks on the link."""
        blocks = [
            [sum(entry.size_bytes for entry in block) for block in self.blocks(tensors, layer)]
            for layer in range(geometry.layers)
        ]
        return StoredBytes(tuple(map(sum, blocks)), max(map(max, blocks)))


def find_residuals(directory: Path, manifest: Manifest) -> ResidualSet | None:
    """The residuals of a complete set of substitutes; None if there are none, or all matrices are streamed raw.

    Errors as `complete_residuals`.
    """
    found = complete_residuals(directory, manifest)
    if found is None or all(file.raw_weights == file.weights for file in found.files):
        return None
    return found


def complete_residuals(directory: Path, manifest: Manifest) -> ResidualSet | None:
    """The listed residuals, if every layer of a complete set has its own; None if there is no list.

    No residual is read: `compared_residuals` decides whether they may be used.

    Raises:
        IntegrityError: the list is damaged or not complete, or a file is missing or belongs to other files.
        UnsupportedModelError: a newer version wrote the list.
    """
    if not (listed := read_residuals(directory)):
        return None
    for file in listed:
        path = directory / file.name
        if problem := problem_of(file, manifest):
            raise IntegrityError(f"{printable(str(path))} {problem}")
        if path.is_symlink() or not has_size(path, file.size_bytes):
            raise IntegrityError(f"{printable(str(path))} is missing or has another size")
    if len(listed) < len(manifest.layers):
        raise IntegrityError(
            f"{len(listed)} of {counted(len(manifest.layers), 'layer')} have them",
            f"the rest: subspec prepare {shlex.quote(printable(manifest.model_id))} --residual",
        )
    opened = tuple(source_file(file.name, (directory / file.name).stat()) for file in listed)
    return ResidualSet(directory, tuple(listed), opened)


def compared_residuals(found: ResidualSet, manifest: Manifest, note: Callable[[str], None]) -> ResidualSet:
    """The residuals, after files with other times than when they were last hashed are hashed again.

    The new times are recorded, so that this happens once. Raises IntegrityError for a file with another hash.
    """
    touched = [
        file
        for file, opened in zip(found.files, found.opened, strict=True)
        if (file.mtime_ns, file.ctime_ns) != (opened.mtime_ns, opened.ctime_ns)
    ]
    if not touched:
        return found
    size = format_bytes(sum(file.size_bytes for file in touched))
    note(f"hashing {size} of residuals: the files were copied or written since they were last hashed")
    for file in touched:
        path = found.directory / file.name
        if (sha256 := sha256_file(path)) != file.sha256:
            raise IntegrityError(
                f"{printable(str(path))} has the SHA-256 {sha256}, expected {file.sha256}",
                repair_command(manifest.model_id),
            )
    files = tuple(
        replace(file, mtime_ns=opened.mtime_ns, ctime_ns=opened.ctime_ns)
        for file, opened in zip(found.files, found.opened, strict=True)
    )
    # Without the record (a read-only disk, a preparation that runs) they are hashed again the next time.
    with contextlib.suppress(SubspecError), directory_lock(found.directory):
        if read_residuals(found.directory) == list(found.files):
            write_residuals(found.directory, files)
    return replace(found, files=files)


def problem_of(file: ResidualFile, manifest: Manifest) -> str:
    """Why listed residuals do not belong to a set; empty if they do."""
    layer = next((item for item in manifest.layers if item.layer == file.layer), None)
    if layer is None:
        return f"is of layer {file.layer}, which the set lacks"
    if (file.source_sha256, file.substitute_sha256) == (layer.source_sha256, layer.sha256):
        return ""
    return f"is listed as of other weights or another substitute than {layer.name}"


def read_residuals(directory: Path) -> list[ResidualFile]:
    """The residual files that are listed, ascending; none if there is no list. Errors as `find_residuals`."""
    path = directory / RESIDUALS_NAME
    if not path.exists():
        return []
    shown, hint = printable(str(path)), "remove it, then: subspec prepare MODEL --residual"
    document = parse_json_object(read_small_file(path, _MOST_BYTES), shown, IntegrityError, hint)
    version, items = document.get("format_version"), document.get("files")
    if type(version) is int and version > _FORMAT:
        raise UnsupportedModelError(
            f"{shown} has format {version}, this version reads {_FORMAT}", "update subspec"
        )
    if version != _FORMAT or not isinstance(items, list):
        raise IntegrityError(f"{shown} is damaged", hint)
    files = [_read_file(item, shown, hint) for item in items]
    if [file.layer for file in files] != sorted({file.layer for file in files}):
        raise IntegrityError(f"{shown} lists its layers twice or out of order", hint)
    return files


def write_residuals(directory: Path, files: Sequence[ResidualFile]) -> None:
    """Write the list atomically. Raises ResourceError."""
    document = {"format_version": _FORMAT, "files": [asdict(file) for file in files]}
    atomic_write(directory / RESIDUALS_NAME, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())


def usable_residuals(directory: Path, manifest: Manifest) -> tuple[ResidualSet | None, str]:
    """As `find_residuals`, with the reason in place of an error if they cannot be used."""
    try:
        return find_residuals(directory, manifest), ""
    except SubspecError as error:
        return None, f"{error.message}; {error.hint or repair_command(manifest.model_id)}"


def _read_file(item: object, shown: str, hint: str) -> ResidualFile:
    if not isinstance(item, dict) or item.keys() - set(_TIMES) != _FIELDS.keys():
        raise IntegrityError(f"{shown} has an entry that cannot be", hint)
    values: dict[str, Any] = item
    hashes = [values[name] for name in ("sha256", "source_sha256", "substitute_sha256")]
    if (
        any(type(values[name]) is not kind for name, kind in _FIELDS.items())
        or min(values["layer"], values["raw_weights"]) < 0
        or min(values["size_bytes"], values["weights"]) <= 0
        or any(type(values[name]) is not int for name in item.keys() & set(_TIMES))
        or not all(_SHA256.fullmatch(text) for text in hashes)
    ):
        raise IntegrityError(f"{shown} has an entry that cannot be", hint)
    return ResidualFile(**values)
