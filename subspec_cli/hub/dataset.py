"""Files of datasets on the hub."""

from __future__ import annotations

from pathlib import Path

from subspec_cli.hub.hub_errors import explain_hub_error


def download_dataset_file(dataset: str, file_name: str) -> Path:
    """One file of a dataset on the hub, from the cache if it is there; errors as in `resolve_model`."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(dataset, file_name, repo_type="dataset"))
    except Exception as error:
        raise explain_hub_error(error, dataset, None) or error from error
