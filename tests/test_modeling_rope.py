"""Rotary tables: those of the library, one per session."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import CPU, FAMILIES, tiny_settings
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from subspec_cli.modeling.rope import build_rope_table

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.1 * i for i in range(16)],
        "long_factor": [2.0 + 0.5 * i for i in range(16)],
        "original_max_position_embeddings": 128,
    },
}
FAR = 512


def config_with(kind: str, family: str = "llama") -> Any:
    return FAMILIES[family](**tiny_settings(family), rope_parameters=dict(ROPES[kind]))


def library_rows(
    config: Any, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of one call of the library's module."""
    return LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=dtype), positions[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [kind for kind in ROPES if kind != "longrope"])
def test_tables_equal_the_library(kind: str, dtype: torch.dtype) -> None:
    config = config_with(kind)
    table = build_rope_table(config, context=400, positions=FAR, dtype=dtype, device=CPU)
    positions = torch.tensor([0, 1, 2, 63, 64, 127, 128, 300, FAR - 1, 5])
    cos, sin = library_rows(config, positions, dtype)
    ours_cos, ours_sin = table.rows(positions)
    assert ours_cos.shape == (10, 1, 32)
    torch.testing.assert_close(ours_cos[:, 0], cos[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours_sin[:, 0], sin[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("context", "far"), [(128, 127), (129, 128), (400, 399)])
def test_longrope_takes_its_factors_by_the_context(context: int, far: int) -> None:
    """Trap 10: the library decides by the largest position of a call; the session's context decides once."""
    config = config_with("longrope")
    table = build_rope_table(config, context=context, positions=FAR, dtype=torch.float32, device=CPU)
    positions = torch.tensor([0, 1, 17, far])
    cos, sin = library_rows(config, positions, torch.float32)
    torch.testing.assert_close(table.rows(positions)[0][:, 0], cos[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(table.rows(positions)[1][:, 0], sin[0], atol=1e-6, rtol=0)


def test_a_deep_tree_past_the_switch_keeps_the_frequencies() -> None:
    """Trap 10: positions beyond the original length, of tree nodes past a short context, stay short."""
    config = config_with("longrope")
    table = build_rope_table(config, context=128, positions=160, dtype=torch.float32, device=CPU)
    deep = build_rope_table(config, context=128, positions=FAR, dtype=torch.float32, device=CPU)
    assert torch.equal(table.cos, deep.cos[:160])
    long = build_rope_table(config, context=129, positions=160, dtype=torch.float32, device=CPU)
    assert not torch.equal(table.cos, long.cos)


def test_qwen_configs_without_a_head_dim_take_it_from_the_heads() -> None:
    config = config_with("default", "qwen2")
    table = build_rope_table(config, context=8, positions=8, dtype=torch.float32, device=CPU)
    positions = torch.arange(8)
    cos, _ = Qwen2RotaryEmbedding(config)(torch.zeros(1), positions[None])
    torch.testing.assert_close(table.rows(positions)[0][:, 0], cos[0], atol=1e-6, rtol=0)
