"""The partial file of a download: bytes are appended to it, and hashed as they come."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from subspec_cli.errors import IntegrityError
from subspec_cli.files.io_errors import read_error, write_error
from subspec_cli.files.regular_file import open_regular
from subspec_cli.units import printable

_PIECE_BYTES = 4 << 20
_SHA256_DIGITS = 64


class Appender:
    """Appends bytes to a file. A link in its place is not followed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        try:
            self._handle = os.open(path, flags, 0o666)
        except OSError as error:
            raise write_error(error, path) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._handle)

    def cut(self, size_bytes: int) -> None:
        """Keep only the first bytes. Raises ResourceError."""
        try:
            os.ftruncate(self._handle, size_bytes)
        except OSError as error:
            raise write_error(error, self._path) from error

    def append(self, data: bytes, need_bytes: int) -> None:
        """Write at the end. Raises ResourceError, which reports `need_bytes` if the disk is full."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._handle, view) :]
        except OSError as error:
            raise write_error(error, self._path, need_bytes) from error


class ContentDigest:
    """The hash that names a content on the hub: SHA-256, or git's SHA-1, which puts the size before the bytes."""

    def __init__(self, expected: str, size_bytes: int) -> None:
        self._is_sha256 = len(expected) == _SHA256_DIGITS
        self.label = "SHA-256" if self._is_sha256 else "git hash"
        self._size_bytes = size_bytes
        self.reset()

    def reset(self) -> None:
        """Begin again."""
        self._position = 0
        if self._is_sha256:
            self._hash = hashlib.sha256()
        else:
            self._hash = hashlib.sha1(usedforsecurity=False)
            self._hash.update(f"blob {self._size_bytes}\0".encode())

    def update(self, data: bytes, offset: int) -> None:
        """Hash bytes that were appended at `offset`, unless earlier bytes are not hashed yet: `hash_rest_of` does."""
        if offset < self._position:
            self.reset()
        if offset == self._position:
            self._hash.update(data)
            self._position += len(data)

    def hash_rest_of(self, path: Path) -> None:
        """Hash the bytes that are on disk and not hashed yet, so that later bytes can be hashed as they come.

        Raises:
            IntegrityError: the file is missing or not a regular file.
            ResourceError: the file cannot be read.
        """
        with open_regular(path) as file:
            try:
                file.seek(self._position)
                while piece := file.read(_PIECE_BYTES):
                    self._hash.update(piece)
                    self._position += len(piece)
            except OSError as error:
                raise read_error(error, path) from error

    def hexdigest_of(self, path: Path) -> str:
        """The hash of the whole file. Errors as `hash_rest_of`, and IntegrityError for another size."""
        self.hash_rest_of(path)
        found_bytes = path.stat().st_size  # less than was hashed, if somebody cut it
        if not self._position == found_bytes == self._size_bytes:
            raise IntegrityError(
                f"{printable(str(path))} has {found_bytes} bytes, expected {self._size_bytes}",
                "another program changes it; run the command again when that is done",
            )
        return self._hash.hexdigest()
