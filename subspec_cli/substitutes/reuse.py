"""The files of an earlier preparation that are still valid, so that a rerun makes only the others."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.checkpoint.tensor_reader import hash_tensors
from subspec_cli.errors import IntegrityError, SubspecError
from subspec_cli.files.home import prepared_root
from subspec_cli.files.regular_file import FileState, file_state, has_size, read_small_file, sha256_file
from subspec_cli.substitutes.manifest import (
    JOURNAL_NAME,
    MANIFEST_NAME,
    LayerFile,
    Manifest,
    Part,
    StoredFile,
    read_manifest,
)
from subspec_cli.substitutes.source_stamp import is_equal_stamp

Twins: TypeAlias = dict[tuple[int, str], tuple[Path, LayerFile]]
"""Layers of other sets with equal settings and headers (a copy of the model, another commit): the directory and the
record, by the layer and the SHA-256 of its 16-bit bytes."""


Sources: TypeAlias = Mapping[Part, Sequence[TensorEntry]]
"""The 16-bit tensors of each part that a set is made of, `in_read_order`."""


def finished_manifest(directory: Path, goal: Manifest, parts: Sequence[Part]) -> Manifest | None:
    """The manifest of a set like `goal` in `directory` that has all parts, if there is one. No file is read.

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
    if [file.part for file in found.files] != list(parts):
        return None
    return found if all(_is_present(directory, file) for file in found.files) else None


def reusable_files(
    directory: Path, goal: Manifest, sources: Sources
) -> Iterator[tuple[StoredFile, FileState]]:
    """The recorded files, in order, if they and their source still hold the same bytes, and the files' states.

    Raises:
        UnsupportedModelError: a manifest is a newer version's.
        IntegrityError: the source is damaged.
        ResourceError: something cannot be read.
    """
    listed: dict[Part, tuple[StoredFile, bool]] = {}
    # A set without a head was finished when it was made: whoever made its layers, only the head is added.
    layers = [part for part in sources if part != "head"]
    lacks_head = "head" in sources and finished_manifest(directory, goal, layers) is not None
    for name in (MANIFEST_NAME, JOURNAL_NAME):  # the journal is the newer one
        found = _read_usable(directory / name)
        if found is not None and (found.is_same_build_as(goal) or lacks_head):
            same_stamp = is_equal_stamp(found.source_stamp, goal.source_stamp)
            listed |= {file.part: (file, same_stamp) for file in found.files}
    for part, entries in sources.items():
        file, same_stamp = listed.get(part, (None, False))
        if file is None or not _is_present(directory, file):
            continue
        # A different stamp does not mean different content: a copied or restored directory has new times, same bytes.
        if not same_stamp and hash_tensors(entries) != file.source_sha256:
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


def _is_present(directory: Path, file: StoredFile) -> bool:
    path = directory / file.name
    # A link may lead anywhere. Loading does not open it either.
    return not path.is_symlink() and has_size(path, file.size_bytes)
