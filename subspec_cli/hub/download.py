"""The download of one file into the hub's cache: resumed where it stopped, and verified at its end."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from subspec_cli.checkpoint.safetensors_header import IncompleteFile, header_length
from subspec_cli.errors import IntegrityError, NetworkError
from subspec_cli.files.regular_file import has_size, open_regular
from subspec_cli.hub.cache import RepoCache
from subspec_cli.hub.hub_errors import explain_hub_error
from subspec_cli.hub.listing import Listing
from subspec_cli.hub.partial_file import Appender, ContentDigest
from subspec_cli.hub.remote_file import RemoteFile, fetch_metadata, open_body
from subspec_cli.hub.retry import Attempts, RetryPolicy, with_retries
from subspec_cli.hub.workers import WorkerChannel
from subspec_cli.units import format_bytes, printable

_FIRST_BYTES = 256 << 10  # of a weight file: nearly always enough for the header


@dataclass(frozen=True, slots=True)
class DownloadContext:
    """What all downloads of one commit share."""

    model_id: str
    listing: Listing
    cache: RepoCache
    retry_policy: RetryPolicy
    channel: WorkerChannel

    @property
    def commit(self) -> str:
        """The commit."""
        return self.listing.commit

    def new_attempts(self) -> Attempts:
        """A fresh count of attempts, for one request."""
        return Attempts(self.retry_policy, self.channel, self.model_id)


class Download:
    """A file that the cache lacks, and the part of it that is on disk."""

    def __init__(self, context: DownloadContext, remote: RemoteFile, attempts: Attempts) -> None:
        self._context = context
        self._remote = remote
        self._attempts = attempts
        self._digest = ContentDigest(remote.etag, remote.size_bytes)
        self.have_bytes = 0
        """Bytes that are on disk."""
        self.received_bytes = 0
        """Bytes that came over the network in this run."""
        self.is_done = False
        if has_size(context.cache.blob_path(remote.etag), remote.size_bytes):
            self._mark_done()
            return
        self._partial = context.cache.claim_partial(remote.etag, remote.name)
        with contextlib.suppress(FileNotFoundError):
            self.have_bytes = self._partial.lstat().st_size
        if self.have_bytes > remote.size_bytes:
            self._restart()
        self._peak_bytes = self.have_bytes
        self._resumes_earlier_run = self.have_bytes > 0

    @property
    def name(self) -> str:
        """Name of the file in its repository."""
        return self._remote.name

    @property
    def size_bytes(self) -> int:
        """Size of the whole file, as the hub announces it."""
        return self._remote.size_bytes

    @property
    def incomplete_file(self) -> IncompleteFile:
        """The part that is on disk, to read the header from."""
        return IncompleteFile(self._partial, self.size_bytes)

    def fetch_header(self) -> None:
        """Fetch the beginning of a safetensors file, up to the end of its header. Errors as `finish`."""
        if self.is_done:
            return
        try:
            self._fetch(min(_FIRST_BYTES, self.size_bytes))
            with open_regular(self._partial) as file:
                start = file.read(512)
            self._fetch(8 + header_length(start, Path(self.name), self.size_bytes))
        except IntegrityError:
            self._restart()
            raise

    def finish(self) -> None:
        """Fetch the rest, verify the whole file and store it in the cache.

        Raises:
            IntegrityError: the content is not the announced one; nothing of it is kept.
            NetworkError: the hub failed too often; says how much is on disk.
            AccessError: the hub refuses.
            ResourceError: the disk cannot be written.
        """
        if self.is_done:
            return
        if self.have_bytes:
            self._digest.hash_rest_of(self._partial)
        found = self._fetch_whole()
        if found != self._remote.etag and self._resumes_earlier_run:
            self._context.channel.report(f"what was there of {self.name} is damaged: fetching it again")
            self._restart()
            found = self._fetch_whole()
        if found != self._remote.etag:
            self._restart()
            raise IntegrityError(
                f"{printable(self.name)} arrived with the {self._digest.label} {found}, "
                f"the hub announced {self._remote.etag}",
                "run the command again; if it stays so, the hub or a proxy is at fault",
            )
        self._context.cache.store_blob(self._partial, self._remote.etag)
        self._mark_done()

    def release(self) -> None:
        """Leave what is there to the next run. Call it once nothing of this download runs any more."""
        if not self.is_done:
            self._context.cache.release_partial(self._partial, self._remote.etag, self.name)

    def _mark_done(self) -> None:
        self._context.cache.link_file(self._context.commit, self.name, self._remote.etag)
        self.have_bytes = self.size_bytes
        self.is_done = True

    def _fetch_whole(self) -> str:
        if not self.size_bytes:
            with Appender(self._partial):  # an empty file has no body to fetch, but the file must exist
                pass
        self._fetch(self.size_bytes)
        return self._digest.hexdigest_of(self._partial)

    def _fetch(self, until: int) -> None:
        """Fetch until the first `until` bytes are on disk."""
        while self.have_bytes < until:
            with_retries(lambda: self._receive(until), self._attempts, self._explain)

    def _receive(self, until: int) -> None:
        stall_s = self._context.retry_policy.stall_s
        with (
            open_body(self._remote, self.have_bytes, until, stall_s) as body,
            Appender(self._partial) as appender,
        ):
            if body.start != self.have_bytes:
                appender.cut(body.start)
                self.have_bytes = body.start
            for piece in body.pieces:
                self._context.channel.raise_if_stopped()
                wanted = piece[: until - self.have_bytes]
                appender.append(wanted, self.size_bytes - self.have_bytes)
                self._digest.update(wanted, self.have_bytes)
                self.have_bytes += len(wanted)
                self.received_bytes += len(piece)
                if self.have_bytes > self._peak_bytes:
                    self._peak_bytes = self.have_bytes
                    self._attempts.reset_failures()
                if self.have_bytes >= until:
                    return
        raise ConnectionError("the answer ended early")

    def _explain(self, error: Exception) -> Exception:
        failure = explain_hub_error(error, self._context.model_id, self._context.commit)
        if not isinstance(failure, NetworkError):
            return failure or error
        there = f"{format_bytes(self.have_bytes)} of {format_bytes(self.size_bytes)}"
        return NetworkError(
            f"{failure.message}; {there} of {printable(self.name)} are here",
            "run the same command again: it continues there",
        )

    def _restart(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._partial.unlink()
        self._digest.reset()
        self.have_bytes = self._peak_bytes = 0
        self._resumes_earlier_run = False


def begin_download(context: DownloadContext, name: str) -> Download:
    """Fetch the metadata of a file, and look for what an earlier run left of it.

    Raises:
        NetworkError, AccessError: the hub cannot be reached, or refuses.
        IntegrityError: the hub contradicts itself.
    """
    attempts = context.new_attempts()

    def explain(error: Exception) -> Exception:
        return explain_hub_error(error, context.model_id, context.commit) or error

    remote = with_retries(
        lambda: fetch_metadata(
            context.model_id, context.commit, context.listing.file(name), context.retry_policy.stall_s
        ),
        attempts,
        explain,
    )
    return Download(context, remote, attempts)
