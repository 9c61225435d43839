"""The hub library's cache on disk: blobs named by content, snapshots by commit that link to them, refs by name."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from subspec_cli.checkpoint.source_directory import CONFIG_NAME
from subspec_cli.errors import ResourceError
from subspec_cli.files.atomic_write import atomic_write, sync_directory
from subspec_cli.files.io_errors import write_error
from subspec_cli.files.temp_names import abandoned, owner_tag, temp_path

_PARTIAL_SUFFIX = ".subspec.incomplete"
_RELEASED = re.compile(r"[0-9a-f]+\.[0-9a-f]{8}\.subspec\.incomplete")


@dataclass(frozen=True, slots=True)
class RepoCache:
    """The place of one repository in the cache. Nothing of it need exist."""

    directory: Path
    lock_directory: Path
    """Holds our lock while files are fetched, so that only one process writes the partial files."""

    def snapshot_path(self, commit: str) -> Path:
        """Directory of the files of one commit."""
        return self.directory / "snapshots" / commit

    def blob_path(self, etag: str) -> Path:
        """File of the content with this hash."""
        return self.directory / "blobs" / etag

    def claim_partial(self, etag: str, name: str) -> Path:
        """A file for the beginning of a blob that is this process's alone, with what earlier runs left of it.

        A file that was released, or whose process is gone, is taken over; of one whose process may live, for locks
        do not work everywhere, a copy. The result need not exist. The name of the file in its repository is part
        of it, because files of equal content are fetched at the same time.
        """
        stem = _partial_stem(etag, name)
        own = self.directory / "blobs" / f"{stem}.{owner_tag()}{_PARTIAL_SUFFIX}"
        found = sorted(self._partials(stem), key=_size_bytes, reverse=True)
        for path in self._ownerless(found):
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(path, own)
                return own
        if found and not found[0].is_symlink():
            try:
                shutil.copyfile(found[0], own)
            except OSError:
                with contextlib.suppress(OSError):
                    own.unlink()
        return own

    def release_partial(self, partial: Path, etag: str, name: str) -> None:
        """Leave a partial file to the next run, unless a longer one is there."""
        released = self.directory / "blobs" / f"{_partial_stem(etag, name)}{_PARTIAL_SUFFIX}"
        with contextlib.suppress(OSError):
            if _size_bytes(released) > _size_bytes(partial):
                partial.unlink()
            else:
                os.replace(partial, released)

    def make_directories(self) -> None:
        """Create the directories for blobs and for the lock. Raises ResourceError."""
        for directory in (self.directory / "blobs", self.lock_directory):
            _make_directory(directory)

    def store_blob(self, partial: Path, etag: str) -> None:
        """Give a complete, verified partial file its final name, and sync it to disk. Raises ResourceError."""
        try:
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, self.blob_path(etag))
            sync_directory(partial.parent)
        except OSError as error:
            raise write_error(error, partial) from error

    def link_file(self, commit: str, name: str, etag: str) -> None:
        """Make the file `name` of a commit a link to the blob, or a copy where links cannot be made.

        Raises:
            ResourceError: the cache cannot be written.
        """
        pointer = self.snapshot_path(commit) / name
        _make_directory(pointer.parent)
        temp = temp_path(pointer)
        blob = self.blob_path(etag)
        try:
            try:
                os.symlink(os.path.relpath(blob, pointer.parent), temp)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise
                shutil.copyfile(blob, temp)  # not moved: other snapshots may need the blob
            os.replace(temp, pointer)
        except OSError as error:
            with contextlib.suppress(OSError):
                temp.unlink(missing_ok=True)
            raise write_error(error, pointer) from error

    def write_ref(self, revision: str, commit: str) -> None:
        """Record the commit of a branch or tag, for use offline. A read-only cache stays as it is."""
        path = self.directory / "refs" / revision
        with contextlib.suppress(OSError):
            if revision == commit or (path.is_file() and path.read_text() == commit):
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            if os.access(path.parent, os.W_OK):
                atomic_write(path, commit.encode())

    def remove_partial_files(self) -> None:
        """Remove partial files that no run will continue. Those of processes that may live stay."""
        for path in self._ownerless(self._partials("")):
            with contextlib.suppress(OSError):  # a leftover only takes space
                path.unlink()

    def _partials(self, stem: str) -> list[Path]:
        return list((self.directory / "blobs").glob(f"{stem}*{_PARTIAL_SUFFIX}"))

    def _ownerless(self, partials: Iterable[Path]) -> list[Path]:
        """Those that were released, or whose process is gone, in the same order."""
        paths = list(partials)
        gone = set(abandoned(paths))
        return [path for path in paths if path in gone or _RELEASED.fullmatch(path.name)]


def repo_cache(model_id: str) -> RepoCache:
    """Where the hub library keeps the files of a model."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if constants.HF_HUB_CACHE.startswith("~"):  # it would be a directory of that name here
        raise ResourceError("no home directory is known", "set HF_HOME to a directory for downloads")
    root, folder = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=model_id, repo_type="model")
    return RepoCache(root / folder, root / ".locks" / folder)


def cached_snapshot(model_id: str, revision: str | None) -> Path | None:
    """Directory of a revision as the cache last saw it, complete or not; None if its config is not cached."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model_id, CONFIG_NAME, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _partial_stem(etag: str, name: str) -> str:
    return f"{etag}.{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _size_bytes(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(error, directory) from error
