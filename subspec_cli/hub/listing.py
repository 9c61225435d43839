"""The files of a commit, and which of them a model needs: as the hub lists them, or as the cache holds them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from subspec_cli.checkpoint.source_directory import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    WeightIndex,
    confine,
    first_missing_file,
    is_small_file,
    no_config_error,
    no_weights_error,
    read_index,
)
from subspec_cli.errors import IntegrityError, NetworkError
from subspec_cli.files.regular_file import has_size
from subspec_cli.hub.cache import cached_snapshot
from subspec_cli.hub.hub_errors import explain_hub_error, not_a_hub
from subspec_cli.hub.remote_file import ListedFile, content_hash
from subspec_cli.hub.retry import Attempts, RetryPolicy, with_retries
from subspec_cli.hub.workers import WorkerChannel, run_all
from subspec_cli.reporter import Reporter
from subspec_cli.units import printable

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of one commit."""

    commit: str
    sizes: Mapping[str, int | None]
    """Bytes by name; None if the hub gives no size. Empty if the listing is made from the cache."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """Hashes of the contents by name, of files whose hash the hub gives."""

    def file(self, name: str) -> ListedFile:
        """What is known of one file."""
        return ListedFile(name, self.sizes.get(name), self.hashes.get(name))

    @property
    def small_files(self) -> list[str]:
        """The files that a model needs besides config.json and the weights."""
        wanted = [name for name in self.sizes if is_small_file(name) and name != CONFIG_NAME]
        index = [INDEX_NAME] if INDEX_NAME in self.sizes and SINGLE_NAME not in self.sizes else []
        return [*index, *(name for name in sorted(wanted) if "/" not in name)]

    def weight_files(self, snapshot: Path) -> tuple[str, ...]:
        """The weight files, according to the index in the cache.

        Raises:
            IntegrityError: the index is damaged, or names a file that the commit does not hold.
        """
        if SINGLE_NAME in self.sizes or (not self.sizes and confine(snapshot, SINGLE_NAME).exists()):
            return (SINGLE_NAME,)
        index = read_index(snapshot)
        if index is None:
            return ()
        self.check_index_names(index)
        return index.file_names

    def check_index_names(self, index: WeightIndex) -> None:
        """Check that the listing has the files of an index. Raises IntegrityError as `weight_files`."""
        unknown = [name for name in index.file_names if name not in self.sizes] if self.sizes else []
        if unknown:
            raise IntegrityError(
                f"{INDEX_NAME} names {printable(unknown[0])[:200]}, which is not among the model's files",
                "the model is damaged on the hub: try another revision",
            )

    def is_cached(self, snapshot: Path, name: str) -> bool:
        """Whether a file is in the cache, with the size that the hub gives.

        Raises:
            IntegrityError: the name, or a link in its place, leads out of the cache.
        """
        path, size_bytes = confine(snapshot, name), self.sizes.get(name)
        return path.exists() if size_bytes is None else has_size(path, size_bytes)

    def is_complete(self, snapshot: Path) -> bool:
        """Whether nothing must be fetched. Errors as `is_cached` and `weight_files`."""
        if first_missing_file(snapshot) is not None:
            return False
        needed = (CONFIG_NAME, *self.small_files, *self.weight_files(snapshot))
        return all(self.is_cached(snapshot, name) for name in needed)


def find_listing(
    model_id: str, revision: str | None, retry_policy: RetryPolicy, reporter: Reporter
) -> Listing:
    """List the commit that a revision stands for now.

    If the hub cannot be reached and the cache holds a complete commit, that one is listed.

    Raises:
        UsageError: no such revision.
        UnsupportedModelError: the model has no config or no safetensors.
        AccessError, NetworkError: the hub refuses or cannot be reached.
        IntegrityError: a damaged index in the cache.
    """
    snapshot = cached_snapshot(model_id, revision)
    lacks = CONFIG_NAME if snapshot is None else first_missing_file(snapshot)
    here = None if snapshot is None or lacks is not None else Listing(snapshot.name, {})
    if here is not None and revision == here.commit:  # a commit does not change
        return here
    try:
        return _fetch_listing(
            model_id, revision, replace(retry_policy, tries=1) if here else retry_policy, reporter
        )
    except NetworkError as error:
        if here is None:
            raise NetworkError(
                f"{error.message}; the cache lacks {printable(str(lacks))}", error.hint
            ) from error
        reporter.note(f"{error.message}; using commit {here.commit[:8]} from the cache")
        return here


def _fetch_listing(
    model_id: str, revision: str | None, retry_policy: RetryPolicy, reporter: Reporter
) -> Listing:
    from huggingface_hub import HfApi

    found: list[ModelInfo] = []
    channel = WorkerChannel(reporter)
    attempts = Attempts(retry_policy, channel, model_id)

    def ask() -> ModelInfo:
        timeout_s = retry_policy.stall_s or _TIMEOUT_S
        return HfApi().model_info(model_id, revision=revision, timeout=timeout_s, files_metadata=True)

    def explain(error: Exception) -> Exception:
        if isinstance(error, (TypeError, KeyError, AttributeError)):  # JSON, but not of a model
            return not_a_hub()
        return explain_hub_error(error, model_id, revision) or error

    run_all([lambda: found.append(with_retries(ask, attempts, explain))], channel)
    commit = found[0].sha
    siblings = found[0].siblings or ()
    sizes = {sibling.rfilename: sibling.size for sibling in siblings}
    hashes = {
        # A large file's blob is its pointer.
        sibling.rfilename: content_hash(sibling.lfs.sha256 if sibling.lfs else sibling.blob_id)
        for sibling in siblings
    }
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise not_a_hub("its listing names no commit (sha)")
    if CONFIG_NAME not in sizes:
        raise no_config_error(sizes, model_id)
    if SINGLE_NAME not in sizes and INDEX_NAME not in sizes:
        raise no_weights_error(sizes, model_id)
    return Listing(commit, sizes, {name: text for name, text in hashes.items() if text is not None})
