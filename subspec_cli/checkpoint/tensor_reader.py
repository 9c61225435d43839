"""Reads tensors from files into fresh memory, never by mmap: a truncated file is an error, not a crash."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import FileIO
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from subspec_cli.checkpoint.dtypes import DTYPES, torch_dtype
from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.errors import IntegrityError
from subspec_cli.files.io_errors import read_error
from subspec_cli.files.regular_file import open_regular
from subspec_cli.units import printable

if TYPE_CHECKING:
    import torch

_PIECE_BYTES = 16 << 20  # a signal is handled between two pieces


def read_tensors(entries: Iterable[TensorEntry]) -> dict[str, torch.Tensor]:
    """Read tensors into fresh memory, and drop the pages that they leave in the page cache.

    Raises:
        IntegrityError: a file is missing or ends early.
        ResourceError: a file cannot be read.
    """
    return {entry.name: view_tensor(data, entry) for entry, data in _read_each(entries)}


def read_hashed_tensors(entries: Iterable[TensorEntry]) -> tuple[dict[str, torch.Tensor], str]:
    """Like `read_tensors`, with the SHA-256 of the tensors' bytes in `in_read_order`.

    Bytes that several tensors share, such as one scale of a fused projection, count once.
    """
    digest = hashlib.sha256()
    tensors = {entry.name: tensor for entry, tensor in each_hashed_tensor(entries, digest.update)}
    return tensors, digest.hexdigest()


def hash_tensors(entries: Iterable[TensorEntry]) -> str:
    """The SHA-256 of `read_hashed_tensors`, with one tensor in memory at a time."""
    digest = hashlib.sha256()
    for _ in each_hashed_tensor(entries, digest.update):
        pass
    return digest.hexdigest()


def each_hashed_tensor(
    entries: Iterable[TensorEntry], take: Callable[[memoryview], None]
) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
    """Like `read_hashed_tensors`, one tensor after another; `take` gets the bytes to be hashed."""
    latest = None
    for entry, data in _read_each(entries):
        if (entry.path, entry.offset_bytes) != latest:
            take(_bytes_of(data))
        latest = (entry.path, entry.offset_bytes)
        yield entry, view_tensor(data, entry)


def read_hashed_file(path: Path, size_bytes: int) -> tuple[torch.Tensor, str]:
    """A whole file as bytes (uint8 tensor) and its SHA-256.

    Raises:
        IntegrityError: the file is missing or has another size than `size_bytes`.
        ResourceError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        found_bytes = os.fstat(file.fileno()).st_size
        if found_bytes != size_bytes:
            raise IntegrityError(f"{printable(str(path))} has {found_bytes} bytes, expected {size_bytes}")
        data = _read_bytes(file, path, 0, size_bytes)
    digest.update(_bytes_of(data))
    return data, digest.hexdigest()


def in_read_order(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """Sorted by file name, then offset: one forward pass over each file."""
    return sorted(entries, key=lambda entry: (entry.path.name, entry.path, entry.offset_bytes))


def view_tensor(data: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    """One tensor's bytes (uint8, one dimension) in its dtype and shape. Copies only to correct the alignment."""
    if data.storage_offset() % DTYPES[entry.dtype].size_bytes:
        data = data.clone()
    return data.view(torch_dtype(entry.dtype)).reshape(entry.shape)


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that every value of every tensor is finite.

    Raises:
        IntegrityError: with the tensor's name and the number of values that are not.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # The extremes are infinite or NaN if any value is. Finding them is a hundred times as fast as testing
        # all values, which took a third of the whole preparation.
        if not all(math.isfinite(value) for value in tensor.aminmax()):
            bad = tensor.numel() - int(tensor.isfinite().sum())
            raise IntegrityError(
                f"{name} holds {bad} values that are NaN or infinite", "download the model again"
            )


def _read_each(entries: Iterable[TensorEntry]) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
    for path, group in groupby(in_read_order(entries), key=lambda entry: entry.path):
        with open_regular(path) as file:
            for entry in group:
                yield entry, _read_bytes(file, path, entry.offset_bytes, entry.size_bytes)
                if hasattr(os, "posix_fadvise"):
                    # Every byte is read once: a model larger than memory would evict all else from the page cache.
                    os.posix_fadvise(
                        file.fileno(), entry.offset_bytes, entry.size_bytes, os.POSIX_FADV_DONTNEED
                    )


def _read_bytes(file: FileIO, path: Path, offset_bytes: int, size_bytes: int) -> torch.Tensor:
    import torch

    # torch's allocator aligns to 64 bytes. Kernels may choose their code by alignment.
    data = torch.empty(size_bytes, dtype=torch.uint8)
    view = _bytes_of(data)
    done = 0
    try:
        file.seek(offset_bytes)
        while done < size_bytes:
            count = file.readinto(view[done : done + _PIECE_BYTES])
            if not count:
                raise IntegrityError(
                    f"{printable(str(path))} ends at byte {offset_bytes + done}, "
                    f"expected {size_bytes - done} bytes more",
                    "the file was cut short: download it again",
                )
            done += count
    except OSError as error:
        raise read_error(error, path) from error
    return data


def _bytes_of(data: torch.Tensor) -> memoryview:
    # numpy's stubs do not say that an array is a buffer before Python 3.12.
    return memoryview(data.numpy().data)
