"""Verifies substitutes, and the 16-bit weights they were made from, against the recorded hashes."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Final

from subspec_cli.checkpoint.checkpoint import (
    Checkpoint,
    layer_count_in_tensors,
    layer_entries,
    open_checkpoint,
)
from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.checkpoint.tensor_table import read_tensor_table
from subspec_cli.errors import SubspecError
from subspec_cli.files.io_errors import read_error
from subspec_cli.files.regular_file import open_regular
from subspec_cli.hub.command_hints import prepare_command
from subspec_cli.hub.source_model import find_source_directory
from subspec_cli.substitutes.head_file import head_entry
from subspec_cli.substitutes.inventory import UNREADABLE, StoredModel
from subspec_cli.substitutes.manifest import (
    MANIFEST_NAME,
    TUNING_TEXT_NAME,
    Manifest,
    Part,
    StoredFile,
    file_path,
)
from subspec_cli.substitutes.residual_set import RESIDUALS_NAME, ResidualFile, problem_of, read_residuals
from subspec_cli.substitutes.source_stamp import has_same_times

_PIECE_BYTES: Final = 8 << 20
_BLOB_NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Finding:
    """A file that differs from its record, or a set of substitutes whose source was written again."""

    path: Path
    what: str
    """What is wrong, for the user."""
    expected: str = ""
    found: str = ""
    is_damage: bool = True
    """False: the bytes are undamaged, but belong to another version."""

    @property
    def text(self) -> str:
        """One line for the user."""
        figures = f": expected {self.expected}, found {self.found}" if self.expected else ""
        return f"{self.path}: {self.what}{figures}"


@dataclass(frozen=True, slots=True)
class VerifyProgress:
    """How far the verification is."""

    model_id: str
    done_bytes: int
    total_bytes: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class _TargetHashes:
    """Hashes of a target's weight files as they are now."""

    part_sha256: Mapping[Part, str]
    findings: tuple[Finding, ...]
    """Files of the hub's cache whose bytes do not have the SHA-256 in their names."""


class Verifier:
    """Verifies sets of substitutes one after another. A target that several sets share is read once."""

    def __init__(self, stored: Sequence[StoredModel], progress: Callable[[VerifyProgress], None]) -> None:
        self._progress = progress
        self._started_s = time.monotonic()
        self._done_bytes = 0
        self._model_id = ""
        self._targets: dict[tuple[str, str], Checkpoint | SubspecError] = {}
        self._hashes: dict[Path, _TargetHashes] = {}
        manifests = [item.manifest for item in stored if item.manifest is not None]
        for manifest in manifests:
            self._targets.setdefault((manifest.model_id, manifest.commit), _open_target(manifest))
        opened = {item.directory: item for item in self._targets.values() if isinstance(item, Checkpoint)}
        self._total_bytes = sum(file.size_bytes for manifest in manifests for file in manifest.files)
        self._total_bytes += sum(file.size_bytes for item in stored for file in self._residuals(item))
        self._total_bytes += sum(file.size_bytes for item in opened.values() for file in item.files)

    def verify(self, stored: StoredModel) -> list[Finding]:
        """Everything that is wrong with one of the sets. A file that cannot be read is a finding too."""
        manifest = stored.manifest
        if manifest is None:
            is_bad = stored.state == UNREADABLE
            return [Finding(stored.directory / MANIFEST_NAME, stored.problem)] if is_bad else []
        self._model_id = manifest.model_id
        files: list[StoredFile | ResidualFile] = [*manifest.files, *self._residuals(stored)]
        findings = [
            self._verify_file(stored.directory, file.name, file.sha256, file.size_bytes) for file in files
        ]
        if manifest.tuning_text_sha256 is not None:
            findings.append(
                self._verify_file(stored.directory, TUNING_TEXT_NAME, manifest.tuning_text_sha256)
            )
        findings += [
            Finding(stored.directory / file.name, what)
            for file in self._residuals(stored)
            if (what := problem_of(file, manifest))
        ]
        if problem := _residuals_problem(stored):
            findings.append(problem)
        return [*(item for item in findings if item), *self._verify_target(manifest)]

    @staticmethod
    def _residuals(stored: StoredModel) -> list[ResidualFile]:
        """The residual files that are listed; a list that cannot be read is a finding by itself."""
        try:
            return read_residuals(stored.directory)
        except SubspecError:
            return []

    def _verify_file(
        self, directory: Path, name: str, sha256: str, recorded_bytes: int | None = None
    ) -> Finding | None:
        path = directory / name
        try:
            size_bytes = file_path(directory, name).stat().st_size
        except SubspecError as error:
            return Finding(path, error.message)
        except FileNotFoundError:
            return Finding(path, "missing")
        except OSError as error:
            return Finding(path, read_error(error, path).message)
        if recorded_bytes not in (None, size_bytes):
            return Finding(path, "wrong size", f"{recorded_bytes} bytes", f"{size_bytes} bytes")
        try:
            found = self._hash_spans(path, [(0, size_bytes)], {})
        except SubspecError as error:
            return Finding(path, error.message)
        return None if found == sha256 else Finding(path, "wrong SHA-256", sha256, found)

    def _verify_target(self, manifest: Manifest) -> list[Finding]:
        """Verify what was quantized, and whole files where the hub's cache names them by their hash."""
        target = self._targets[manifest.model_id, manifest.commit]
        directory = Path(manifest.source_directory)
        if isinstance(target, SubspecError):
            blobs = [self._verify_blob(path) for path in sorted(directory.glob("*.safetensors"))]
            return [item for item in blobs if item] or [Finding(directory, target.message)]
        if manifest.fingerprint != target.fingerprint or not has_same_times(manifest.source_stamp, target):
            again = prepare_command(manifest.model_id, bits=manifest.settings.bits)
            what = (
                f"the weights were copied or written again since they were prepared; to follow them: {again}"
            )
            return [Finding(target.directory, what, is_damage=False)]
        if target.directory not in self._hashes:
            self._hashes[target.directory] = self._hash_target(target)
        found = self._hashes[target.directory]
        findings = list(found.findings)
        for file in manifest.files:
            sha256 = found.part_sha256[file.part]
            if sha256 != file.source_sha256:
                paths = sorted({entry.path for entry in _part_entries(target, file.part)})
                part = "head" if file.part == "head" else f"layer {file.part}"
                what = f"wrong SHA-256 of the 16-bit {part}"
                findings += [Finding(path, what, file.source_sha256, sha256) for path in paths]
        return findings

    def _hash_target(self, target: Checkpoint) -> _TargetHashes:
        """Hash all files in one sequential read; each part's digest gets its bytes in reading order."""
        parts: list[Part] = [*range(layer_count_in_tensors(target)), "head"]
        digests = {part: hashlib.sha256() for part in parts}
        entries = [(part, entry) for part in parts for entry in _part_entries(target, part)]
        findings = []
        for file in target.files:
            path = target.directory / file.name
            own = [(part, entry) for part, entry in entries if entry.path == path]
            cuts = {0, file.size_bytes}
            for _, entry in own:
                cuts |= {entry.offset_bytes, entry.offset_bytes + entry.size_bytes}
            spans = [(start, end - start) for start, end in pairwise(sorted(cuts))]
            consumers = {entry.offset_bytes: digests[part].update for part, entry in own}
            findings.append(_blob_mismatch(path, self._hash_spans(path, spans, consumers)))
        sha256 = {part: digest.hexdigest() for part, digest in digests.items()}
        return _TargetHashes(sha256, tuple(item for item in findings if item))

    def _hash_spans(
        self,
        path: Path,
        spans: Sequence[tuple[int, int]],
        consumers: Mapping[int, Callable[[memoryview], None]],
    ) -> str:
        """SHA-256 of all spans together. A span's bytes also go to the consumer of its start, if it has one."""
        whole = hashlib.sha256()

        def take(start: int, piece: memoryview) -> None:
            whole.update(piece)
            if start in consumers:
                consumers[start](piece)

        self._read_spans(path, spans, take)
        return whole.hexdigest()

    def _verify_blob(self, path: Path) -> Finding | None:
        try:
            size_bytes = path.stat().st_size
            return _blob_mismatch(path, self._hash_spans(path, [(0, size_bytes)], {}))
        except SubspecError as error:
            return Finding(path, error.message)
        except FileNotFoundError:
            return Finding(path, "missing")
        except OSError as error:
            return Finding(path, read_error(error, path).message)

    def _read_spans(
        self, path: Path, spans: Sequence[tuple[int, int]], take: Callable[[int, memoryview], None]
    ) -> None:
        """Pass each span's bytes to `take` in pieces, with the span's start. A short file shows in its hash."""
        buffer = memoryview(bytearray(_PIECE_BYTES))
        with open_regular(path) as file:
            for start, size_bytes in spans:
                file.seek(start)
                left = size_bytes
                while left:
                    try:
                        count = file.readinto(buffer[: min(left, _PIECE_BYTES)])
                    except OSError as error:
                        raise read_error(error, path) from error
                    if not count:
                        break
                    take(start, buffer[:count])
                    left -= count
                    self._advance(count)
                if hasattr(os, "posix_fadvise"):
                    # Every byte is read once: a model larger than memory would evict all else from the page cache.
                    os.posix_fadvise(file.fileno(), start, size_bytes, os.POSIX_FADV_DONTNEED)

    def _advance(self, count: int) -> None:
        self._done_bytes += count
        elapsed_s = time.monotonic() - self._started_s
        self._progress(VerifyProgress(self._model_id, self._done_bytes, self._total_bytes, elapsed_s))


def _residuals_problem(stored: StoredModel) -> Finding | None:
    try:
        read_residuals(stored.directory)
    except SubspecError as error:
        return Finding(stored.directory / RESIDUALS_NAME, error.message)
    return None


def blob_of(path: Path) -> Path | None:
    """The file of the hub's cache, named by its SHA-256, that `path` links to; None for any other path."""
    target = Path(os.path.realpath(path))
    is_blob = path.is_symlink() and target.parent.name == "blobs" and _BLOB_NAME.fullmatch(target.name)
    return target if is_blob else None


def _blob_mismatch(path: Path, sha256: str) -> Finding | None:
    blob = blob_of(path)
    if blob is None or blob.name == sha256:
        return None
    return Finding(path, "wrong SHA-256", blob.name, sha256)


def _part_entries(target: Checkpoint, part: Part) -> Sequence[TensorEntry]:
    """The 16-bit tensors that a file of substitutes was made from."""
    if part != "head":
        return layer_entries(target, part)
    head = head_entry(target.tensors)
    return [] if head is None else [head]


def _open_target(manifest: Manifest) -> Checkpoint | SubspecError:
    try:
        checkpoint = open_checkpoint(find_source_directory(manifest.model_id, manifest.commit))
        return _with_own_names(checkpoint)
    except SubspecError as error:
        return error


def _with_own_names(target: Checkpoint) -> Checkpoint:
    """The checkpoint with the tensors that the model needs, by this program's names, as layers are prepared."""
    table = read_tensor_table(target.config, target.tensors, target.index)
    return replace(target, tensors=table.entries)
