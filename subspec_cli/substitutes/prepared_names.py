"""Names of prepared models: short names, near ones, and the model that is meant where none is named."""

from __future__ import annotations

import contextlib
import difflib
import os
import shlex
from collections.abc import Collection
from pathlib import Path

from subspec_cli.errors import SubspecError, UsageError
from subspec_cli.files.home import prepared_root
from subspec_cli.files.io_errors import read_error
from subspec_cli.substitutes.last_use import last_used_s
from subspec_cli.substitutes.manifest import MANIFEST_NAME, read_manifest
from subspec_cli.units import printable


def manifests_by_recency() -> list[Path]:
    """Paths of all manifests, the most recently prepared first; raises ResourceError if they cannot be read."""
    try:
        found = [(path.stat().st_mtime_ns, path) for path in prepared_root().glob(f"*/{MANIFEST_NAME}")]
    except OSError as error:
        raise read_error(error, prepared_root()) from error
    return [path for _, path in sorted(found, reverse=True)]


def prepared_ids() -> list[str]:
    """The ids of all prepared models, the most recent first, each once. Damaged sets are skipped."""
    ids: dict[str, None] = {}
    for path in manifests_by_recency():
        with contextlib.suppress(SubspecError):
            ids[read_manifest(path).model_id] = None
    return list(ids)


def last_used_id(bits: int | None = None) -> str | None:
    """The model that ran last, of those prepared with `bits` if given; None if none ever ran.

    Raises:
        IntegrityError, UnsupportedModelError: the manifest of the set that is meant is damaged or newer.
    """
    used = [(last_used_s(path.parent), path) for path in manifests_by_recency()]
    for _, path in sorted(((time_s, path) for time_s, path in used if time_s is not None), reverse=True):
        manifest = read_manifest(path)
        if bits in (None, manifest.settings.bits):
            return manifest.model_id
    return None


def full_name(model: str, ids: Collection[str] | None = None) -> str:
    """The id of the model whose last name `model` is; `model` itself if it is a path, an id or no last name.

    `ids` are the ids to choose from, by default those of all prepared models. Raises UsageError if several models
    have this last name.
    """
    if not model.strip() or "/" in model or os.path.lexists(os.path.expanduser(model)):
        return model
    ids = prepared_ids() if ids is None else ids
    if model in ids:
        return model
    found = sorted({model_id for model_id in ids if last_name(model_id) == model})
    if len(found) > 1:
        names = [shlex.quote(printable(name)) for name in found]
        raise UsageError(
            f"{printable(model)} may be {' or '.join(names)}", f"give the whole name, such as {names[0]}"
        )
    return found[0] if found else model


def near_name(model: str) -> str | None:
    """The name of a prepared model that is written much like `model`; None if there is none, or for a path."""
    if model.startswith(("/", ".", "~")):
        return None
    names = {name.lower(): name for full in reversed(prepared_ids()) for name in (full, last_name(full))}
    close = difflib.get_close_matches(model.lower(), names, n=1, cutoff=0.7)
    return names[close[0]] if close else None


def last_name(model_id: str) -> str:
    """The part of an id after its last slash."""
    return model_id.rstrip("/").rpartition("/")[2]
