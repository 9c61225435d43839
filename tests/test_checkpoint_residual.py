"""Residuals: every bit pattern comes back, by compiled loops and by torch operations, in any layout of the codes."""

import numpy as np
import pytest
import torch

from subspec_cli.checkpoint import residual
from subspec_cli.checkpoint.packed_codes import IndexLayout, UnitLayout, find_layout
from subspec_cli.checkpoint.residual import CodedMatrix, base_order, encode, ordered, rebuild, rebuild_rows
from subspec_cli.compiled import compiled
from subspec_cli.errors import IntegrityError
from subspec_cli.modeling.substitute import pack_codes

CPU = torch.device("cpu")


def coded(rows, columns, group, first=0, end=None, *, pack=pack_codes, seed=0):
    """A packed matrix of random codes, and the codes and scales of its rows `first` to `end`."""
    torch.manual_seed(seed)
    end = rows if end is None else end
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    pairs = torch.stack(
        (torch.rand(columns // group, rows) * 0.02, torch.randn(columns // group, rows) * 0.01), -1
    )
    pairs[0, ::3] *= 1e30
    pairs[-1, ::3] *= 1e-38  # bases below the smallest normal number
    pairs = pairs.bfloat16()
    matrix = CodedMatrix(
        pack(codes), pairs, find_layout(pack, rows, columns, CPU), first, (end - first, columns)
    )
    return matrix, codes[first:end], pairs[:, first:end]


def near(codes, pairs, spread):
    """Weights whose residuals are up to `spread`."""
    base = base_order(codes, pairs)
    order = (base + torch.randint(-spread, spread + 1, base.shape)).clamp_(-32768, 32767)
    return (order ^ ((order >> 31) & 0x7FFF)).to(torch.int16).view(torch.bfloat16)


def assert_rebuilt(weight, matrix, stored):
    compiled, by_torch = torch.zeros_like(weight), torch.zeros_like(weight)
    rebuild(stored, matrix, compiled)
    rebuild_rows(stored, matrix, by_torch, 0, 5)
    rebuild_rows(stored, matrix, by_torch, 5, len(weight))
    assert torch.equal(compiled.view(torch.int16), weight.view(torch.int16))
    assert torch.equal(by_torch.view(torch.int16), weight.view(torch.int16))


def test_the_order_is_that_of_values_and_no_two_patterns_share_a_place():
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    places = ordered(patterns)
    assert torch.equal(places.sort().values, torch.arange(-32768, 32768, dtype=torch.int32))
    finite = patterns.view(torch.bfloat16).float()
    keep = finite.isfinite()
    by_place = finite[keep][places[keep].argsort()]
    assert (by_place.diff() >= 0).all()


@pytest.mark.parametrize(("rows", "columns", "group"), [(512, 512, 64), (1024, 256, 128), (528, 512, 32)])
def test_every_pattern_comes_back(rows, columns, group):
    matrix, codes, pairs = coded(rows, columns, group)
    weight = near(codes, pairs, 127)
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    weight.view(-1)[::4][:65536] = patterns[torch.randperm(65536)]  # NaN payloads, infinities, both zeros
    stored = encode(weight, codes, pairs)
    assert_rebuilt(weight, matrix, stored)


@pytest.mark.parametrize(("first", "end"), [(0, 16), (48, 80), (16, 144), (640, 656), (500, 720)])
def test_the_rows_of_a_fused_matrix_are_rebuilt_from_any_row_on(first, end):
    matrix, codes, pairs = coded(720, 96, 32, first, end)
    weight = near(codes, pairs, 140)
    assert_rebuilt(weight, matrix, encode(weight, codes, pairs))


def test_the_limits_of_a_byte_and_rows_with_and_without_escapes():
    matrix, codes, pairs = coded(64, 64, 32)
    base = base_order(codes, pairs)
    order = base + torch.tensor([-128, -127, 127, 128]).repeat(64, 16)
    order[10:20] = base[10:20]
    order = order.clamp_(-32768, 32767)
    weight = (order ^ ((order >> 31) & 0x7FFF)).to(torch.int16).view(torch.bfloat16)
    stored = encode(weight, codes, pairs)
    counts = stored["starts"].diff()
    assert (counts[10:20] == 0).all()
    assert counts[0] == 32
    assert_rebuilt(weight, matrix, stored)
    weight = near(codes, pairs, 1)
    assert encode(weight, codes, pairs)["escapes"].numel() == 0
    assert_rebuilt(weight, matrix, encode(weight, codes, pairs))


def test_a_matrix_stays_raw_where_its_residual_is_larger_or_its_base_is_not_finite():
    _, codes, pairs = coded(64, 64, 32)
    weight = near(codes, pairs, 127)
    assert encode(weight, codes, pairs) is not None
    assert encode(near(codes, pairs, 30000), codes, pairs) is None
    pairs[0, 3, 0] = 3e38
    assert encode(weight, codes, pairs) is None


def test_the_layout_gives_the_codes_that_the_kernel_multiplies():
    rows, columns, group = 192, 128, 64
    matrix, codes, pairs = coded(rows, columns, group)
    ones = torch.ones_like(pairs)
    ones[..., 1] = 8  # weight = code
    found = torch._weight_int4pack_mm_for_cpu(
        torch.eye(columns, dtype=torch.bfloat16), matrix.packed, group, ones
    )
    assert torch.equal(found.t().to(torch.uint8), codes)
    assert torch.equal(matrix.codes(0, rows), codes)


def test_units_are_found_in_the_layout_of_this_machine():
    assert all(isinstance(part, UnitLayout) for part in find_layout(pack_codes, 1040, 96, CPU))


def test_a_scattered_layout_is_found_by_its_index():
    order = torch.randperm(64 * 32, generator=torch.Generator().manual_seed(1))

    def pack(codes):
        found = codes.view(-1, 64 * 32)[:, order]
        return (found[:, ::2] | found[:, 1::2] << 4).flatten()

    matrix, codes, pairs = coded(128, 32, 32, 16, 112, pack=pack)
    assert [type(part) for part in matrix.layout] == [IndexLayout]
    assert torch.equal(matrix.codes(0, 96), codes)
    weight = near(codes, pairs, 140)
    assert_rebuilt(weight, matrix, encode(weight, codes, pairs))


@pytest.mark.parametrize("lanes", [True, False])
def test_both_ways_to_set_escapes_give_the_same_bits(lanes, monkeypatch):
    loops = pytest.importorskip("subspec_cli.checkpoint.compiled_residual")
    if loops._rebuild_rows is None:
        pytest.skip("numba is not installed")
    torch.manual_seed(3)
    marks = torch.randint(-128, 128, (100,), dtype=torch.int8)
    marks[torch.rand(100) < 0.3] = -128
    values = torch.arange(1, 101, dtype=torch.int16)
    out = torch.zeros(100, dtype=torch.int16)
    by = loops._set_escapes_by_places
    if lanes:
        by = loops._set_escapes  # as compiled for this processor
    by(marks.numpy(), values.numpy(), 3, torch.zeros(101, dtype=torch.int32).numpy(), out.numpy())
    expected = torch.zeros(100, dtype=torch.int16)
    expected[marks == -128] = values[3 : 3 + int((marks == -128).sum())]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("shift", [0, 4])
def test_wide_vectors_give_the_bits_of_plain_loops(shift):
    loops = pytest.importorskip("subspec_cli.checkpoint.compiled_residual")
    if loops._group is None:
        pytest.skip("this processor has no such vectors")
    draws = np.random.default_rng(shift)
    codes = draws.integers(0, 256, 192, dtype=np.uint8)
    residuals = draws.integers(-127, 128, 192, dtype=np.int8)
    pairs = torch.from_numpy(draws.normal(0, [0.01, 0.2], (3, 2))).bfloat16().view(torch.int16).numpy()
    by_loops, by_vectors = np.zeros((2, 192), dtype=np.int16)
    given = (codes, np.int32(shift), pairs.view(np.uint16), residuals)
    compiled(loops._weights)(*given, by_loops)
    compiled(loops._weights_by_vectors)(*given, by_vectors)
    assert np.array_equal(by_loops, by_vectors)
    assert len(np.unique(by_loops)) > 100


@pytest.mark.parametrize(("columns", "words"), [(96, 4), (64, 2), (40, 4)])
def test_codes_are_turned_alike_with_wide_vectors_and_without(columns, words):
    loops = pytest.importorskip("subspec_cli.checkpoint.compiled_residual")
    if loops._group is None:
        pytest.skip("this processor has no such vectors")
    packed = np.random.default_rng(1).integers(0, 1 << 64, 8 + columns * words, dtype=np.uint64)
    tile = np.zeros((8 * words, columns // 8), dtype=np.uint64)
    loops._transpose_unit(packed, 8, words, tile)
    expected = packed[8:].view(np.uint8).reshape(columns, 8 * words).T
    assert np.array_equal(tile.view(np.uint8), expected)
    tile[:] = 0
    loops._transpose_words(packed, 8, words, tile)
    assert np.array_equal(tile.view(np.uint8), expected)


def test_without_numba_the_same_bits_come_from_torch_operations(monkeypatch):
    matrix, codes, pairs = coded(80, 96, 32, 16, 80)
    weight = near(codes, pairs, 140)
    out = torch.zeros_like(weight)
    monkeypatch.setattr(residual, "_rebuild_compiled", lambda *given: False)
    rebuild(encode(weight, codes, pairs), matrix, out)
    assert torch.equal(out.view(torch.int16), weight.view(torch.int16))


def test_damaged_starts_and_marks_are_found_and_nothing_is_read_beyond_the_escapes():
    matrix, codes, pairs = coded(80, 96, 32)
    weight = near(codes, pairs, 140)
    stored = encode(weight, codes, pairs)
    for name, at, value in (("starts", 7, 1 << 30), ("starts", 9, -5), ("residuals", (11, 3), -128)):
        damaged = {part: tensor.clone() for part, tensor in stored.items()}
        damaged[name][at] = value
        if name == "residuals":
            damaged["residuals"][:] = -128
        with pytest.raises(IntegrityError, match="damaged"):
            rebuild(damaged, matrix, torch.empty_like(weight))
