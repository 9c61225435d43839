"""The hub library's cache on disk: blobs named by content, snapshots by commit that link to them, refs by name."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from subspec_cli.checkpoint.source_directory import CONFIG_NAME
from subspec_cli.files.atomic_write import atomic_write, sync_directory
from subspec_cli.files.io_errors import write_error

_PARTIAL_SUFFIX = ".subspec.incomplete"


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

    def partial_path(self, etag: str, name: str) -> Path:
        """File for the beginning of a blob. Its name says which content it is, so that a later run finds it.

        The file's name is part of the path because files of equal content are fetched at the same time.
        """
        tag = hashlib.sha256(name.encode()).hexdigest()[:8]
        return self.directory / "blobs" / f"{etag}.{tag}{_PARTIAL_SUFFIX}"

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
        temp = pointer.with_name(f".{pointer.name}.tmp.{os.getpid()}")
        blob = self.blob_path(etag)
        try:
            temp.unlink(missing_ok=True)
            try:
                os.symlink(os.path.relpath(blob, pointer.parent), temp)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise
                shutil.copyfile(blob, temp)  # not moved: other snapshots may need the blob
            os.replace(temp, pointer)
        except OSError as error:
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
        """Remove partial files that no run will continue. The caller holds the lock."""
        for path in (self.directory / "blobs").glob(f"*{_PARTIAL_SUFFIX}"):
            with contextlib.suppress(OSError):  # a leftover only takes space
                path.unlink()


def repo_cache(model_id: str) -> RepoCache:
    """Where the hub library keeps the files of a model."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    root, folder = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=model_id, repo_type="model")
    return RepoCache(root / folder, root / ".locks" / folder)


def cached_snapshot(model_id: str, revision: str | None) -> Path | None:
    """Directory of a revision as the cache last saw it, complete or not; None if its config is not cached."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model_id, CONFIG_NAME, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(error, directory) from error
