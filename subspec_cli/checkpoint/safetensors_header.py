"""Our own parser of safetensors headers. It runs before any other library or kernel sees a byte of the file.

It is stricter than the format: bounded sizes, no duplicate keys, names safe for a terminal, no unknown field.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from subspec_cli.checkpoint.dtypes import DTYPES
from subspec_cli.errors import IntegrityError, UnsupportedModelError
from subspec_cli.files.io_errors import read_error
from subspec_cli.files.json_object import parse_json_object
from subspec_cli.files.regular_file import open_regular
from subspec_cli.units import printable

MAX_HEADER_BYTES = 25_000_000
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 8

_START_BYTES = 512  # enough to recognise a file of another kind
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,512}")
_FIELDS = {"dtype", "shape", "data_offsets"}
_RETRY_HINT = "download the file again"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor is."""

    name: str
    dtype: str
    """As the format spells it: BF16, F16, F32, ..."""
    shape: tuple[int, ...]
    path: Path
    offset_bytes: int
    """From the start of the file."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What one safetensors file holds, after its checks."""

    entries: tuple[TensorEntry, ...]
    """In file order; together they cover the data exactly."""
    raw: bytes
    """Length prefix and JSON text, exactly as in the file."""
    status: os.stat_result
    """Of the file that was read, taken while it was open."""


@dataclass(frozen=True, slots=True)
class IncompleteFile:
    """A file of which only the beginning is on disk, with the whole header."""

    partial: Path
    size_bytes: int
    """Announced size of the whole file."""


def read_header(path: Path, incomplete: IncompleteFile | None = None) -> SafetensorsHeader:
    """Read and check the header of a safetensors file; if it is `incomplete`, from its partial file.

    Raises:
        IntegrityError: missing, not a regular file, or any violation of the format, with what was
            expected and found.
        ResourceError: the file cannot be read.
    """
    with open_regular(incomplete.partial if incomplete else path) as file:
        status = os.fstat(file.fileno())
        file_bytes = incomplete.size_bytes if incomplete else status.st_size
        try:
            start = file.read(_START_BYTES)
            length = header_length(start, path, file_bytes)
            raw = start[: 8 + length]
            while len(raw) < 8 + length:
                piece = file.read(8 + length - len(raw))
                if not piece:
                    raise _damaged(path, f"ends at byte {len(raw)}, inside its header of {length} bytes")
                raw += piece
        except OSError as error:
            raise read_error(error, path) from error
    return SafetensorsHeader(parse_entries(raw, path, file_bytes), raw, status)


def header_length(start: bytes, path: Path, file_bytes: int) -> int:
    """Length of the JSON text in bytes, from the first bytes of the file (at most 512).

    Raises:
        IntegrityError: the file is of another kind, or the length is out of bounds.
    """
    if start.startswith(b"version https://git-lfs"):
        raise IntegrityError(
            f"{printable(str(path))} is a git-lfs pointer, not the weights", "fetch them: git lfs pull"
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise _damaged(path, "is an HTML page, not the weights")
    if len(start) < 8:
        raise _damaged(path, f"has {file_bytes} bytes, a safetensors file has at least 10")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise _damaged(path, f"claims a header of {length} bytes, at most {MAX_HEADER_BYTES} are read")
    if length < 2:
        raise _damaged(path, f"claims a header of {length} bytes, at least 2 are needed")
    if 8 + length > file_bytes:
        raise _damaged(path, f"claims a header of {length} bytes but has only {file_bytes} bytes in all")
    return length


def parse_entries(raw: bytes, path: Path, file_bytes: int) -> tuple[TensorEntry, ...]:
    """The tensors that a raw header (length prefix and JSON text) describes, in file order.

    Raises:
        IntegrityError: any violation of the format, or a file whose size is not the one described.
    """
    header = parse_json_object(raw[8:], f"the header of {printable(str(path))}", IntegrityError, _RETRY_HINT)
    _check_metadata(header.pop("__metadata__", {}), path)
    if len(header) > MAX_TENSORS:
        raise _damaged(path, f"holds {len(header)} tensors, at most {MAX_TENSORS} are read")
    entries = [_entry(name, info, path, len(raw)) for name, info in header.items()]
    entries.sort(key=lambda entry: (entry.offset_bytes, entry.size_bytes))
    expected = len(raw)
    for entry in entries:
        if entry.offset_bytes != expected:
            kind = "a hole" if entry.offset_bytes > expected else "an overlap"
            found = entry.offset_bytes - len(raw)
            raise _damaged(
                path, f"has {kind} before {entry.name}: expected offset {expected - len(raw)}, found {found}"
            )
        expected += entry.size_bytes
    if expected != file_bytes:
        raise _damaged(path, f"should have {expected} bytes by its header, has {file_bytes}")
    return tuple(entries)


def _entry(name: str, info: object, path: Path, data_start: int) -> TensorEntry:
    if not _NAME.fullmatch(name):
        raise _damaged(path, f"has a tensor name that is not allowed: {name[:80]!a}")
    if not isinstance(info, dict) or info.keys() != _FIELDS:
        raise _damaged(path, f"describes {name} otherwise than by dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str):
        raise _damaged(path, f"gives {name} the dtype {ascii(dtype)[:40]}, expected a name")
    if dtype not in DTYPES:
        raise UnsupportedModelError(
            f"{printable(str(path))} holds {name} in {ascii(dtype)[:40]}, a type that is not known here",
            "give the 16-bit original",
        )
    if not _is_list_of_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _damaged(
            path, f"gives {name} the shape {ascii(shape)[:80]}, expected up to {MAX_DIMENSIONS} sizes"
        )
    if not _is_list_of_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"gives {name} the offsets {ascii(offsets)[:80]}, expected [begin, end]")
    size_bytes = -(-math.prod(shape) * DTYPES[dtype].bits // 8)
    if offsets[1] - offsets[0] != size_bytes:
        needed = f"{dtype} of shape {shape} needs {size_bytes}"
        raise _damaged(path, f"gives {name} {offsets[1] - offsets[0]} bytes, {needed}")
    return TensorEntry(name, dtype, tuple(shape), path, data_start + offsets[0], size_bytes)


def _is_list_of_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_metadata(metadata: object, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "has __metadata__ that is not a table of texts")


def _damaged(path: Path, text: str) -> IntegrityError:
    return IntegrityError(f"{printable(str(path))} {text}", _RETRY_HINT)
