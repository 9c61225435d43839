"""Reads that bypass the page cache: aligned extents into aligned buffers."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from subspec_cli.errors import IntegrityError
from subspec_cli.files.io_errors import read_error
from subspec_cli.units import printable

PAGE_BYTES: Final = 4096
_REQUEST_BYTES: Final = 16 << 20
"""Bytes of one read. Its pieces go to the disk together; between two reads the disk has nothing to do."""
_MOST_FILES: Final = 16
"""Files that a reader keeps open. A large model has hundreds, which a process may not have open at the same time."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A contiguous run of tensors in one file, and its place in a buffer."""

    path: Path
    first_byte: int
    """Page-aligned offset in the file."""
    size_bytes: int
    """Bytes from `first_byte` to the end of the last tensor."""
    buffer_offset: int
    """Page-aligned offset in the buffer."""


def allocate_buffer(size_bytes: int) -> mmap.mmap:
    """Page-aligned anonymous memory: zero until written, returned to the system when garbage-collected."""
    return mmap.mmap(-1, max(page_ceil(size_bytes), PAGE_BYTES))


class DirectReader:
    """Reads extents with O_DIRECT. Where the file system refuses it, reads are buffered and the pages dropped.

    Not thread-safe: one reader per thread.
    """

    def __init__(self) -> None:
        self._files: dict[Path, tuple[int, bool]] = {}
        """Descriptors of the files used last, latest at the end."""
        self._is_direct = True

    def read_extents(self, extents: Iterable[Extent], buffer: memoryview) -> None:
        """Fill `buffer` with the extents. Raises IntegrityError with file, offset and bytes if a read fails."""
        for extent in extents:
            self._read_extent(extent, buffer)

    @property
    def is_direct(self) -> bool:
        """Whether reads of every file opened so far bypass the page cache."""
        return self._is_direct

    def close(self) -> None:
        """Close the files."""
        for descriptor, _ in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _read_extent(self, extent: Extent, buffer: memoryview) -> None:
        descriptor, direct = self._open(extent.path)
        done = 0
        whole = page_ceil(extent.size_bytes)
        while done < extent.size_bytes:
            size = min(_REQUEST_BYTES, whole - done)
            start = extent.buffer_offset + done
            try:
                got = os.preadv(descriptor, [buffer[start : start + size]], extent.first_byte + done)
            except OSError as error:
                raise _unreadable(extent, done, os.strerror(error.errno or 0)) from error
            if got == 0:
                raise _unreadable(extent, done, "the file ends early")
            done += got
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, extent.first_byte, whole, os.POSIX_FADV_DONTNEED)

    def _open(self, path: Path) -> tuple[int, bool]:
        opened = self._files.pop(path, None)
        if opened is None:
            if len(self._files) >= _MOST_FILES:
                os.close(self._files.pop(next(iter(self._files)))[0])
            opened = _open_direct(path)
            self._is_direct &= opened[1]
        self._files[path] = opened
        return opened


def _open_direct(path: Path) -> tuple[int, bool]:
    flag = getattr(os, "O_DIRECT", 0)
    if flag:
        descriptor = -1
        try:
            descriptor = os.open(path, os.O_RDONLY | flag)
            os.preadv(descriptor, [allocate_buffer(PAGE_BYTES)], 0)
        except OSError:
            # tmpfs and some network file systems refuse direct I/O, at open or at the first read
            if descriptor >= 0:
                os.close(descriptor)
        else:
            return descriptor, True
    try:
        return os.open(path, os.O_RDONLY), False
    except OSError as error:
        raise read_error(error, path) from error


def _unreadable(extent: Extent, done: int, why: str) -> IntegrityError:
    wanted = extent.first_byte + extent.size_bytes
    return IntegrityError(
        f"{printable(str(extent.path))}: {why} at byte {extent.first_byte + done}, expected {wanted} bytes"
    )


def page_ceil(size_bytes: int) -> int:
    """The size rounded up to whole pages."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
