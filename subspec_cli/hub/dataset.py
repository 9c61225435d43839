"""Files of datasets on the hub."""

from __future__ import annotations

import logging
from pathlib import Path

from subspec_cli.hub.hub_errors import explain_hub_error


def download_dataset_file(dataset: str, file_name: str) -> Path:
    """Path of one file of a dataset on the hub, fetched unless it is cached. Errors as in `open_model`."""
    from huggingface_hub import hf_hub_download

    # The library's warnings of each attempt are no lines of ours; what fails in the end is told by the error.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return Path(hf_hub_download(dataset, file_name, repo_type="dataset"))
    except Exception as error:
        raise explain_hub_error(error, dataset, None) or error from error
