"""The hub library's cache on disk: blobs by content, snapshots by commit that point to them, refs by name."""

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
    """The place of one repository; nothing of it need exist."""

    directory: Path
    lock_directory: Path
    """Holds our lock while files are fetched: one process at a time writes the partial files."""

    def snapshot(self, commit: str) -> Path:
        """Directory of one commit's files."""
        return self.directory / "snapshots" / commit

    def blob(self, etag: str) -> Path:
        """The content with this hash."""
        return self.directory / "blobs" / etag

    def partial(self, etag: str, name: str) -> Path:
        """The beginning of a blob; by its name a later run finds it, and never takes it for other content.

        The file's name is part of it because files of equal content are fetched side by side.
        """
        tag = hashlib.sha256(name.encode()).hexdigest()[:8]
        return self.directory / "blobs" / f"{etag}.{tag}{_PARTIAL_SUFFIX}"

    def make(self) -> None:
        """Create the directories. Raises ResourceError."""
        for directory in (self.directory / "blobs", self.lock_directory):
            _make_directory(directory)

    def keep(self, partial: Path, etag: str) -> None:
        """Give a complete, verified partial file its final name, to outlast a power cut. Raises ResourceError."""
        try:
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, self.blob(etag))
            sync_directory(partial.parent)
        except OSError as error:
            raise write_error(error, partial) from error

    def point(self, commit: str, name: str, etag: str) -> None:
        """Let the file `name` of a commit be the blob: a link, or the file itself where links cannot be made.

        Raises:
            ResourceError: the cache cannot be written.
        """
        pointer = self.snapshot(commit) / name
        _make_directory(pointer.parent)
        temp = pointer.with_name(f".{pointer.name}.tmp.{os.getpid()}")
        blob = self.blob(etag)
        try:
            temp.unlink(missing_ok=True)
            try:
                os.symlink(os.path.relpath(blob, pointer.parent), temp)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise
                shutil.copyfile(blob, temp)  # other snapshots may need the blob, so it is not moved
            os.replace(temp, pointer)
        except OSError as error:
            raise write_error(error, pointer) from error

    def remember(self, revision: str, commit: str) -> None:
        """Note which commit a branch or tag stands for, for use offline; a cache that is read-only stays as is."""
        path = self.directory / "refs" / revision
        with contextlib.suppress(OSError):
            if revision == commit or (path.is_file() and path.read_text() == commit):
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            if os.access(path.parent, os.W_OK):
                atomic_write(path, commit.encode())

    def sweep(self) -> None:
        """Remove partial files that no run will continue; call it while holding the lock."""
        for path in (self.directory / "blobs").glob(f"*{_PARTIAL_SUFFIX}"):
            with contextlib.suppress(OSError):  # it takes room, and does no other harm
                path.unlink()


def repo_cache(model_id: str) -> RepoCache:
    """Where the hub library keeps the files of a model."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    root, folder = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=model_id, repo_type="model")
    return RepoCache(root / folder, root / ".locks" / folder)


def cached_snapshot(model_id: str, revision: str | None) -> Path | None:
    """Directory of a revision as the cache last saw it, complete or not; None if it holds no config of it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model_id, CONFIG_NAME, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(error, directory) from error
