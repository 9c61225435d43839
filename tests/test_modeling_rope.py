"""Rotary tables: those of the library, by position and by the length of the prompt."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_models import CPU, FAMILIES, tiny_settings
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from subspec_cli.checkpoint.configured_model import configured_model
from subspec_cli.checkpoint.geometry import geometry_of
from subspec_cli.checkpoint.layer_description import Arithmetic
from subspec_cli.checkpoint.rope_settings import RopeSettings, read_ropes
from subspec_cli.modeling.rope import RopeTable, build_rope_tables

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
SHORT = torch.tensor(1)
"""A prompt of one token."""


def config_with(kind: str, family: str = "llama") -> Any:
    return FAMILIES[family](**tiny_settings(family), rope_parameters=dict(ROPES[kind]))


def settings_of(config: Any) -> RopeSettings:
    """What we read in the config.json that the library writes."""
    written = json.loads(config.to_json_string(use_diff=False))
    written["architectures"] = None
    model = configured_model(written)
    (settings,) = read_ropes(model, geometry_of(model, "BF16"))
    return settings


def table_of(
    settings: RopeSettings, *, positions: int = FAR, dtype: torch.dtype = torch.float32
) -> RopeTable:
    """The one table of a plain family."""
    arithmetic = Arithmetic(attention_scale=1.0, eps=1e-6)
    ropes = build_rope_tables([settings], arithmetic, positions=positions, dtype=dtype, device=CPU)
    return ropes.tables[0]


def library_rows(
    config: Any, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of one call of the library's module."""
    return LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=dtype), positions[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [kind for kind in ROPES if kind != "longrope"])
def test_tables_equal_the_library(kind: str, dtype: torch.dtype) -> None:
    config = config_with(kind)
    table = table_of(settings_of(config), dtype=dtype)
    positions = torch.tensor([0, 1, 2, 63, 64, 127, 128, 300, FAR - 1, 5])
    cos, sin = library_rows(config, positions, dtype)
    turned = table.rows(positions, SHORT)
    ours_cos, ours_sin = turned.cos, turned.sin
    assert ours_cos.shape == (10, 1, 32)
    torch.testing.assert_close(ours_cos[:, 0], cos[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours_sin[:, 0], sin[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("prompt", "far"), [(10, 127), (128, 127), (129, 128), (400, 399)])
def test_longrope_takes_its_factors_by_the_prompt(prompt: int, far: int) -> None:
    """The library decides by the largest position of a call: here that of the prompt's last token."""
    config = config_with("longrope")
    table = table_of(settings_of(config))
    positions, prompt_tokens = torch.tensor([0, 1, 17, far]), torch.tensor(prompt)
    cos, sin = library_rows(config, positions, torch.float32)
    turned = table.rows(positions, prompt_tokens)
    torch.testing.assert_close(turned.cos[:, 0], cos[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(turned.sin[:, 0], sin[0], atol=1e-6, rtol=0)


def test_rows_of_several_prompts_are_turned_each_by_its_own() -> None:
    table = table_of(settings_of(config_with("longrope")))
    positions, lengths = torch.tensor([5, 5, 90, 90]), torch.tensor([10, 300, 300, 10])
    together = table.rows(positions, lengths)
    for row, (position, length) in enumerate(zip(positions, lengths, strict=True)):
        alone = table.rows(position[None], length)
        assert torch.equal(together.cos[row], alone.cos[0])
        assert torch.equal(together.sin[row], alone.sin[0])
    assert not torch.equal(together.cos[0], together.cos[1])


def test_a_token_generated_past_the_switch_is_turned_by_the_long_factors() -> None:
    config = config_with("longrope")
    table = table_of(settings_of(config))
    for position in (127, 128, 200):
        cos, _ = library_rows(config, torch.tensor([position]), torch.float32)
        torch.testing.assert_close(
            table.rows(torch.tensor([position]), SHORT)[0][:, 0], cos[0], atol=1e-6, rtol=0
        )


def test_room_that_is_not_used_changes_nothing() -> None:
    settings = settings_of(config_with("longrope"))
    small, large = (table_of(settings, positions=n) for n in (100, FAR))
    positions = torch.arange(100)
    assert torch.equal(small.rows(positions, SHORT)[0], large.rows(positions, SHORT)[0])
    assert not small.differs(0, 90)


def test_cached_rows_of_the_other_table_are_known_by_it() -> None:
    table = table_of(settings_of(config_with("longrope")))
    lengths = (0, 10, 128, 129, 300, 20)
    assert [table.differs(*pair) for pair in pairwise(lengths)] == [False, False, True, False, True]


def test_qwen_configs_without_a_head_dim_take_it_from_the_heads() -> None:
    config = config_with("default", "qwen2")
    table = table_of(settings_of(config), positions=8)
    positions = torch.arange(8)
    cos, _ = Qwen2RotaryEmbedding(config)(torch.zeros(1), positions[None])
    torch.testing.assert_close(table.rows(positions, SHORT)[0][:, 0], cos[0], atol=1e-6, rtol=0)
