"""The pieces of a layer round as the library's do: in the same order of casts, bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from subspec_cli.modeling.layers import normalized
from subspec_cli.modeling.rope import Rotation, rotate
from subspec_cli.modeling.row_rules import RowRules
from subspec_cli.modeling.token_batch import causal_batch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_norms_are_those_of_the_library(dtype: torch.dtype, eps: float) -> None:
    norm = LlamaRMSNorm(128, eps=eps).to(dtype)
    norm.weight.data = random(1, 128, dtype=dtype)
    hidden = random(2, 40, 128, dtype=dtype) * torch.logspace(-3, 1, 40)[:, None].to(dtype)
    assert torch.equal(normalized("rounded_then_scaled", hidden, norm.weight, None, eps), norm(hidden))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_fused_norm_is_that_of_the_library_in_every_bit(dtype: torch.dtype, has_bias: bool) -> None:
    """In rows so wide that the mean in another order has other bits; a row has the same ones alone."""
    norm = torch.nn.LayerNorm(2560, eps=1e-5, bias=has_bias, dtype=dtype)
    norm.weight.data = random(1, 2560, dtype=dtype)
    if has_bias:
        norm.bias.data = random(2, 2560, dtype=dtype)
    hidden = random(3, 300, 2560, dtype=dtype) + 1
    found = normalized("fused_layer", hidden, norm.weight, norm.bias, 1e-5)
    assert torch.equal(found, norm(hidden))
    assert torch.equal(normalized("fused_layer", hidden[7:9], norm.weight, norm.bias, 1e-5), found[7:9])
    assert not torch.equal(normalized("layer", hidden, norm.weight, norm.bias, 1e-5), found)


def test_norms_of_heads_reduce_over_the_head() -> None:
    states, weight = random(1, 5, 3, 16, dtype=torch.float32), random(2, 16, dtype=torch.float32)

    def normed(rows: torch.Tensor) -> torch.Tensor:
        return normalized("rounded_then_scaled", rows, weight, None, 1e-6)

    alone = torch.stack([normed(states[:, head]) for head in range(3)], dim=1)
    assert torch.equal(normed(states), alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_is_that_of_the_library(dtype: torch.dtype) -> None:
    query, key = random(1, 40, 4, 32, dtype=dtype), random(2, 40, 2, 32, dtype=dtype)
    angles = random(3, 40, 16, dtype=torch.float32).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected = apply_rotary_pos_emb(
        query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos[None], sin[None]
    )
    for states, wanted in zip((query, key), expected, strict=True):
        assert torch.equal(rotate(states, Rotation(cos[:, None], sin[:, None])), wanted[0].transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiled", [False, True])
def test_the_gate_is_rounded_before_it_is_multiplied(dtype: torch.dtype, tiled: bool) -> None:
    gate, up = random(1, 6, 256, dtype=dtype), random(2, 6, 256, dtype=dtype)
    expected = torch.nn.functional.silu(gate) * up
    before = up.clone()
    assert torch.equal(RowRules(2, tile_elementwise=tiled).gated("silu", gate.clone(), up), expected)
    assert torch.equal(up, before)


@pytest.mark.parametrize(("tokens", "start"), [([5, 6, 7], 4), ([9], 0), ([1, 2], 3)])
def test_a_causal_row_sees_all_rows_up_to_its_own(tokens: list[int], start: int) -> None:
    batch = causal_batch(tokens, start)
    assert (batch.rows, batch.start, len(batch.positions)) == (len(tokens), start, len(tokens))
    assert batch.token_ids.tolist() == tokens
    assert batch.key_positions.tolist() == list(range(start + len(tokens)))
    for row, seen in enumerate(batch.allowed.tolist()):
        assert batch.positions[row] == start + row
        assert seen == [key <= start + row for key in range(start + len(tokens))]
