"""The weight files of a model that are still to be downloaded, while the others are already in use."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from subspec_cli.hub.download import Download, DownloadContext, begin_download
from subspec_cli.hub.workers import WorkerChannel, Workers, run_all

_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """How far the downloads of the weight files are."""

    done_files: int
    total_files: int
    done_bytes: int
    total_bytes: int
    received_bytes: int
    """Those of the done bytes that came in this run."""
    elapsed_s: float


class WeightDownloads:
    """The missing weight files of a model. Only their headers are fetched before `start`."""

    def __init__(self, directory: Path, downloads: Sequence[Download], channel: WorkerChannel) -> None:
        self.directory = directory
        """Directory in the cache that will hold the files, to check its free space."""
        self._downloads = {download.name: download for download in downloads}
        self._there_bytes = sum(download.have_bytes - download.received_bytes for download in downloads)
        self._workers = Workers([download.finish for download in downloads], channel)
        self._started_s = time.monotonic()

    @property
    def missing_bytes(self) -> int:
        """Bytes that are still to be downloaded."""
        return sum(download.size_bytes - download.have_bytes for download in self._downloads.values())

    @property
    def is_complete(self) -> bool:
        """Whether every file is downloaded and verified."""
        return self.has(self._downloads)

    def has(self, names: Iterable[str]) -> bool:
        """Whether these files are complete. Files that were never missing are."""
        return all(name not in self._downloads or self._downloads[name].is_done for name in names)

    def start(self) -> None:
        """Begin to download, in the order given."""
        self._started_s = time.monotonic()
        self._workers.start()

    def wait(self) -> None:
        """Return once a file has arrived, or after a moment. Raises the error of a failed download."""
        self._workers.wait(_POLL_S)

    def progress(self) -> DownloadProgress | None:
        """How far the downloads are; None if there is nothing to download."""
        if not self._downloads:
            return None
        downloads = self._downloads.values()
        done_bytes = sum(download.have_bytes for download in downloads)
        return DownloadProgress(
            done_files=sum(download.is_done for download in downloads),
            total_files=len(downloads),
            done_bytes=done_bytes,
            total_bytes=sum(download.size_bytes for download in downloads),
            received_bytes=max(0, done_bytes - self._there_bytes),
            elapsed_s=time.monotonic() - self._started_s,
        )

    def close(self) -> None:
        """Stop the downloads. Bytes that have arrived stay for the next run."""
        if (
            self._workers.close()
        ):  # else a thread may still write, and the files are this process's until it ends
            for download in self._downloads.values():
                download.release()


def begin_all(context: DownloadContext, names: Sequence[str]) -> list[Download]:
    """Begin downloads of weight files up to their headers, a few at a time. Errors as `Download.finish`."""
    downloads: dict[str, Download] = {}

    def begin(name: str) -> None:
        downloads[name] = begin_download(context, name)
        downloads[name].fetch_header()

    try:
        run_all([partial(begin, name) for name in names], context.channel)
    except BaseException:
        for download in downloads.values():
            download.release()
        raise
    return [downloads[name] for name in names]


def fetch_all(context: DownloadContext, names: Sequence[str]) -> None:
    """Fetch small files, a few at a time. Errors as `Download.finish`."""

    def fetch(name: str) -> None:
        download = begin_download(context, name)
        try:
            download.finish()
        finally:
            download.release()

    run_all([partial(fetch, name) for name in names], context.channel)
