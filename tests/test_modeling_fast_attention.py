"""Attention of the draft: close to the written-out sum, over any mask."""

from __future__ import annotations

import pytest
import torch
from attention_cases import random_case, sizes_of

from subspec_cli.modeling.fast_attention import fast_attention, grouped_mask


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_rows_are_near_the_sum_in_float64(dtype: torch.dtype, atol: float, heads: int, kv_heads: int) -> None:
    case = random_case(sizes_of(heads, kv_heads), 33, dtype)
    positions = torch.tensor([5, 20, 32])
    allowed = torch.arange(33)[None] <= positions[:, None]
    expected = torch.stack([case.plain(int(position), None) for position in positions])
    for mask in (allowed, grouped_mask(allowed, heads // kv_heads, case.query)):
        found = fast_attention(case.query[positions], case.keys[:, :33], case.values[:, :33], mask)
        torch.testing.assert_close(found.double(), expected, atol=atol, rtol=0)


def test_masked_rows_do_not_show() -> None:
    case = random_case(sizes_of(), 20, torch.float32)
    allowed = torch.rand((4, 20), generator=torch.Generator().manual_seed(0)) < 0.5
    allowed[:, 3] = True
    found = fast_attention(case.query[:4], case.keys[:, :20], case.values[:, :20], allowed)
    for row in range(4):
        chosen = allowed[row].nonzero().flatten()
        alone = fast_attention(
            case.query[row : row + 1],
            case.keys[:, chosen],
            case.values[:, chosen],
            torch.ones((1, len(chosen)), dtype=torch.bool),
        )
        torch.testing.assert_close(alone[0], found[row], atol=1e-5, rtol=0)


def test_cache_views_with_gaps_are_read_right() -> None:
    """Keys and values are views of the first rows of a longer cache."""
    case = random_case(sizes_of(), 12)
    cache = torch.full((2, 2, 30, 16), torch.nan).bfloat16()
    cache[0, :, :12], cache[1, :, :12] = case.keys[:, :12], case.values[:, :12]
    allowed = torch.ones((3, 12), dtype=torch.bool)
    found = fast_attention(case.query[:3], cache[0, :, :12], cache[1, :, :12], allowed)
    whole = fast_attention(
        case.query[:3], case.keys[:, :12].contiguous(), case.values[:, :12].contiguous(), allowed
    )
    assert torch.equal(found, whole)
