"""The outline of a model, without its weights: config, index and safetensors headers, read by range requests.

A few kilobytes are read for a model of gigabytes. Nothing is written to disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Final

from subspec_cli.checkpoint.bare_config import find_bare_config, likely_tokenizer_bytes, read_bare_config
from subspec_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from subspec_cli.checkpoint.repository import (
    DECIDING_FILES,
    Repository,
    check_fields,
    check_tokenizer_in,
    decide_repository,
    read_repository,
)
from subspec_cli.checkpoint.safetensors_header import TensorEntry, header_length, parse_entries
from subspec_cli.checkpoint.source_directory import (
    CONFIG_NAME,
    INDEX_NAME,
    MAX_CONFIG_BYTES,
    MAX_INDEX_BYTES,
    SINGLE_NAME,
    WeightIndex,
    check_links,
    first_missing_file,
    parse_config,
    parse_index,
    tokenizer_bytes_in,
)
from subspec_cli.checkpoint.tensor_table import indexed_tensors
from subspec_cli.checkpoint.tokenizer_files import MAX_SMALL_FILE_BYTES, check_tokenizer, missing_tokenizer
from subspec_cli.errors import IntegrityError, NetworkError
from subspec_cli.hub.cache import cached_snapshot, repo_cache
from subspec_cli.hub.download import DownloadContext
from subspec_cli.hub.hub_errors import explain_hub_error
from subspec_cli.hub.listing import Listing, find_listing
from subspec_cli.hub.model_name import check_revision, parse_model_name
from subspec_cli.hub.reachable import check_reachable
from subspec_cli.hub.remote_file import RemoteFile, fetch_metadata, open_body
from subspec_cli.hub.retry import RETRY_POLICY, RetryPolicy, with_retries
from subspec_cli.hub.workers import WorkerChannel, run_all
from subspec_cli.reporter import Reporter
from subspec_cli.units import printable

_HEADER_BYTES: Final = 32 << 10
"""First bytes of a weight file to read: enough for the header of most files."""
_LENGTH_BYTES: Final = 512
"""First bytes from which `header_length` reads the length of the header."""


@dataclass(frozen=True, slots=True)
class ModelOutline:
    """A model without its weights."""

    model_id: str
    commit: str
    """The hub's commit; for a directory and the demo, the checkpoint's fingerprint; `config.json` if that is all."""
    repository: Repository
    tokenizer_bytes: int
    missing_bytes: int
    """Bytes that `prepare` would download."""
    received_bytes: int
    """Bytes that came over the network for this outline."""
    directory: Path | None = None
    """The model's directory, if it is complete on this machine."""


def outline_model(
    model: str,
    revision: str | None = None,
    *,
    follow_links: bool = False,
    reporter: Reporter,
    retry_policy: RetryPolicy = RETRY_POLICY,
) -> ModelOutline:
    """Outline a model. The network is used only for a model on the hub that is not complete in the cache.

    A config.json alone is enough: the user's, or the cache's if the hub cannot be reached. Arguments and errors are
    those of `open_model` and `decide_repository`.
    """
    if revision is None and (bare := find_bare_config(model)) is not None:
        return _outline_config(str(bare.resolve()), bare)
    name = parse_model_name(model)
    check_revision(name, revision)
    directory = name.directory or _complete_snapshot(name.model_id, revision)
    if directory is not None:
        checkpoint = open_checkpoint(directory)
        if not follow_links:
            check_links(checkpoint.directory, [file.name for file in checkpoint.files])
        return _outline_checkpoint(name.model_id, checkpoint, is_hub=name.directory is None)
    try:
        check_reachable(name.model_id)
    except NetworkError as unreachable:
        snapshot = cached_snapshot(name.model_id, revision)
        if snapshot is None or not (snapshot / CONFIG_NAME).is_file():
            raise
        reporter.note(unreachable.message)
        return _outline_config(name.model_id, snapshot / CONFIG_NAME)
    listing = find_listing(name.model_id, revision, retry_policy, reporter)
    channel = WorkerChannel(reporter)
    context = DownloadContext(name.model_id, listing, repo_cache(name.model_id), retry_policy, channel)
    reader = _CommitReader(context)
    config: list[dict[str, Any]] = []
    run_all([lambda: config.append(_read_config(reader))], channel)
    if error := missing_tokenizer(listing.sizes, printable(name.model_id)):
        raise error
    small = _read_small_files(reader, listing, channel)
    tensors, index, weight_files = _read_headers(reader, listing, config[0], channel)
    where = printable(name.model_id)
    repository = decide_repository(config[0], tensors, index, lambda file, _: small.get(file), where)
    check_tokenizer(lambda file, _: small.get(file), where, repository.geometry.vocab)
    snapshot = context.cache.snapshot_path(listing.commit)
    needed = (CONFIG_NAME, *listing.small_files, *weight_files)
    return ModelOutline(
        model_id=name.model_id,
        commit=listing.commit,
        repository=repository,
        tokenizer_bytes=sum(
            size or 0 for file, size in listing.sizes.items() if fnmatchcase(file, "tokenizer*")
        ),
        missing_bytes=sum(
            listing.sizes[file] or 0 for file in needed if not listing.is_cached(snapshot, file)
        ),
        received_bytes=reader.received_bytes,
    )


def _complete_snapshot(model_id: str, revision: str | None) -> Path | None:
    """Directory of a model that is complete in the cache; None for any other."""
    snapshot = cached_snapshot(model_id, revision)
    return snapshot if snapshot is not None and first_missing_file(snapshot) is None else None


def _outline_checkpoint(model_id: str, checkpoint: Checkpoint, *, is_hub: bool) -> ModelOutline:
    directory = checkpoint.directory
    repository = read_repository(checkpoint)
    check_tokenizer_in(directory, repository)
    return ModelOutline(
        model_id=model_id,
        commit=directory.name if is_hub else checkpoint.fingerprint,
        repository=repository,
        tokenizer_bytes=tokenizer_bytes_in(directory),
        missing_bytes=0,
        received_bytes=0,
        directory=checkpoint.directory,
    )


def _outline_config(model_id: str, path: Path) -> ModelOutline:
    repository = read_bare_config(path)
    tokenizer_bytes = tokenizer_bytes_in(path.parent) or likely_tokenizer_bytes(repository)
    return ModelOutline(
        model_id=model_id,
        commit=CONFIG_NAME,
        repository=repository,
        tokenizer_bytes=tokenizer_bytes,
        missing_bytes=repository.geometry.model_bytes + tokenizer_bytes,
        received_bytes=0,
    )


def _read_config(reader: _CommitReader) -> dict[str, Any]:
    config = parse_config(reader.read_small_file(CONFIG_NAME, MAX_CONFIG_BYTES), CONFIG_NAME)
    check_fields(config)
    return config


def _read_small_files(reader: _CommitReader, listing: Listing, channel: WorkerChannel) -> dict[str, bytes]:
    """The files that decide what the model is, besides its config and weights, by name."""
    wanted = [name for name in DECIDING_FILES if name in listing.sizes]
    if "tokenizer.json" in wanted:  # the other forms of the vocabulary are not read
        wanted = [name for name in wanted if name not in ("tokenizer.model", "vocab.json", "merges.txt")]
    found: dict[str, bytes] = {}

    def read(name: str) -> None:
        found[name] = reader.read_small_file(name, MAX_SMALL_FILE_BYTES)

    run_all([partial(read, name) for name in wanted], channel)
    return found


def _read_headers(
    reader: _CommitReader, listing: Listing, config: Mapping[str, Any], channel: WorkerChannel
) -> tuple[dict[str, TensorEntry], WeightIndex | None, tuple[str, ...]]:
    """The tensors of all weight files, by name, the index, and the names of the files."""
    entries: dict[str, tuple[TensorEntry, ...]] = {}

    def read(name: str) -> None:
        entries[name] = reader.read_header(name)

    if SINGLE_NAME in listing.sizes:
        run_all([partial(read, SINGLE_NAME)], channel)
        return indexed_tensors(entries, None), None, (SINGLE_NAME,)
    raw: list[bytes] = []
    run_all([lambda: raw.append(reader.read_small_file(INDEX_NAME, MAX_INDEX_BYTES))], channel)
    index = parse_index(raw[0], INDEX_NAME, config)
    listing.check_index_names(index)
    run_all([partial(read, name) for name in index.file_names], channel)
    return indexed_tensors(entries, index), index, index.file_names


class _CommitReader:
    """Reads small files and headers of one commit into memory. Usable from any thread."""

    def __init__(self, context: DownloadContext) -> None:
        self._context = context
        self.received_bytes = 0

    @property
    def model_id(self) -> str:
        """The model's name on the hub."""
        return self._context.model_id

    def read_small_file(self, name: str, most_bytes: int) -> bytes:
        """Content of a small file. Raises IntegrityError if it is too large or its hash is not the announced one."""
        file = self._fetch_metadata(name)
        if file.size_bytes > most_bytes:
            raise IntegrityError(
                f"{printable(name)} of {self.model_id} has {file.size_bytes} bytes, at most {most_bytes} are read"
            )
        data = self._fetch(file, b"", file.size_bytes)
        found = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        if len(file.etag) == len(found) and file.etag != found:
            raise IntegrityError(
                f"{printable(name)} arrived with the SHA-1 {found}, the hub announced {file.etag}",
                "run the command again; if it stays so, the hub or a proxy is at fault",
            )
        return data

    def read_header(self, name: str) -> tuple[TensorEntry, ...]:
        """The tensors in the header of a weight file. Raises IntegrityError as `parse_entries`."""
        file, path = self._fetch_metadata(name), Path(name)
        data = self._fetch(file, b"", min(_HEADER_BYTES, file.size_bytes))
        end = 8 + header_length(data[:_LENGTH_BYTES], path, file.size_bytes)
        if end > len(data):
            data = self._fetch(file, data, end)
        return parse_entries(data[:end], path, file.size_bytes)

    def _fetch_metadata(self, name: str) -> RemoteFile:
        context = self._context
        return with_retries(
            lambda: fetch_metadata(
                context.model_id, context.commit, context.listing.file(name), context.retry_policy.stall_s
            ),
            context.new_attempts(),
            self._explain,
        )

    def _fetch(self, file: RemoteFile, have: bytes, until: int) -> bytes:
        """The first `until` bytes; those in `have` are not fetched again. A longer body is not read to its end."""

        def receive() -> bytes:
            with open_body(file, len(have), until, self._context.retry_policy.stall_s) as body:
                data = bytearray(have[: body.start])
                for piece in body.pieces:
                    self._context.channel.raise_if_stopped()
                    self.received_bytes += len(piece)
                    data += piece
                    if len(data) >= until:
                        return bytes(data[:until])
            raise ConnectionError("the answer ended early")

        return with_retries(receive, self._context.new_attempts(), self._explain) if until else b""

    def _explain(self, error: Exception) -> Exception:
        return explain_hub_error(error, self.model_id, self._context.commit) or error
