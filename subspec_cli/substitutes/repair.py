"""Deletes damaged files of a prepared model, so that a preparation makes only these again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from subspec_cli.errors import UsageError
from subspec_cli.files.atomic_write import remove_file
from subspec_cli.files.lock import directory_lock
from subspec_cli.hub.model_name import name_of_id
from subspec_cli.substitutes.integrity import Finding, blob_of
from subspec_cli.substitutes.inventory import COMPLETE, StoredModel
from subspec_cli.substitutes.manifest import MANIFEST_NAME, Manifest
from subspec_cli.substitutes.residual_set import RESIDUAL_NAME, RESIDUALS_NAME
from subspec_cli.units import printable


def is_source_damaged(stored: StoredModel, findings: Sequence[Finding]) -> bool:
    """Whether weights in a user's directory are damaged. Only the user can put them back."""
    manifest = stored.manifest
    return (
        manifest is not None
        and name_of_id(manifest.model_id).directory is not None
        and any(finding.is_damage and finding.path.parent != stored.directory for finding in findings)
    )


def is_of_residuals(stored: StoredModel, findings: Sequence[Finding]) -> bool:
    """Whether nothing but residuals of a complete set is wrong."""
    return stored.state == COMPLETE and all(
        finding.path.parent == stored.directory
        and (finding.path.name == RESIDUALS_NAME or RESIDUAL_NAME.fullmatch(finding.path.name))
        for finding in findings
    )


@contextmanager
def kept_recency(stored: StoredModel, first: Path) -> Iterator[None]:
    """Keep which set is the latest while files are made again; the set `first` stays behind if it is new."""
    paths = {stored.directory / MANIFEST_NAME: stored.changed_ns}
    first_path = first / MANIFEST_NAME
    if first_path not in paths:
        is_new = not first_path.exists()
        paths[first_path] = stored.changed_ns - 10**9 if is_new else first_path.stat().st_mtime_ns
    try:
        yield
    finally:
        for path, time_ns in paths.items():
            with contextlib.suppress(OSError):
                os.utime(path, ns=(time_ns, time_ns))


def drop_damaged(stored: StoredModel, findings: Sequence[Finding]) -> Manifest:
    """Delete the damaged files, and return the manifest that says how to make them again.

    Of the target, only files in the hub's cache whose hash is not the one in their name are deleted. A user's
    directory is never changed.

    Raises:
        UsageError: the manifest of the set cannot be read.
        BusyError: another process is preparing the set.
        ResourceError: a file cannot be deleted.
    """
    manifest = stored.manifest
    if manifest is None:
        raise UsageError(
            f"nothing tells how {printable(str(stored.directory))} was made",
            "prepare the model again with --force, or remove the directory",
        )
    with directory_lock(stored.directory):
        for finding in findings:
            if finding.path.parent == stored.directory:
                remove_file(finding.path)
            elif (
                name_of_id(manifest.model_id).directory is None
                and finding.found
                and (blob := blob_of(finding.path)) is not None
                and blob.name == finding.expected
            ):
                remove_file(blob)
                remove_file(finding.path)
    return manifest
