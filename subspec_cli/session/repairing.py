"""Making damaged files of a prepared model anew, and nothing else of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from subspec_cli.errors import UsageError
from subspec_cli.session.preparing import prepare
from subspec_cli.store.files import write_error
from subspec_cli.store.lock import directory_lock
from subspec_cli.store.model_name import name_of_id
from subspec_cli.store.models import StoredModel
from subspec_cli.store.prepare import PrepareProgress
from subspec_cli.store.verify import Finding, blob_of
from subspec_cli.units import printable


def repair(
    stored: StoredModel, findings: Sequence[Finding], progress: Callable[[PrepareProgress], None]
) -> None:
    """Drop what was found damaged and let the prepare pipeline make it again.

    Of the target, only files in the hub's cache that are not what their own names say are dropped, and fetched
    again; a directory of the user's is never touched. Raises what `prepare` raises, UsageError for a set whose
    manifest cannot be read, and BusyError while another process prepares it.
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
                _drop(finding.path)
            elif (
                finding.found
                and (blob := blob_of(finding.path)) is not None
                and blob.name == finding.expected
            ):
                _drop(blob)
                _drop(finding.path)
    is_on_hub = name_of_id(manifest.model_id).directory is None
    prepare(
        manifest.model_id,
        bits=manifest.settings.bits,
        optimizer=manifest.settings.optimizer,
        overrides=manifest.settings.overrides,
        revision=manifest.commit if is_on_hub else None,
        force=False,
        progress=progress,
    )


def _drop(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(error, path) from error
