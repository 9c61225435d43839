"""From the name of a model to a local directory of one exact commit, by way of the Hugging Face cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspec_cli.errors import IntegrityError, NetworkError, UnsupportedModelError
from subspec_cli.store.checkpoint import open_checkpoint
from subspec_cli.store.files import check_free_space
from subspec_cli.store.hub_errors import explain_hub_error
from subspec_cli.store.model_name import (
    check_revision,
    name_of_id,
    parse_model_name,
    prepare_command,
)
from subspec_cli.store.source_directory import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    check_config,
    first_missing_file,
    no_weights_error,
    read_config,
    read_index,
)
from subspec_cli.units import printable

ConfigCheck = Callable[[Mapping[str, Any]], None]
"""Raises UnsupportedModelError for a config.json that no family runs."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 20.0
_SMALL_FILES = (
    CONFIG_NAME,
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model that is on this machine."""

    model_id: str
    directory: Path
    commit: str
    """The hub's commit; for a directory and the demo, the checkpoint's fingerprint."""
    is_local: bool
    """Whether it is a directory of the user or the demo, not the hub's."""


def resolve_model(
    model: str, revision: str | None = None, *, accept_config: ConfigCheck = check_config
) -> ResolvedModel:
    """Find a model, downloading what the cache lacks; all files are of one commit.

    Args:
        model: `demo`, a directory, or a hub id.
        revision: branch, tag or commit on the hub; None means its main branch.
        accept_config: called with config.json before any weight is fetched.

    Raises:
        UsageError: no such directory or revision, or no model name.
        UnsupportedModelError: no safetensors, or refused by its config.
        AccessError, NetworkError: the hub refuses or cannot be reached.
        ResourceError: the disk is too small for the download.
        IntegrityError: a damaged file.
    """
    name = parse_model_name(model)
    check_revision(name, revision)
    if name.directory is not None:
        checkpoint = open_checkpoint(name.directory)
        accept_config(checkpoint.config)
        return ResolvedModel(name.model_id, checkpoint.directory, checkpoint.fingerprint, is_local=True)
    directory = _cached_snapshot(name.model_id, revision) if _COMMIT.fullmatch(revision or "") else None
    if directory is None or first_missing_file(directory) is not None:
        try:
            directory = _download(name.model_id, revision, accept_config)
        except Exception as error:
            directory = _cached_instead(error, name.model_id, revision)
    accept_config(read_config(directory)[1])
    return ResolvedModel(name.model_id, directory, directory.name, is_local=False)


def find_local(model_id: str, revision: str | None = None) -> Path:
    """Directory of a model that has been resolved before; the network is never used.

    Args:
        model_id: as in a manifest: `demo`, an absolute path or a hub id.
        revision: for a hub id, the commit in the manifest.

    Raises:
        UsageError: no such directory, or no model name.
        IntegrityError: the hub's cache no longer holds the commit whole.
    """
    name = name_of_id(model_id)
    if name.directory is not None:
        return name.directory
    directory = _cached_snapshot(name.model_id, revision)
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


def _download(model_id: str, revision: str | None, accept_config: ConfigCheck) -> Path:
    """Complete the snapshot in the cache; what can refuse the model comes before its weights."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    info = HfApi().model_info(model_id, revision=revision, timeout=_TIMEOUT_S, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    if SINGLE_NAME not in sizes and INDEX_NAME not in sizes:
        raise no_weights_error(list(sizes), model_id)
    if CONFIG_NAME not in sizes:
        raise UnsupportedModelError(f"{model_id} has no {CONFIG_NAME}: it holds no model")
    snapshot = Path(hf_hub_download(model_id, CONFIG_NAME, revision=info.sha)).parent
    accept_config(read_config(snapshot)[1])
    weights = [SINGLE_NAME]
    if SINGLE_NAME not in sizes:
        hf_hub_download(model_id, INDEX_NAME, revision=info.sha)
        index = read_index(snapshot)
        weights = [INDEX_NAME, *(index.file_names if index else ())]
    missing_bytes = sum(sizes.get(name, 0) for name in weights if not (snapshot / name).exists())
    check_free_space(snapshot, missing_bytes, f"downloading {model_id}")
    # By the name of the revision, not the commit, so that the cache remembers it for offline use.
    return Path(snapshot_download(model_id, revision=revision, allow_patterns=[*_SMALL_FILES, *weights]))


def download_dataset_file(dataset: str, file_name: str) -> Path:
    """One file of a dataset on the hub, from the cache if it is there; errors as in `resolve_model`."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(dataset, file_name, repo_type="dataset"))
    except Exception as error:
        raise explain_hub_error(error, dataset, None) or error from error


def _cached_snapshot(model_id: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model_id, CONFIG_NAME, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _cached_instead(error: Exception, model_id: str, revision: str | None) -> Path:
    """A complete snapshot where the hub cannot be reached; anything else that failed is raised, explained."""
    failure = explain_hub_error(error, model_id, revision)
    if failure is None:
        raise error
    if not isinstance(failure, NetworkError):  # a refusal is not worked around
        raise failure from error
    directory = _cached_snapshot(model_id, revision)
    missing = CONFIG_NAME if directory is None else first_missing_file(directory)
    if directory is None or missing is not None:
        lacks = f"{failure.message}; the cache lacks {printable(str(missing))}"
        raise NetworkError(lacks, failure.hint) from error
    return directory
