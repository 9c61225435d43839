"""Attention of the draft: close to the written-out sum, over any mask."""

from __future__ import annotations

import pytest
import torch
from attention_cases import random_case, sizes_of

from subspec_cli.modeling.fast_attention import fast_attention, grouped_mask

SCALE = 16**-0.5


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_rows_are_near_the_sum_in_float64(dtype: torch.dtype, atol: float, heads: int, kv_heads: int) -> None:
    case = random_case(sizes_of(heads, kv_heads), 33, dtype)
    positions = torch.tensor([5, 20, 32])
    allowed = torch.arange(33)[None] <= positions[:, None]
    expected = torch.stack([case.plain(int(position), None) for position in positions])
    mask = grouped_mask(allowed, heads // kv_heads, case.query)
    found = fast_attention(
        case.query[positions], case.keys[None, :, :33], case.values[None, :, :33], mask, scale=SCALE
    )
    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=0)


def test_masked_rows_do_not_show() -> None:
    case = random_case(sizes_of(), 20, torch.float32)
    allowed = torch.rand((4, 20), generator=torch.Generator().manual_seed(0)) < 0.5
    allowed[:, 3] = True
    mask = grouped_mask(allowed, 2, case.query)
    found = fast_attention(
        case.query[:4], case.keys[None, :, :20], case.values[None, :, :20], mask, scale=SCALE
    )
    for row in range(4):
        chosen = allowed[row].nonzero().flatten()
        alone = fast_attention(
            case.query[row : row + 1],
            case.keys[None, :, chosen],
            case.values[None, :, chosen],
            torch.zeros((1, 1, 2, len(chosen))),
            scale=SCALE,
        )
        torch.testing.assert_close(alone[0], found[row], atol=1e-5, rtol=0)


def test_cache_views_with_gaps_are_read_right() -> None:
    """Keys and values are views of the first rows of a longer cache."""
    case = random_case(sizes_of(), 12)
    cache = torch.full((2, 2, 30, 16), torch.nan).bfloat16()
    cache[0, :, :12], cache[1, :, :12] = case.keys[:, :12], case.values[:, :12]
    mask = torch.zeros((1, 1, 6, 12)).bfloat16()
    found = fast_attention(case.query[:3], cache[:1, :, :12], cache[1:, :, :12], mask, scale=SCALE)
    whole = fast_attention(
        case.query[:3],
        case.keys[None, :, :12].contiguous(),
        case.values[None, :, :12].contiguous(),
        mask,
        scale=SCALE,
    )
    assert torch.equal(found, whole)
