"""The draft's head on disk: the vocabulary table in 4 bits, whatever the width of the layers.

A table may be larger than several layers, so it is read, quantized, written and loaded in pieces of a few rows. Each
piece has its own codes, scales and shifts, packed as the matrices of layers are.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from subspec_cli.checkpoint.dtypes import DTYPES, torch_dtype
from subspec_cli.checkpoint.geometry import EMBEDDING, HEAD
from subspec_cli.checkpoint.safetensors_header import TensorEntry, read_header
from subspec_cli.checkpoint.tensor_reader import check_finite, each_hashed_tensor
from subspec_cli.errors import IntegrityError
from subspec_cli.files.atomic_write import atomic_write_pieces
from subspec_cli.files.regular_file import FileState
from subspec_cli.hub.command_hints import repair_command
from subspec_cli.substitutes.manifest import HEAD_NAME, HeadFile, file_path
from subspec_cli.substitutes.prepared_model import PreparedModel
from subspec_cli.substitutes.quality import MatrixQuality, summed
from subspec_cli.substitutes.settings import group_size_for
from subspec_cli.units import printable

if TYPE_CHECKING:
    import torch

HEAD_BITS: Final = 4
_PIECE_WEIGHTS: Final = 1 << 20
_PIECE_MULTIPLE: Final = 64
"""The kernels' layouts keep at most so many rows together, so pieces are packed one by one."""

HeadQuantizer: TypeAlias = "Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], MatrixQuality]]"
"""From rows `[R, hidden]` in 16 bits to their codes, scale and shift, and how close they are."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """The place of a tensor in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].size_bytes


def head_entry(tensors: Mapping[str, TensorEntry]) -> TensorEntry | None:
    """The table of the head, which may be that of the embedding; None if no low-bit kernel takes its shape."""
    entry = tensors[HEAD if HEAD in tensors else EMBEDDING]
    return None if group_size_for(entry.shape) is None else entry


def head_pieces(entry: TensorEntry) -> list[TensorEntry]:
    """A table as entries of a few rows each, in order."""
    row_bytes = entry.size_bytes // entry.shape[0]
    return [
        replace(
            entry,
            offset_bytes=entry.offset_bytes + start * row_bytes,
            size_bytes=rows * row_bytes,
            shape=(rows, *entry.shape[1:]),
        )
        for start, rows in _row_ranges(entry.shape)
    ]


def head_file_bytes(shape: tuple[int, ...]) -> int:
    """Size of the file for a table `[V, hidden]`."""
    return len(_header(shape)) + sum(slot.size_bytes for slot in _layout(shape))


def write_head(
    directory: Path, entry: TensorEntry, quantizer: HeadQuantizer, dtype: torch.dtype
) -> tuple[HeadFile, FileState]:
    """Quantize a table into a set's directory, a few rows at a time.

    Args:
        directory: of the set.
        entry: from `head_entry`.
        quantizer: quantizes a piece.
        dtype: in which the target computes with the table.

    Raises:
        IntegrityError: weights that are not finite; a source that ends early.
        ResourceError: the source cannot be read, or the file cannot be written.
    """
    source, made = hashlib.sha256(), hashlib.sha256()
    qualities: list[MatrixQuality] = []

    def pieces() -> Iterator[bytes | memoryview]:
        yield _header(entry.shape)
        for piece, rows in each_hashed_tensor(head_pieces(entry), source.update):
            check_finite({piece.name: rows})
            parts, quality = quantizer(rows.to(dtype))
            qualities.append(quality)
            for slot in _piece_layout(0, piece.shape):
                tensor = parts[slot.name.partition(".")[2]]
                assert (tensor.dtype, tuple(tensor.shape)) == (torch_dtype(slot.dtype), slot.shape)
                yield _bytes_of(tensor)

    def hashed() -> Iterator[bytes | memoryview]:
        for piece in pieces():
            made.update(piece)
            yield piece

    size_bytes = head_file_bytes(entry.shape)
    state = atomic_write_pieces(directory / HEAD_NAME, hashed(), size_bytes)
    total = summed(qualities)
    assert total is not None
    return HeadFile(HEAD_NAME, size_bytes, made.hexdigest(), source.hexdigest(), total), state


def read_head(prepared: PreparedModel, shape: tuple[int, int]) -> Iterator[dict[str, torch.Tensor]]:
    """The codes, scale and shift of each piece of the head's file, in the order of rows.

    What was read is sound once the last piece was followed by no error: the file is hashed on the way.

    Args:
        prepared: a set with a head.
        shape: of the table, `[V, hidden]`.

    Raises:
        IntegrityError: the file is missing, a link, of another table, or its hash is not that of the manifest.
        ResourceError: the file cannot be read.
    """
    expected = prepared.manifest.head
    assert expected is not None
    hint = repair_command(prepared.manifest.model_id)
    try:
        path = file_path(prepared.directory, expected.name)
        header = read_header(path)
        found = [_Slot(entry.name, entry.dtype, entry.shape) for entry in header.entries]
        if found != list(_layout(shape)):
            raise IntegrityError(f"{printable(str(path))} does not hold a table of {shape[0]} x {shape[1]}")
        digest, piece = hashlib.sha256(header.raw), {}
        for entry, tensor in each_hashed_tensor(header.entries, digest.update):
            piece[entry.name.partition(".")[2]] = tensor
            if len(piece) == 3:
                yield piece
                piece = {}
    except IntegrityError as error:
        raise IntegrityError(error.message, hint) from error
    if digest.hexdigest() != expected.sha256:
        raise IntegrityError(
            f"{printable(str(path))} has the SHA-256 {digest.hexdigest()}, expected {expected.sha256}", hint
        )


def _row_ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each piece."""
    step = max(1, _PIECE_WEIGHTS // shape[1] // _PIECE_MULTIPLE) * _PIECE_MULTIPLE
    for start in range(0, shape[0], step):
        yield start, min(step, shape[0] - start)


def _layout(shape: tuple[int, ...]) -> Iterator[_Slot]:
    """The tensors of the file of a table `[V, hidden]`, in order."""
    for start, rows in _row_ranges(shape):
        yield from _piece_layout(start, (rows, shape[1]))


def _piece_layout(start: int, shape: tuple[int, ...]) -> Iterator[_Slot]:
    group_size = group_size_for(shape)
    assert group_size is not None
    groups = math.prod(shape) // group_size
    yield _Slot(f"{start:07d}.codes", "U8", (groups * HEAD_BITS // 8, group_size))
    yield _Slot(f"{start:07d}.scale", "BF16", (groups, 1))
    yield _Slot(f"{start:07d}.shift", "BF16", (groups, 1))


def _header(shape: tuple[int, ...]) -> bytes:
    """The safetensors header of a table `[V, hidden]`: length and JSON text."""
    table, end = {}, 0
    for slot in _layout(shape):
        start, end = end, end + slot.size_bytes
        table[slot.name] = {"dtype": slot.dtype, "shape": slot.shape, "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().view(torch.uint8).numpy().data).cast("B")
