"""A 16-bit model in the Hugging Face layout: its config, where its tensors are, and what identifies it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from subspec_cli.checkpoint.layer_tensors import layer_prefix
from subspec_cli.checkpoint.safetensors_header import (
    IncompleteFile,
    TensorEntry,
    read_header,
)
from subspec_cli.checkpoint.source_directory import (
    INDEX_NAME,
    SINGLE_NAME,
    WeightIndex,
    check_small_files,
    confine,
    no_weights_error,
    read_config,
    read_index,
)
from subspec_cli.checkpoint.tensor_reader import in_read_order
from subspec_cli.checkpoint.tensor_table import indexed_tensors
from subspec_cli.checkpoint.tokenizer_files import TOKENIZER_FILES, missing_tokenizer
from subspec_cli.errors import IntegrityError, UsageError
from subspec_cli.files.io_errors import read_error
from subspec_cli.units import printable

_NONE_INCOMPLETE: Mapping[str, IncompleteFile] = MappingProxyType({})
_LAYER_NAME = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(.+)")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A weight file as it was when the checkpoint was opened."""

    name: str
    size_bytes: int
    mtime_ns: int
    inode: int
    ctime_ns: int
    """When the file or its attributes last changed; no program can set it back."""
    attributes: tuple[int, ...]
    """Mode, number of names, owner and group: a change of these moves `ctime_ns` as well."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's directory after its checks: the place of every tensor is known, and no file is outside."""

    directory: Path
    config: dict[str, Any]
    """Content of config.json."""
    tensors: Mapping[str, TensorEntry]
    """All that are stored, by name; where two files hold one, the one that the index names."""
    index: WeightIndex | None
    """None for a single weight file."""
    files: tuple[SourceFile, ...]
    """The safetensors files, by name."""
    fingerprint: str
    """40 hex digits over config.json, the index and all raw headers. Weights with equal headers share it."""

    @property
    def stamp(self) -> str:
        """16 hex digits over names, sizes and modification times; they differ once a file is written again."""
        text = "\n".join(f"{file.name} {file.size_bytes} {file.mtime_ns}" for file in self.files)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_checkpoint(
    directory: Path, incomplete: Mapping[str, IncompleteFile] = _NONE_INCOMPLETE
) -> Checkpoint:
    """Check a model's directory by its small files and headers. No weight is read.

    Args:
        directory: the model's directory.
        incomplete: weight files that are still being downloaded, by name; the result's `files` leave them out.

    Raises:
        UsageError: no such directory.
        UnsupportedModelError: no config, tokenizer or safetensors; remote code.
        IntegrityError: a damaged, missing or misplaced file.
        ResourceError: a file cannot be read.
    """
    if not directory.is_dir():
        raise UsageError(f"no such directory: {printable(str(directory))}")
    directory = Path(os.path.realpath(directory))
    check_small_files(directory)
    config_bytes, config = read_config(directory)
    names, index = _weight_files(directory, incomplete)
    if no_tokenizer := missing_tokenizer(
        (path.name for path in directory.iterdir()), printable(str(directory))
    ):
        raise no_tokenizer
    for name in TOKENIZER_FILES:
        confine(directory, name)
    try:
        headers = {name: read_header(confine(directory, name), incomplete.get(name)) for name in names}
    except IntegrityError as error:
        if index is None and confine(directory, INDEX_NAME).exists():
            error.hint = f"if {SINGLE_NAME} is left over, remove it: {INDEX_NAME} names other files"
        raise
    digest = hashlib.sha256()
    for part in (config_bytes, index.raw if index else b"", *(header.raw for header in headers.values())):
        digest.update(len(part).to_bytes(8, "little") + part)
    return Checkpoint(
        directory=directory,
        config=config,
        tensors=indexed_tensors({name: header.entries for name, header in headers.items()}, index),
        index=index,
        files=tuple(
            source_file(name, header.status) for name, header in headers.items() if name not in incomplete
        ),
        fingerprint=digest.hexdigest()[:40],
    )


def check_unchanged(checkpoint: Checkpoint) -> None:
    """Check that the weight files are still those that were opened. Raises what `check_files_unchanged` raises."""
    check_files_unchanged(checkpoint.directory, checkpoint.files)


def check_files_unchanged(directory: Path, files: Sequence[SourceFile]) -> None:
    """Check that files of a directory are still those that were opened.

    A file whose attributes changed may have another change time: it got another name, mode or owner.

    Raises:
        IntegrityError: a file has another size, modification time or inode, or is gone, or was written and its
            modification time put back.
    """
    for file in files:
        path = directory / file.name
        try:
            found = source_file(file.name, path.stat())
        except OSError as error:
            raise read_error(error, path) from error
        if found.attributes != file.attributes:
            found = replace(found, ctime_ns=file.ctime_ns, attributes=file.attributes)
        if found != file:
            is_put_back = replace(found, ctime_ns=file.ctime_ns) == file
            how = "its modification time was put back" if is_put_back else f"{found.size_bytes} now"
            raise IntegrityError(
                f"{printable(str(path))} changed while it was in use ({file.size_bytes} bytes then, {how})",
                "let the other program finish, then run the command again",
            )


def check_headers_unchanged(checkpoint: Checkpoint) -> None:
    """Check that the files, now complete, begin with the headers that the checkpoint was opened with.

    Raises:
        IntegrityError: a header differs.
    """
    if open_checkpoint(checkpoint.directory).fingerprint != checkpoint.fingerprint:
        raise IntegrityError(
            f"the headers in {printable(str(checkpoint.directory))} changed during the download",
            "run the command again",
        )


def layer_entries(checkpoint: Checkpoint, layer: int) -> tuple[TensorEntry, ...]:
    """The tensors of one decoder layer, `in_read_order`.

    Raises:
        IntegrityError: the checkpoint has no tensor of that layer.
    """
    prefix = layer_prefix(layer)
    found = [entry for name, entry in checkpoint.tensors.items() if name.startswith(prefix)]
    if not found:
        raise IntegrityError(f"{printable(str(checkpoint.directory))} holds no tensor of layer {layer}")
    return tuple(in_read_order(found))


def layer_count_in_tensors(checkpoint: Checkpoint) -> int:
    """Number of layers by the largest layer number in the tensor names; 0 if no name has one."""
    matches = (_LAYER_NAME.fullmatch(name) for name in checkpoint.tensors)
    return max((int(match.group(1)) + 1 for match in matches if match), default=0)


def _weight_files(
    directory: Path, incomplete: Mapping[str, IncompleteFile]
) -> tuple[tuple[str, ...], WeightIndex | None]:
    if SINGLE_NAME in incomplete or confine(directory, SINGLE_NAME).exists():
        return (SINGLE_NAME,), None
    index = read_index(directory)
    if index is None:
        raise no_weights_error((path.name for path in directory.iterdir()), printable(str(directory)))
    missing = [n for n in index.file_names if n not in incomplete and not confine(directory, n).exists()]
    if missing:
        raise IntegrityError(
            f"{printable(str(directory))} lacks {len(missing)} of the {len(index.file_names)} files "
            f"that {INDEX_NAME} names: {printable(', '.join(missing[:4]))}",
            "fetch them, or download the model again",
        )
    return index.file_names, index


def source_file(name: str, status: os.stat_result) -> SourceFile:
    """Return a file as it is now."""
    attributes = (status.st_mode, status.st_nlink, status.st_uid, status.st_gid)
    return SourceFile(name, status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns, attributes)
