"""Embedding rows: from a table in memory, or read one by one from the file."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from tiny_models import VOCAB, Tiny

from subspec_cli.errors import IntegrityError
from subspec_cli.modeling.embedding import DiskEmbedding, table_embedding

MakeTiny = Callable[..., Tiny]
TABLE = "model.embed_tokens.weight"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_from_disk_are_those_of_the_table(tiny: MakeTiny, dtype: torch.dtype) -> None:
    model = tiny("qwen2", dtype=dtype, tied=False, sharded=True)
    with closing(DiskEmbedding(model.checkpoint.tensors[TABLE], dtype)) as rows:
        for token_ids in ([0], [VOCAB - 1], [5, 5, 0, 17], list(range(VOCAB))):
            wanted = torch.tensor(token_ids)
            found = rows(wanted)
            assert found.dtype == dtype
            assert torch.equal(found, model.weights[TABLE][wanted])
            assert torch.equal(found, table_embedding(model.weights[TABLE])(wanted))


def test_rows_of_another_type_are_cast(tiny: MakeTiny) -> None:
    """A float32 table beside matrices of 16 bits, of which a model is that keeps its tables whole."""
    model = tiny("qwen2", dtype=torch.float32, tied=False)
    with closing(DiskEmbedding(model.checkpoint.tensors[TABLE], torch.bfloat16)) as rows:
        assert torch.equal(rows(torch.tensor([3, 4])), model.weights[TABLE][3:5].bfloat16())


def test_rows_from_disk_are_fresh_at_every_call(tiny: MakeTiny) -> None:
    """The hidden state begins in them and may be updated in place."""
    model = tiny("qwen2", tied=False)
    with closing(DiskEmbedding(model.checkpoint.tensors[TABLE], torch.bfloat16)) as rows:
        first = rows(torch.tensor([3, 4]))
        first.zero_()
        assert torch.equal(rows(torch.tensor([3, 4])), model.weights[TABLE][3:5])


def test_a_file_cut_inside_the_table_is_an_error_that_names_it(tiny: MakeTiny, tmp_path) -> None:
    entry = tiny("qwen2", tied=False).checkpoint.tensors[TABLE]
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(entry.path.read_bytes()[: entry.offset_bytes + 10 * 256 + 1])
    with closing(DiskEmbedding(replace(entry, path=cut), torch.bfloat16)) as rows:
        assert rows(torch.tensor([9])).shape == (1, 128)
        with pytest.raises(IntegrityError, match=r"cut\.safetensors ends inside the embedding table"):
            rows(torch.tensor([9, 10]))


def test_close_gives_the_file_back(tiny: MakeTiny) -> None:
    entry = tiny("qwen2", tied=False).checkpoint.tensors[TABLE]
    before = len(os.listdir("/proc/self/fd"))
    rows = DiskEmbedding(entry, torch.bfloat16)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    rows.close()
    assert len(os.listdir("/proc/self/fd")) == before
