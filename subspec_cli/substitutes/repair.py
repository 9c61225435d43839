"""Deletes damaged files of a prepared model, so that a preparation makes only these again."""

from __future__ import annotations

from collections.abc import Sequence

from subspec_cli.errors import UsageError
from subspec_cli.files.atomic_write import remove_file
from subspec_cli.files.lock import directory_lock
from subspec_cli.hub.model_name import name_of_id
from subspec_cli.substitutes.integrity import Finding, blob_of
from subspec_cli.substitutes.inventory import StoredModel
from subspec_cli.substitutes.manifest import Manifest
from subspec_cli.units import printable


def is_source_damaged(stored: StoredModel, findings: Sequence[Finding]) -> bool:
    """Whether weights in a user's directory are damaged. Only the user can put them back."""
    manifest = stored.manifest
    return (
        manifest is not None
        and name_of_id(manifest.model_id).directory is not None
        and any(finding.is_damage and finding.path.parent != stored.directory for finding in findings)
    )


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
