"""Attention: the target's has no order, the draft's is close to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from subspec_cli.modeling import attention
from subspec_cli.modeling.attention import exact_attention, fast_attention
from subspec_cli.modeling.layers import Attention

DRAWS = 200


def random_call(
    seed: int, *, rows: int, keys: int, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, keys, values and a mask with at least one allowed key in each row."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn((heads, rows, 16), generator=generator).to(dtype)
    key, value = (torch.randn((kv_heads, keys, 16), generator=generator).to(dtype) for _ in range(2))
    allowed = torch.rand((rows, keys), generator=generator) < 0.6
    allowed[torch.arange(rows), torch.randint(keys, (rows,), generator=generator)] = True
    return query, key, value, allowed


def plain_attention(query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
    """Float64, one head and one row at a time, only over the allowed keys."""
    heads, rows, dim = query.shape
    group = heads // keys.shape[0]
    output = torch.empty((rows, heads, dim), dtype=torch.float64)
    for head in range(heads):
        for row in range(rows):
            seen = keys[head // group][allowed[row]].double()
            weights = torch.softmax(seen @ query[head, row].double() / dim**0.5, dim=0)
            output[row, head] = weights @ values[head // group][allowed[row]].double()
    return output.view(rows, heads * dim)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (4, 1)])
def test_exact_attention_equals_a_plain_one_rounded_once(heads: int, kv_heads: int) -> None:
    """Grouped heads share their kv head in order; the result is the float64 value, rounded to the dtype."""
    call = random_call(1, rows=7, keys=13, heads=heads, kv_heads=kv_heads)
    assert torch.equal(exact_attention(*call), plain_attention(*call).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_order_of_keys_does_not_show(dtype: torch.dtype) -> None:
    """Permuted slots give the same bits; a float32 softmax fails this within a few of the draws."""
    for seed in range(DRAWS):
        query, keys, values, allowed = random_call(seed, rows=3, keys=40, dtype=dtype)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        straight = exact_attention(query, keys, values, allowed)
        turned = exact_attention(query, keys[:, order], values[:, order], allowed[:, order])
        assert torch.equal(straight, turned), f"draw {seed}"


def test_masked_columns_do_not_show() -> None:
    """Slots that no row sees, of whatever finite content and wherever they lie, leave no trace."""
    for seed in range(DRAWS):
        query, keys, values, allowed = random_call(seed, rows=3, keys=20)
        hidden = torch.randn((2, 11, 16), generator=torch.Generator().manual_seed(seed)).bfloat16() * 100
        order = torch.randperm(31, generator=torch.Generator().manual_seed(seed))
        more = torch.cat((allowed, torch.zeros(3, 11, dtype=torch.bool)), dim=1)[:, order]
        wide_keys = torch.cat((keys, hidden), dim=1)[:, order]
        wide_values = torch.cat((values, hidden), dim=1)[:, order]
        found = exact_attention(query, wide_keys, wide_values, more)
        assert torch.equal(exact_attention(query, keys, values, allowed), found), f"draw {seed}"


def test_rows_do_not_feel_each_other() -> None:
    for seed in range(20):
        query, keys, values, allowed = random_call(seed, rows=9, keys=24)
        together = exact_attention(query, keys, values, allowed)
        for row in range(9):
            alone = exact_attention(query[:, row : row + 1], keys, values, allowed[row : row + 1])
            assert torch.equal(alone[0], together[row]), f"draw {seed}, row {row}"


@pytest.mark.parametrize("tile_rows", [1, 2, 5])
def test_tiling_does_not_change_bits(monkeypatch: pytest.MonkeyPatch, tile_rows: int) -> None:
    """Trap 5: temporaries are bounded by tiles over the queries."""
    call = random_call(3, rows=11, keys=32)
    whole = exact_attention(*call)
    sizes: list[int] = []
    softmax = torch.softmax

    def watched(scores: Tensor, dim: int) -> Tensor:
        sizes.append(scores.numel() * scores.element_size())
        return softmax(scores, dim=dim)

    monkeypatch.setattr(torch, "softmax", watched)
    monkeypatch.setattr(attention, "TILE_BYTES", tile_rows * 8 * 4 * 32)
    assert torch.equal(exact_attention(*call), whole)
    assert len(sizes) == -(-11 // tile_rows)
    assert max(sizes) <= attention.TILE_BYTES


def test_a_row_wider_than_a_tile_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    call = random_call(4, rows=3, keys=32)
    whole = exact_attention(*call)
    monkeypatch.setattr(attention, "TILE_BYTES", 1)
    assert torch.equal(exact_attention(*call), whole)


@pytest.mark.parametrize("attend", [exact_attention, fast_attention])
def test_cache_views_with_gaps_are_read_right(attend: Attention) -> None:
    """Keys and values are views of the first rows of a longer cache."""
    query, keys, values, allowed = random_call(5, rows=4, keys=12)
    cache = torch.full((2, 2, 30, 16), torch.nan).bfloat16()
    cache[0, :, :12], cache[1, :, :12] = keys, values
    found = attend(query, cache[0, :, :12], cache[1, :, :12], allowed)
    assert torch.equal(found, attend(query, keys, values, allowed))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_fast_attention_is_close_to_the_exact_one(dtype: torch.dtype, atol: float) -> None:
    call = random_call(6, rows=9, keys=33, heads=6, kv_heads=2, dtype=dtype)
    torch.testing.assert_close(fast_attention(*call), exact_attention(*call), atol=atol, rtol=0)


def test_arguments_are_left_as_they_are() -> None:
    call = random_call(7, rows=5, keys=9)
    before = [tensor.clone() for tensor in call]
    exact_attention(*call)
    fast_attention(*call)
    assert all(torch.equal(a, b) for a, b in zip(call, before, strict=True))
