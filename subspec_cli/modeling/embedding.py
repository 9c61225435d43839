"""Token embeddings: from a table in memory, or row by row from disk if the head does not share the table."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from subspec_cli.checkpoint.dtypes import torch_dtype
from subspec_cli.checkpoint.layer_description import Arithmetic
from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.errors import IntegrityError
from subspec_cli.files.io_errors import read_error
from subspec_cli.units import printable


def table_embedding(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Gathers rows from a table `[V, hidden]` in memory, on the table's device."""
    return lambda token_ids: F.embedding(token_ids.to(weight.device), weight)


def scaled_embedding(embed: Callable[[Tensor], Tensor], arithmetic: Arithmetic) -> Callable[[Tensor], Tensor]:
    """The embedding times the model's factor."""
    factor = arithmetic.embedding_factor
    if factor == 1.0:
        return embed

    def scaled(token_ids: Tensor) -> Tensor:
        rows = embed(token_ids)
        if arithmetic.rounds_embedding_factor:
            return rows * torch.tensor(factor, dtype=rows.dtype).item()
        return rows * factor

    return scaled


class DiskEmbedding:
    """Reads the rows of an untied table from its file, in `dtype`: a few KB per token, no memory for the table."""

    def __init__(self, entry: TensorEntry, dtype: torch.dtype) -> None:
        self._entry = entry
        self._dtype = dtype
        self._stored = torch_dtype(entry.dtype)
        self._row_bytes = entry.shape[1] * self._stored.itemsize
        try:
            self._file = os.open(entry.path, os.O_RDONLY)
        except OSError as error:
            raise read_error(error, entry.path) from error

    def __call__(self, token_ids: Tensor) -> Tensor:
        """`[P]` token ids to `[P, hidden]` rows."""
        rows = bytearray()
        for token_id in token_ids.tolist():
            row = os.pread(self._file, self._row_bytes, self._entry.offset_bytes + token_id * self._row_bytes)
            if len(row) != self._row_bytes:
                raise IntegrityError(f"{printable(str(self._entry.path))} ends inside the embedding table")
            rows += row
        return torch.frombuffer(rows, dtype=self._stored).view(len(token_ids), -1).to(self._dtype)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
