"""The 16-bit model that a name stands for: a local directory, or one exact commit in the Hugging Face cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspec_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from subspec_cli.checkpoint.source_directory import (
    CONFIG_NAME,
    check_config,
    check_links,
    first_missing_file,
    read_config,
)
from subspec_cli.errors import IntegrityError
from subspec_cli.files.lock import directory_lock
from subspec_cli.hub.cache import cached_snapshot, repo_cache
from subspec_cli.hub.command_hints import prepare_command
from subspec_cli.hub.download import Download, DownloadContext
from subspec_cli.hub.listing import Listing, find_listing
from subspec_cli.hub.model_name import check_revision, name_of_id, parse_model_name
from subspec_cli.hub.retry import RETRY_POLICY, RetryPolicy
from subspec_cli.hub.weight_downloads import WeightDownloads, begin_all, fetch_all
from subspec_cli.hub.workers import WorkerChannel
from subspec_cli.reporter import Reporter
from subspec_cli.units import printable

ConfigCheck = Callable[[Mapping[str, Any]], None]
"""Raises UnsupportedModelError for a config.json that no supported family can run."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model's identity and its directory on this machine."""

    model_id: str
    directory: Path
    commit: str
    """The hub's commit; for a directory and the demo, the checkpoint's fingerprint."""
    is_local: bool
    """Whether it is a user's directory or the demo, not a model on the hub."""


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model whose headers are known. Its weights are on this machine or still to be downloaded."""

    resolved: ResolvedModel
    checkpoint: Checkpoint
    weight_downloads: WeightDownloads


@contextmanager
def open_model(
    model: str,
    revision: str | None = None,
    *,
    follow_links: bool = False,
    accept_config: ConfigCheck = check_config,
    reporter: Reporter,
    retry_policy: RetryPolicy = RETRY_POLICY,
) -> Iterator[OpenedModel]:
    """Find a model and open it. Of what the cache lacks, only small files and headers are fetched.

    All files are of one commit. The weights are fetched once `weight_downloads` is started, until the context
    ends.

    Args:
        model: `demo`, a directory, or a hub id.
        revision: branch, tag or commit on the hub; None means its main branch.
        follow_links: whether links in a user's directory may lead to files outside of it.
        accept_config: called with the content of config.json before any weight is fetched.
        reporter: gets a note about each wait and each repeated attempt.
        retry_policy: bounds of the attempts.

    Raises:
        UsageError: no such directory or revision, or no model name.
        UnsupportedModelError: no safetensors, or refused by its config.
        AccessError, NetworkError: the hub refuses or cannot be reached.
        ResourceError: the cache cannot be written.
        IntegrityError: a damaged file.
    """
    name = parse_model_name(model)
    check_revision(name, revision)
    channel = WorkerChannel(reporter)
    if name.directory is not None:
        checkpoint = open_checkpoint(name.directory)
        if not follow_links:
            check_links(checkpoint.directory, [file.name for file in checkpoint.files])
        accept_config(checkpoint.config)
        resolved = ResolvedModel(name.model_id, checkpoint.directory, checkpoint.fingerprint, is_local=True)
        yield OpenedModel(resolved, checkpoint, WeightDownloads(resolved.directory, (), channel))
        return
    listing = find_listing(name.model_id, revision, retry_policy, reporter)
    cache = repo_cache(name.model_id)
    resolved = ResolvedModel(
        name.model_id, cache.snapshot_path(listing.commit), listing.commit, is_local=False
    )
    with ExitStack() as stack:
        if not listing.is_complete(resolved.directory):
            cache.make_directories()
            stack.enter_context(directory_lock(cache.lock_directory, on_wait=reporter.note))
        context = DownloadContext(name.model_id, listing, cache, retry_policy, channel)
        downloads = _begin(context, listing, accept_config)
        weight_downloads = WeightDownloads(cache.directory, downloads, channel)
        stack.callback(weight_downloads.close)
        incomplete = {
            download.name: download.incomplete_file for download in downloads if not download.is_done
        }
        yield OpenedModel(resolved, open_checkpoint(resolved.directory, incomplete), weight_downloads)
        weight_downloads.close()
        if weight_downloads.is_complete:
            cache.write_ref(revision or "main", listing.commit)
            if downloads:
                cache.remove_partial_files()


def _begin(context: DownloadContext, listing: Listing, accept_config: ConfigCheck) -> list[Download]:
    """Fetch the missing small files and begin the weights. The files that may refuse the model come first."""
    snapshot = context.cache.snapshot_path(context.commit)

    def missing(names: Iterable[str]) -> list[str]:
        return [name for name in names if not listing.is_cached(snapshot, name)]

    fetch_all(context, missing([CONFIG_NAME]))
    accept_config(read_config(snapshot)[1])
    fetch_all(context, missing(listing.small_files))
    return begin_all(context, missing(listing.weight_files(snapshot)))


def find_source_directory(model_id: str, revision: str | None = None) -> Path:
    """Directory of a model that was resolved before. The network is never used.

    Args:
        model_id: as in a manifest: `demo`, an absolute path or a hub id.
        revision: for a hub id, the commit in the manifest.

    Raises:
        UsageError: no such directory, or no model name.
        IntegrityError: the hub's cache no longer holds the complete commit.
    """
    name = name_of_id(model_id)
    if name.directory is not None:
        return name.directory
    directory = cached_snapshot(name.model_id, revision)
    if directory is None:
        lack = "is not in the cache"
    elif missing := first_missing_file(directory):
        lack = f"lacks {printable(missing)} in the cache"
    else:
        return directory
    raise IntegrityError(
        f"the 16-bit weights are gone: {name.model_id} at {printable(revision or 'main')} {lack}",
        f"fetch them again: {prepare_command(name.model_id, revision=revision)}",
    )
