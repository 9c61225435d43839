"""The shared cache, held against a simple list of rows."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from tiny_models import CPU
from torch import Tensor

from subspec_cli.checkpoint.layer_description import AttentionShape
from subspec_cli.modeling.kv_cache import KVCache

LAYERS, HEADS, DIM, CONTEXT, SCRATCH = 2, 3, 4, 12, 7


def make_cache() -> KVCache:
    return KVCache(
        [AttentionShape(HEADS, HEADS, DIM)] * LAYERS,
        context=CONTEXT,
        scratch=SCRATCH,
        dtype=torch.float32,
        device=CPU,
    )


def marked(layer: int, mark: float, rows: int, *, keys: bool) -> Tensor:
    """`[H, rows, D]` that tells layer, head, row, key or value; `mark` numbers the first row."""
    values = torch.zeros(HEADS, rows, DIM)
    values += torch.arange(rows)[None, :, None] + mark
    values += 1000 * layer + 100 * torch.arange(HEADS)[:, None, None]
    return values if keys else -values


def write_rows(kv: KVCache, start: int, mark: float, rows: int) -> None:
    """Rows numbered from `mark` on, in every layer."""
    for layer in range(LAYERS):
        kv.write(layer, start, marked(layer, mark, rows, keys=True), marked(layer, mark, rows, keys=False))


def assert_holds(kv: KVCache, marks: list[float]) -> None:
    """The first rows of every layer are those of these numbers."""
    for layer in range(LAYERS):
        keys, values = kv.read(layer, len(marks))
        expected = [marked(layer, mark, 1, keys=True) for mark in marks]
        expected_keys = torch.cat(expected, dim=1) if expected else torch.zeros(HEADS, 0, DIM)
        assert torch.equal(keys, expected_keys)
        assert torch.equal(values, -expected_keys)


def test_a_new_cache_is_empty_and_zero() -> None:
    """Trap 4: a masked row is weighted by zero, and zero times NaN is NaN."""
    kv = make_cache()
    assert (kv.committed, kv.capacity, kv.context) == (0, CONTEXT + SCRATCH, CONTEXT)
    assert kv.rows == 64, "attention reads whole blocks of keys"
    assert all(not tensor.any() for layer in range(LAYERS) for tensor in kv.read(layer, kv.rows))


def test_written_rows_are_read_back_and_stay_scratch() -> None:
    kv = make_cache()
    write_rows(kv, 0, 10, 3)
    assert_holds(kv, [10, 11, 12])
    assert kv.committed == 0


@pytest.mark.parametrize("start", [2, torch.tensor([2, 3, 4])])
def test_what_a_draft_step_writes_is_what_it_reads(start: int | torch.Tensor) -> None:
    """All layers at once, at rows of a number or of a tensor."""
    kv = make_cache()
    write_rows(kv, 0, 50, 2)
    kv.commit([0, 1], [7, 8])
    layers = kv.step_rows(start, 3, 5)
    for layer, rows in layers.items():
        rows.write(torch.stack([marked(layer, 10, 3, keys=keys) for keys in (True, False)]))
    assert_holds(kv, [50, 51, 10, 11, 12])
    for layer, rows in layers.items():
        keys, values = kv.read(layer, 5)
        assert torch.equal(rows.keys, keys[None])
        assert torch.equal(rows.values, values[None])
    with pytest.raises(AssertionError):
        kv.step_rows(1, 1, 5)  # over a committed row


@pytest.mark.parametrize("nodes", [[0, 1, 2], [0], [], [0, 2, 5], [2, 3, 4], [1, 2, 6], [6]])
def test_commit_moves_the_accepted_rows_together(nodes: list[int]) -> None:
    """Rows move towards the start over others still to be moved: [1, 2, 6], [2, 3, 4] overlap."""
    kv = make_cache()
    write_rows(kv, 0, 50, 2)
    kv.commit([0, 1], [7, 8])
    write_rows(kv, 2, 10, 7)
    kv.commit(nodes, [100 + node for node in nodes])
    assert_holds(kv, [50, 51, *(10 + node for node in nodes)])
    assert kv.token_ids == (7, 8, *(100 + node for node in nodes))
    assert kv.committed == 2 + len(nodes)


def test_rewind_forgets_the_end_and_its_rows_can_be_written_again() -> None:
    kv = make_cache()
    write_rows(kv, 0, 10, 5)
    kv.commit(range(5), range(5))
    kv.rewind(2)
    assert kv.token_ids == (0, 1)
    write_rows(kv, 2, 30, 1)
    kv.commit([0], [9])
    assert_holds(kv, [10, 11, 30])
    assert kv.token_ids == (0, 1, 9)


def test_the_whole_capacity_can_be_written_and_the_whole_context_committed() -> None:
    kv = make_cache()
    write_rows(kv, 0, 0, CONTEXT)
    kv.commit(range(CONTEXT), range(CONTEXT))
    write_rows(kv, CONTEXT, 20, SCRATCH)
    assert_holds(kv, [*range(CONTEXT), *range(20, 20 + SCRATCH)])
    assert kv.committed == CONTEXT


def test_broken_promises_are_caught() -> None:
    kv = make_cache()
    write_rows(kv, 0, 0, CONTEXT)
    kv.commit(range(CONTEXT - 1), range(CONTEXT - 1))
    with pytest.raises(AssertionError):
        write_rows(kv, CONTEXT - 2, 0, 1)  # over a committed row
    with pytest.raises(AssertionError):
        write_rows(kv, CONTEXT, 0, SCRATCH + 1)  # past the end
    with pytest.raises(AssertionError):
        kv.commit([0, 1], [1, 2])  # more than the context
    with pytest.raises(AssertionError):
        kv.commit([0], [1, 2])
    with pytest.raises(AssertionError):
        kv.rewind(CONTEXT)
    with pytest.raises(AssertionError):
        kv.rewind(-1)
    kv.rewind(0)
    with pytest.raises(AssertionError):
        kv.commit([2, 1], [1, 2])
    assert kv.committed == 0


@dataclass
class ListOfRows:
    """What the cache must hold: committed row numbers, tokens, and the scratch rows after."""

    marks: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


@pytest.mark.parametrize("seed", range(8))
def test_random_sequences_keep_the_committed_rows(seed: int) -> None:
    """Grow and verify trees, commit paths, rewind, in any order: rows and tokens are those of a plain list."""
    chance = random.Random(seed)
    kv, model = make_cache(), ListOfRows()
    mark = 0
    for _ in range(60):
        rows = chance.randint(1, SCRATCH)
        write_rows(kv, kv.committed, mark, rows)
        if chance.random() < 0.5:  # the target overwrites what the draft wrote
            mark += 100
            write_rows(kv, kv.committed, mark, rows)
        room = min(rows, CONTEXT - kv.committed)
        nodes = sorted(chance.sample(range(rows), chance.randint(0, room)))
        tokens = [chance.randrange(1000) for _ in nodes]
        kv.commit(nodes, tokens)
        model.marks += [mark + node for node in nodes]
        model.tokens += tokens
        mark += 100
        if chance.random() < 0.3:
            keep = chance.randint(0, kv.committed)
            kv.rewind(keep)
            del model.marks[keep:], model.tokens[keep:]
        assert kv.token_ids == tuple(model.tokens)
        assert_holds(kv, model.marks)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_a_damaged_draft_writes_is_finite(bad: float) -> None:
    """Rows behind the tree stay in the blocks that the target reads, masked: 0 times what is not finite is not 0."""
    kv = make_cache()
    found = torch.ones(2, HEADS, 3, DIM)
    found[1, :, 1] = bad
    kv.step_rows(2, 3, 5)[0].write(found)
    keys, values = kv.read(0, 5)
    assert keys[:, 2:].eq(1).all()
    assert values[:, 3].eq(0).all()
    assert values.isfinite().all()
