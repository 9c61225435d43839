"""Files of datasets on the hub."""

from __future__ import annotations

import logging
from pathlib import Path

from subspec_cli.hub.hub_errors import explain_hub_error


def download_dataset_file(dataset: str, file_name: str, revision: str | None) -> tuple[Path, str]:
    """Return path and commit of one file of a dataset, fetched unless it is cached. Errors as in `open_model`."""
    from huggingface_hub import hf_hub_download

    # The library's warnings of each attempt are no lines of ours; what fails in the end is told by the error.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        path = Path(hf_hub_download(dataset, file_name, repo_type="dataset", revision=revision))
    except Exception as error:
        raise explain_hub_error(error, dataset, revision) or error from error
    # The cache keeps a file as `snapshots/COMMIT/file_name`.
    return path, path.parents[file_name.count("/")].name
