"""The layers of an earlier preparation that are still valid, so that a rerun makes only the others."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from subspec_cli.checkpoint.checkpoint import Checkpoint, layer_count_in_tensors, layer_entries
from subspec_cli.checkpoint.tensor_reader import read_hashed_tensors
from subspec_cli.errors import IntegrityError, SubspecError
from subspec_cli.files.home import prepared_root
from subspec_cli.files.regular_file import FileState, file_state, has_size, read_small_file, sha256_file
from subspec_cli.substitutes.manifest import JOURNAL_NAME, MANIFEST_NAME, LayerFile, Manifest, read_manifest
from subspec_cli.substitutes.source_stamp import is_equal_stamp

Twins: TypeAlias = dict[tuple[int, str], tuple[Path, LayerFile]]
"""Layers of other sets with equal settings and headers (a copy of the model, another commit): the directory and the
record, by the layer and the SHA-256 of its 16-bit bytes."""


def finished_manifest(directory: Path, goal: Manifest, layer_count: int) -> Manifest | None:
    """The manifest of a complete set like `goal` in `directory`, if there is one. The layers are not read.

    Raises:
        UnsupportedModelError: the manifest is a newer version's.
        ResourceError: the manifest cannot be read.
    """
    if (directory / JOURNAL_NAME).exists():
        return None
    found = _read_usable(directory / MANIFEST_NAME)
    if (
        found is None
        or not found.is_same_set_as(goal)
        or not is_equal_stamp(found.source_stamp, goal.source_stamp)
    ):
        return None
    if [file.layer for file in found.layers] != list(range(layer_count)):
        return None
    return found if all(_is_present(directory, file) for file in found.layers) else None


def reusable_layers(
    directory: Path, goal: Manifest, checkpoint: Checkpoint
) -> Iterator[tuple[LayerFile, FileState]]:
    """The recorded layers, ascending, whose files and source still hold the same bytes, and the files' states.

    Raises:
        UnsupportedModelError: a manifest is a newer version's.
        IntegrityError: the source is damaged.
        ResourceError: something cannot be read.
    """
    listed: dict[int, tuple[LayerFile, bool]] = {}
    for name in (MANIFEST_NAME, JOURNAL_NAME):  # the journal is the newer one
        found = _read_usable(directory / name)
        if found is not None and found.is_same_build_as(goal):
            same_stamp = is_equal_stamp(found.source_stamp, goal.source_stamp)
            listed |= {file.layer: (file, same_stamp) for file in found.layers}
    layer_count = layer_count_in_tensors(checkpoint)
    for layer, (file, same_stamp) in sorted(listed.items()):
        if layer >= layer_count or not _is_present(directory, file):
            continue
        # A different stamp does not mean different content: a copied or restored directory has new times, same bytes.
        if not same_stamp and _source_sha256(checkpoint, layer) != file.source_sha256:
            continue
        state = file_state((directory / file.name).stat())
        if sha256_file(directory / file.name) == file.sha256:
            yield file, state


def find_twins(directory: Path, goal: Manifest) -> Twins:
    """The layers in other directories that were made as those of `goal` would be. Unreadable sets are left out."""
    twins: Twins = {}
    for path in sorted(prepared_root().glob(f"*/{MANIFEST_NAME}")):
        if path.parent == directory:
            continue
        with contextlib.suppress(SubspecError, OSError):
            found = read_manifest(path)
            if replace(found, model_id=goal.model_id, commit=goal.commit).is_same_build_as(goal):
                twins |= {(file.layer, file.source_sha256): (path.parent, file) for file in found.layers}
    return twins


def read_twin(directory: Path, file: LayerFile) -> bytes | None:
    """The bytes of another set's layer; None if they are not those of its record."""
    if not _is_present(directory, file):
        return None
    with contextlib.suppress(SubspecError):
        data = read_small_file(directory / file.name, file.size_bytes)
        return data if hashlib.sha256(data).hexdigest() == file.sha256 else None
    return None


def _read_usable(path: Path) -> Manifest | None:
    if not path.exists():
        return None
    try:
        return read_manifest(path)
    except IntegrityError:  # its hashes cannot be trusted: the layers it lists are made again
        return None


def _is_present(directory: Path, file: LayerFile) -> bool:
    path = directory / file.name
    # A link may lead anywhere. Loading does not open it either.
    return not path.is_symlink() and has_size(path, file.size_bytes)


def _source_sha256(checkpoint: Checkpoint, layer: int) -> str:
    return read_hashed_tensors(layer_entries(checkpoint, layer))[1]
