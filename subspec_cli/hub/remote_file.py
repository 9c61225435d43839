"""Requests for the files of one commit: their metadata, and their bytes from any offset.

Addresses, credentials, proxies and offline mode are left to the hub library. Redirects are followed here, so
that the token goes to no host but the hub.

Mirrors and proxies leave headers out and change others. What the hub's listing says of a file's content and size is
taken where an answer does not say it, and every content is verified by its hash, so only a file of which nobody names
the hash or the size is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import urljoin, urlsplit

from subspec_cli.errors import IntegrityError
from subspec_cli.hub.hub_errors import lacks_header, not_a_hub
from subspec_cli.units import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

_MAX_REDIRECTS = 5
_MAX_ERROR_BYTES = 1 << 20
_CONTENT_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_TAG = re.compile(r"(?:W/)?\"?([0-9a-f]{64}|[0-9a-f]{40})(?:[-;:][A-Za-z0-9._-]+)?\"?")
"""A content's hash as an ETag: weak or strong, with or without quotes, with the suffix of a compressing proxy."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_NO_HEAD: Final = (405, 501)
_DECODED: Final = ("gzip", "deflate")
_RETRY_HINT = "run the command again; if it stays so, the hub or a proxy is at fault"


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file as the hub's listing of the commit announces it."""

    name: str
    size_bytes: int | None
    content_hash: str | None
    """SHA-256 of a large (LFS) file, git's SHA-1 of a small one."""


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
    """Offset of the first byte: at most the one requested; 0 if the server does not support ranges."""
    pieces: Iterator[bytes]


def fetch_metadata(model_id: str, commit: str, listed: ListedFile, stall_s: float | None) -> RemoteFile:
    """Request the metadata of a file. No byte of its content is fetched.

    Raises:
        NetworkError: the answer is not a hub's, or hash or size of the content are nowhere.
        IntegrityError: the answer is about another commit.
        Exception: the hub library's own, see `explain_hub_error`.
    """
    from huggingface_hub import constants, hf_hub_url

    url = hf_hub_url(model_id, listed.name, revision=commit)
    told: dict[str, str] = {}
    """Headers of the hub's own answers, the first of each name, by names in lower case."""
    timeout_s = stall_s or constants.HF_HUB_ETAG_TIMEOUT
    with _open_response("HEAD", url, {}, timeout_s, told) as response:
        is_whole = response.status_code == 200 and "content-encoding" not in told
    if told.get("content-type", "").startswith("text/html") and "x-repo-commit" not in told:
        raise not_a_hub(f"{printable(listed.name)} is a web page there")
    found_commit = told.get("x-repo-commit", commit)
    if found_commit != commit:
        raise IntegrityError(
            f"the hub answered for {printable(listed.name)} at commit {commit} "
            f"with one of commit {printable(found_commit)[:40]}",
            _RETRY_HINT,
        )
    etag = _hash_in(told.get("x-linked-etag")) or listed.content_hash or _hash_in(told.get("etag"))
    if etag is None:
        raise lacks_header(listed.name, "ETag", "the hash of the content")
    size_bytes = _number(told.get("x-linked-size"))
    if size_bytes is None:
        size_bytes = listed.size_bytes
    if size_bytes is None and is_whole:
        size_bytes = _number(told.get("content-length"))
    if size_bytes is None:
        raise lacks_header(listed.name, "Content-Length", "the size")
    return RemoteFile(listed.name, url, etag, size_bytes)


def content_hash(text: str | None) -> str | None:
    """A hash of a content as listings give it; None for any other text."""
    return text if text is not None and _CONTENT_HASH.fullmatch(text) else None


@contextmanager
def open_body(file: RemoteFile, start: int, end: int, stall_s: float | None) -> Iterator[ResponseBody]:
    """Request the bytes of a file from `start` to `end`, or from earlier on if the server gives no such range.

    Raises:
        IntegrityError: the file has another size or content than announced.
        NetworkError: the answer cannot be read.
        Exception: the hub library's own, see `explain_hub_error`.
    """
    from huggingface_hub import constants

    timeout_s = stall_s or constants.HF_HUB_DOWNLOAD_TIMEOUT
    told: dict[str, str] = {}
    with ExitStack() as stack:
        wanted = {"Range": f"bytes={start}-{end - 1}"}
        response = stack.enter_context(_open_response("GET", file.url, wanted, timeout_s, told))
        begin = _usable_start(file, response, start)
        if begin is None:  # a range that cannot be used: the whole file can
            stack.close()
            response = stack.enter_context(_open_response("GET", file.url, {}, timeout_s, told))
            if response.status_code != 200:
                raise not_a_hub(f"it answers {response.status_code} to a request for {printable(file.name)}")
            begin = _usable_start(file, response, start) or 0
        _check_tag(file, told.get("x-linked-etag"))
        encoding = _encoding(response)
        if encoding not in ("", *_DECODED):
            raise not_a_hub(
                f"{printable(file.name)} comes with Content-Encoding {printable(encoding)[:40]}, "
                "which was not asked for"
            )
        yield ResponseBody(begin, response.iter_bytes() if encoding else response.iter_raw())


@contextmanager
def _open_response(
    method: Literal["HEAD", "GET"],
    url: str,
    headers: Mapping[str, str],
    timeout_s: float,
    told: dict[str, str],
) -> Iterator[Any]:
    """The response for a file, after redirects: an `httpx` response (the library may import it by another name).

    A HEAD is not redirected to another host: what the hub itself says is what counts. `told` gets the headers of
    the hub's own answers.
    """
    from huggingface_hub import get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but loaded lazily

    home = _origin(url)
    sent = build_hf_headers() | {"Accept-Encoding": "identity", **headers}
    for _ in range(_MAX_REDIRECTS):
        with get_session().stream(
            method, url, headers=sent, follow_redirects=False, timeout=timeout_s
        ) as response:
            if _origin(url) == home:
                for name, value in response.headers.items():
                    if (
                        response.status_code < 300
                        or name.startswith("x-")
                        or (name == "etag" and _hash_in(value))
                    ):
                        told.setdefault(name, value)
            target = urljoin(url, response.headers["Location"]) if response.has_redirect_location else None
            if target is not None and urlsplit(target).scheme not in ("http", "https"):
                raise not_a_hub("it redirects to what is no web address")
            if target is None or (method == "HEAD" and _origin(target) != home):
                is_refused = response.status_code >= 400 and response.status_code != 416
                if is_refused and not (method == "HEAD" and response.status_code in _NO_HEAD):
                    if (_number(response.headers.get("Content-Length")) or 0) <= _MAX_ERROR_BYTES:
                        response.read()
                    hf_raise_for_status(response)
                yield response
                return
            if _origin(target) != home:
                sent = {name: value for name, value in sent.items() if name.lower() != "authorization"}
            url = target
    raise not_a_hub(f"it redirects more than {_MAX_REDIRECTS} times")


def _usable_start(file: RemoteFile, response: Any, start: int) -> int | None:  # noqa: ANN401 - of the hub library
    """Offset of the first byte of an answer; None if the answer does not contain the byte at `start`.

    Raises IntegrityError if the file has another size than announced.
    """
    range_text = response.headers.get("Content-Range", "")
    if response.status_code == 416:
        _check_size(file, range_text.rpartition("/")[2])
        return None
    if response.status_code == 206:
        match = _CONTENT_RANGE.fullmatch(range_text)
        if match is None or int(match[1]) > start or _encoding(response):
            return None
        _check_size(file, match[2])
        return int(match[1])
    if not _encoding(response):
        _check_size(file, response.headers.get("Content-Length"))
    return 0


def _encoding(response: Any) -> str:  # noqa: ANN401 - of the hub library
    encoding = str(response.headers.get("Content-Encoding", "")).strip().lower()
    return "" if encoding == "identity" else encoding


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port


def _hash_in(tag: str | None) -> str | None:
    match = _TAG.fullmatch(tag.strip()) if tag is not None else None
    return match[1] if match else None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() and len(text) < 20 else None


def _check_tag(file: RemoteFile, tag: str | None) -> None:
    """Refuse an answer that is about another content. Tags that are no hash say nothing about it."""
    found = _hash_in(tag)
    if found is not None and len(found) == len(file.etag) and found != file.etag:
        raise IntegrityError(
            f"{printable(file.name)} changed on the hub between two requests: "
            f"{file.etag[:12]}… first, then {found[:12]}…",
            "run the command again",
        )


def _check_size(file: RemoteFile, text: str | None) -> None:
    found = _number(text)
    if found is not None and found != file.size_bytes:
        raise IntegrityError(
            f"a download is damaged: {printable(file.name)} is sent with {found} bytes, "
            f"announced with {file.size_bytes}",
            _RETRY_HINT,
        )
