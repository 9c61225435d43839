"""The files of an earlier preparation that are still valid, so that a rerun makes only the others.

A tuned layer depends on the whole model, which decoded the text and ran up to it. So it is valid only if no part of
the source changed, where a plainly rounded one depends on its own weights alone.
"""

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
    TUNING_TEXT_NAME,
    LayerFile,
    Manifest,
    Part,
    StoredFile,
    read_manifest,
)
from subspec_cli.substitutes.settings import TUNED
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
    if found.tuning_text_sha256 is not None and not (directory / TUNING_TEXT_NAME).exists():
        return None
    return found if all(_is_present(directory, file) for file in found.files) else None


def earlier_record(directory: Path, goal: Manifest, sources: Sources) -> Manifest | None:
    """What an earlier run recorded of files whose source holds the same bytes; None if no run made such a set.

    Raises:
        UnsupportedModelError: a manifest is a newer version's.
        IntegrityError: the source is damaged.
        ResourceError: something cannot be read.
    """
    # A set without a head was finished when it was made: whoever made its layers, only the head is added.
    layers = [part for part in sources if part != "head"]
    lacks_head = "head" in sources and finished_manifest(directory, goal, layers) is not None
    found = [
        record
        for name in (JOURNAL_NAME, MANIFEST_NAME)  # the journal is the newer one
        if (record := _read_usable(directory / name)) is not None
        and (record.is_same_build_as(goal) or lacks_head)
    ]
    if not found:
        return None
    record = found[0]
    # A different stamp does not mean different content: a copied or restored directory has new times, same bytes.
    if is_equal_stamp(record.source_stamp, goal.source_stamp):
        return record.with_files(file for file in record.files if file.part in sources)
    same = [file for file in record.files if _has_source(file, sources)]
    if goal.settings.optimizer == TUNED and len(same) < len(sources):
        return None
    return record.with_files(same)


def reusable_files(directory: Path, record: Manifest) -> Iterator[tuple[StoredFile, FileState]]:
    """The recorded files, in order, that still hold the same bytes, and their states. Errors as `sha256_file`."""
    for file in record.files:
        if not _is_present(directory, file):
            continue
        state = file_state((directory / file.name).stat())
        if sha256_file(directory / file.name) == file.sha256:
            yield file, state


def has_text(directory: Path, sha256: str | None) -> bool:
    """Whether the text that layers were tuned with is as it was recorded; None counts: older sets record none."""
    path = directory / TUNING_TEXT_NAME
    return sha256 is None or (not path.is_symlink() and path.is_file() and sha256_file(path) == sha256)


def find_twins(directory: Path, goal: Manifest, sources: Sources) -> Twins:
    """The layers in other directories that were made as those of `goal` would be. Unreadable sets are left out.

    Tuned ones are of the same text, and of a model with the same bytes in every part.
    """
    twins: Twins = {}
    for path in sorted(prepared_root().glob(f"*/{MANIFEST_NAME}")):
        if path.parent == directory:
            continue
        with contextlib.suppress(SubspecError, OSError):
            found = read_manifest(path)
            if not replace(found, model_id=goal.model_id, commit=goal.commit).is_same_build_as(goal):
                continue
            if goal.settings.optimizer != TUNED or (
                found.tuning_text_sha256 == goal.tuning_text_sha256
                and len(found.files) == len(sources)
                and all(_has_source(file, sources) for file in found.files)
            ):
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


def _has_source(file: StoredFile, sources: Sources) -> bool:
    """Whether the 16-bit bytes that a file was made from are there now."""
    return file.part in sources and hash_tensors(sources[file.part]) == file.source_sha256


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
