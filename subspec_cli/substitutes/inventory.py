"""The sets of substitutes on this machine, in any state: listing, choosing and removing them."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from subspec_cli.checkpoint.checkpoint import open_checkpoint
from subspec_cli.checkpoint.dtypes import DTYPES, EIGHT_BIT_DTYPE
from subspec_cli.errors import BusyError, SubspecError, UsageError
from subspec_cli.files.home import prepared_root
from subspec_cli.files.io_errors import read_error, write_error
from subspec_cli.files.lock import LOCK_NAME, directory_lock
from subspec_cli.files.temp_names import is_temp_name
from subspec_cli.hub.model_name import parse_model_name
from subspec_cli.hub.source_model import find_source_directory
from subspec_cli.substitutes.in_use import IN_USE_NAME, users_of
from subspec_cli.substitutes.last_use import LAST_USED_NAME, last_used_s
from subspec_cli.substitutes.manifest import (
    HEAD_NAME,
    JOURNAL_NAME,
    MANIFEST_NAME,
    TUNING_TEXT_NAME,
    Manifest,
    read_manifest,
)
from subspec_cli.substitutes.prepared_model import directory_slug
from subspec_cli.substitutes.prepared_names import full_name, near_name
from subspec_cli.substitutes.residual_set import RESIDUAL_NAME, RESIDUALS_NAME, usable_residuals
from subspec_cli.units import printable

StoredState = Literal["complete", "partial", "unreadable"]
"""Partial: a preparation that has not ended."""
COMPLETE: Final = "complete"
PARTIAL: Final = "partial"
UNREADABLE: Final = "unreadable"
_LAYER_NAME = re.compile(r"layer-[0-9]{5,6}\.safetensors")


@dataclass(frozen=True, slots=True)
class Target:
    """The weight files that substitutes were made from."""

    size_bytes: int
    bits: int | None
    """Of most weights: 8, 16 or 32; None if the manifest names no type."""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One set of substitutes on disk."""

    directory: Path
    state: StoredState
    manifest: Manifest | None
    """The journal if the set is partial; None if it is unreadable."""
    problem: str
    """Why the set is unreadable."""
    changed_ns: int
    """When the manifest or journal was last written, or last found complete."""

    @property
    def model_id(self) -> str:
        """The model's name; for an unreadable set, the directory's name."""
        return self.directory.name if self.manifest is None else self.manifest.model_id

    @property
    def size_bytes(self) -> int:
        """Bytes that removing the set frees."""
        return sum(path.lstat().st_size for path in own_files(self.directory))

    @property
    def has_residuals(self) -> bool:
        """Whether every layer has residuals that belong to it."""
        return self.manifest is not None and usable_residuals(self.directory, self.manifest)[0] is not None

    @property
    def last_used_s(self) -> float | None:
        """Unix time of the last run with this set; None if there was none."""
        return last_used_s(self.directory)

    def target(self) -> Target | None:
        """The weight files; None if they are gone or damaged."""
        if self.manifest is None:
            return None
        try:
            checkpoint = open_checkpoint(find_source_directory(self.manifest.model_id, self.manifest.commit))
        except SubspecError:
            return None
        bits = 8 if any(entry.dtype == EIGHT_BIT_DTYPE for entry in checkpoint.tensors.values()) else None
        stored = DTYPES.get(self.manifest.dtype)
        return Target(
            sum(file.size_bytes for file in checkpoint.files), bits or (stored.bits if stored else None)
        )


def list_stored() -> list[StoredModel]:
    """All sets under the home, the most recently prepared first.

    Raises:
        ResourceError: the directory of prepared models cannot be read.
    """
    root = prepared_root()
    try:
        directories = [path for path in root.iterdir() if path.is_dir()] if root.exists() else []
    except OSError as error:
        raise read_error(error, root) from error
    found = [stored for path in directories if (stored := _read_stored(path)) is not None]
    return sorted(found, key=lambda stored: (-stored.changed_ns, stored.directory.name))


def find_stored(model: str) -> list[StoredModel]:
    """The sets of one model, the most recent first. The model itself may be gone from this machine.

    Raises:
        UsageError: there is no such set, or several models have this last name.
        ResourceError: the directory of prepared models cannot be read.
    """
    stored = list_stored()
    model = full_name(model, [item.model_id for item in stored])
    names = {model, str(Path(model).expanduser().absolute())}
    with contextlib.suppress(UsageError):  # a directory that is gone may still have substitutes
        names.add(parse_model_name(model).model_id)
    slugs = tuple(f"{directory_slug(name)}--" for name in names)
    found = [
        item
        for item in stored
        if item.model_id in names or (item.manifest is None and item.directory.name.startswith(slugs))
    ]
    if not found:
        near = near_name(model)
        meant = f"did you mean {shlex.quote(printable(near))}? " if near else ""
        raise UsageError(f"{printable(model)} is not prepared", f"{meant}subspec models list shows what is")
    return found


def reread(stored: StoredModel) -> StoredModel:
    """Read the state of a set again."""
    return _read_stored(stored.directory) or stored


def all_but_latest(stored: list[StoredModel]) -> list[StoredModel]:
    """All sets but the one that `run` would take, or but the most recent one if none is complete."""
    complete = [item for item in stored if item.state == COMPLETE]
    kept = (complete or stored)[0]
    return [item for item in stored if item is not kept]


def refuse_used(stored: Sequence[StoredModel]) -> None:
    """Raise BusyError, which names the processes, if one of the sets is in use."""
    for item in stored:
        if users := users_of(item.directory):
            pids = ", ".join(map(str, users))
            raise BusyError(
                f"{printable(str(item.directory))} is in use (pid {pids})",
                "end that run first; --force removes it all the same",
            )


def remove_stored(stored: StoredModel) -> int:
    """Delete the files of one set, and return the bytes freed. The 16-bit weights stay.

    Raises:
        BusyError: the set is being prepared.
        ResourceError: a file cannot be deleted.
    """
    directory = stored.directory
    size_bytes = stored.size_bytes
    with directory_lock(directory):
        # The manifest goes first, so that a half removed set does not count as prepared.
        last = directory / LOCK_NAME
        paths = sorted(own_files(directory), key=lambda path: (path == last, path.name != MANIFEST_NAME))
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise write_error(error, path) from error
        with contextlib.suppress(OSError):  # a directory with files of others stays
            directory.rmdir()
    return size_bytes


def own_files(directory: Path) -> list[Path]:
    """The files in a set's directory that this program made."""
    known = {
        MANIFEST_NAME,
        JOURNAL_NAME,
        HEAD_NAME,
        RESIDUALS_NAME,
        LOCK_NAME,
        LAST_USED_NAME,
        TUNING_TEXT_NAME,
    }
    names = sorted(os.listdir(directory))
    own = [
        name
        for name in names
        if name in known
        or _LAYER_NAME.fullmatch(name)
        or RESIDUAL_NAME.fullmatch(name)
        or IN_USE_NAME.fullmatch(name)
        or is_temp_name(name)
    ]
    return [directory / name for name in own if not (directory / name).is_dir()]


def _read_stored(directory: Path) -> StoredModel | None:
    """The set in a directory; None if the directory holds no preparation."""
    manifest, journal = directory / MANIFEST_NAME, directory / JOURNAL_NAME
    path = manifest if manifest.exists() else journal
    if not path.exists():
        if not own_files(directory):
            return None
        return StoredModel(directory, PARTIAL, None, "nothing is recorded yet", directory.stat().st_mtime_ns)
    changed_ns = path.stat().st_mtime_ns
    try:
        found = read_manifest(path)
    except SubspecError as error:
        return StoredModel(directory, UNREADABLE, None, error.message, changed_ns)
    is_whole = not journal.exists() and all((directory / file.name).exists() for file in found.files)
    return StoredModel(directory, COMPLETE if is_whole else PARTIAL, found, "", changed_ns)
