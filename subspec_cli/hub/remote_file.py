"""Requests for the files of one commit: their metadata, and their bytes from any offset.

Addresses, credentials, proxies and offline mode are left to the hub library. Redirects are followed here, so
that the token goes to no host but the hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from subspec_cli.errors import IntegrityError
from subspec_cli.hub.hub_errors import not_a_hub
from subspec_cli.units import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

_MAX_REDIRECTS = 5
_MAX_ERROR_BYTES = 1 << 20
_CONTENT_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_RETRY_HINT = "run the command again; if it stays so, the hub or a proxy is at fault"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a commit as the hub announces it."""

    name: str
    url: str
    etag: str
    """Hash of the content: SHA-256 for a large (LFS) file, git's SHA-1 for a small one."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ResponseBody:
    """The bytes of a file as they arrive."""

    start: int
    """Offset of the first byte: as requested, or 0 if the server does not support ranges."""
    pieces: Iterator[bytes]


def fetch_metadata(model_id: str, commit: str, name: str, stall_s: float | None) -> RemoteFile:
    """Request the metadata of a file. No byte of its content is fetched.

    Raises:
        NetworkError: the answer is not a hub's.
        IntegrityError: the answer is about another commit.
        Exception: the hub library's own, see `explain_hub_error`.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(model_id, name, revision=commit)
    found = get_hf_file_metadata(url, timeout=stall_s or constants.HF_HUB_ETAG_TIMEOUT)
    if found.commit_hash is None or found.size is None or not _CONTENT_HASH.fullmatch(found.etag or ""):
        raise not_a_hub()
    if found.commit_hash != commit:
        raise IntegrityError(
            f"the hub answered for {printable(name)} at commit {commit} "
            f"with one of commit {printable(found.commit_hash)[:40]}",
            _RETRY_HINT,
        )
    return RemoteFile(name, url, str(found.etag), found.size)


@contextmanager
def open_body(file: RemoteFile, start: int, end: int, stall_s: float | None) -> Iterator[ResponseBody]:
    """Request the bytes of a file from `start` to `end`, or from 0 if the server does not support ranges.

    Raises:
        IntegrityError: the file has another size or content than announced.
        Exception: the hub library's own, see `explain_hub_error`.
    """
    with _open_response(file, {"Range": f"bytes={start}-{end - 1}"}, stall_s) as response:
        status = response.status_code
        if status == 206:
            begin = _check_range(file, response.headers.get("Content-Range", ""), start)
        elif status == 416:  # the file ends before `start`, or the server is no hub
            _check_size(file, response.headers.get("Content-Range", "").rpartition("/")[2])
            raise not_a_hub()
        else:
            begin = 0
            _check_size(file, response.headers.get("Content-Length"))
        yield ResponseBody(begin, response.iter_raw())


@contextmanager
def _open_response(file: RemoteFile, headers: Mapping[str, str], stall_s: float | None) -> Iterator[Any]:
    """The response for a file, after redirects: an `httpx` response (the library may import it by another name)."""
    from huggingface_hub import constants, get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but loaded lazily

    home = url = file.url
    sent = build_hf_headers() | {"Accept-Encoding": "identity", **headers}
    timeout_s = stall_s or constants.HF_HUB_DOWNLOAD_TIMEOUT
    for _ in range(_MAX_REDIRECTS):
        with get_session().stream(
            "GET", url, headers=sent, follow_redirects=False, timeout=timeout_s
        ) as response:
            if _origin(url) == _origin(home):
                _check_etag(file, response.headers, response.status_code)
            if not response.has_redirect_location:
                if response.status_code >= 400 and response.status_code != 416:
                    if int(response.headers.get("Content-Length", "0")) <= _MAX_ERROR_BYTES:
                        response.read()
                    hf_raise_for_status(response)
                yield response
                return
            target = urljoin(url, response.headers["Location"])
            if urlsplit(target).scheme not in ("http", "https"):
                raise not_a_hub()
            if _origin(target) != _origin(home):
                sent = {name: value for name, value in sent.items() if name.lower() != "authorization"}
            url = target
    raise not_a_hub()  # too many redirects


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port


def _check_etag(file: RemoteFile, headers: Mapping[str, str], status: int) -> None:
    tag = headers.get("X-Linked-Etag") or (headers.get("ETag") if status in (200, 206) else None)
    if tag is not None and tag.removeprefix("W/").strip('"') != file.etag:
        raise IntegrityError(
            f"{printable(file.name)} changed on the hub between two requests: "
            f"{file.etag[:12]}… first, then {printable(tag)[:14]}…",
            "run the command again",
        )


def _check_range(file: RemoteFile, text: str, start: int) -> int:
    match = _CONTENT_RANGE.fullmatch(text)
    if match is None:
        raise not_a_hub()
    if match[2] != "*":
        _check_size(file, match[2])
    if int(match[1]) != start:
        raise IntegrityError(
            f"{printable(file.name)}: bytes from {match[1]} on were sent, {start} was asked for", _RETRY_HINT
        )
    return start


def _check_size(file: RemoteFile, text: str | None) -> None:
    if text is not None and text.isdecimal() and int(text) != file.size_bytes:
        raise IntegrityError(
            f"a download is damaged: {printable(file.name)} is sent with {text} bytes, "
            f"announced with {file.size_bytes}",
            _RETRY_HINT,
        )
