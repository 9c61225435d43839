"""Files of datasets on the hub."""

from __future__ import annotations

from pathlib import Path

from subspec_cli.hub.hub_errors import explain_hub_error


def download_dataset_file(dataset: str, file_name: str) -> Path:
    """Path of one file of a dataset on the hub, fetched unless it is cached. Errors as in `open_model`."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(dataset, file_name, repo_type="dataset"))
    except Exception as error:
        raise explain_hub_error(error, dataset, None) or error from error
