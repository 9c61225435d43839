"""Tiny shapes of every family, as one table: the oracle of families goes through all of them.

Each family has two shapes or more. The second ones are odd: queries wider than the hidden states, one key and value
head, heads that are no share of the hidden size, biases, windows shorter than a draft tree. Families with two kinds
of layers have both kinds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

SLIDING: Final = "sliding_attention"
FULL: Final = "full_attention"
LINEAR: Final = "linear_attention"
_HIDDEN: Final = 96
_ODD: Final = {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 48}
_FEW_HEADS: Final = {"num_attention_heads": 2, "num_key_value_heads": 1}
"""For families whose heads are a share of the hidden size."""
_GEMMA4: Final = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
_DELTA: Final = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 32,
}
"""Real keys have 128 features. With 16 the output of a head nearly cancels in some rows, and its norm makes the
rounding of any float32 formulation ten times larger there."""
_MINISTRAL: Final = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_LLAMA3: Final = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN: Final = {
    "rope_type": "yarn",
    "rope_theta": 5e5,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "attention_factor": 1.2,
}


def _longrope(turned: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.05 * n for n in range(turned // 2)],
        "long_factor": [2.0 + 0.3 * n for n in range(turned // 2)],
    }


@dataclass(frozen=True, slots=True)
class FamilyCase:
    """One tiny model: the settings of `make_tiny_model`."""

    name: str
    family: str
    """The `model_type`, that of the wrapper if there is one."""
    settings: Mapping[str, Any]
    tied: bool
    layers: int

    @property
    def is_odd(self) -> bool:
        """Whether the shape is unusual."""
        return "," in self.name

    @property
    def is_hybrid(self) -> bool:
        """Whether some layers have a recurrent state."""
        return "linear_num_key_heads" in self.settings

    @property
    def how(self) -> dict[str, Any]:
        """Keyword arguments of `make_tiny_model`."""
        sizes = {"tied": self.tied, "layers": self.layers, "hidden": _HIDDEN, "pad_token_id": 0}
        return {"family": self.family, **sizes, **self.settings}


def _case(
    name: str,
    family: str,
    shared: Mapping[str, Any] = MappingProxyType({}),
    *,
    tied: bool = False,
    layers: int = 3,
    **settings: Any,
) -> FamilyCase:
    return FamilyCase(name, family, {**shared, **settings}, tied, layers)


CASES: Final = (
    _case("llama", "llama", tied=True),
    _case("llama, odd", "llama", _ODD, attention_bias=True, mlp_bias=True, rope_parameters=_LLAMA3),
    _case("mistral", "mistral", sliding_window=None),
    _case("mistral, odd", "mistral", _ODD, sliding_window=6, tied=True),
    _case("qwen2", "qwen2", tied=True),
    _case("qwen2, odd", "qwen2", _FEW_HEADS, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    _case("qwen3", "qwen3", head_dim=32),
    _case(
        "qwen3, odd",
        "qwen3",
        _ODD,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=7,
        layer_types=[SLIDING, FULL, SLIDING],
        tied=True,
    ),
    _case("ministral3", "ministral3", head_dim=32, rope_parameters=_MINISTRAL),
    _case(
        "ministral3, odd",
        "ministral3",
        _ODD,
        sliding_window=7,
        rope_parameters=_MINISTRAL | {"factor": 4.0, "mscale": 0.7, "llama_4_scaling_beta": 0.3},
        tied=True,
    ),
    _case("ministral", "ministral", head_dim=32, sliding_window=8, layer_types=[SLIDING, FULL, SLIDING]),
    _case("ministral, odd", "ministral", _ODD, sliding_window=5, tied=True),
    _case(
        "granite",
        "granite",
        embedding_multiplier=12.0,
        logits_scaling=0.7,
        residual_multiplier=0.22,
        attention_multiplier=0.125,
        tied=True,
    ),
    _case(
        "granite, odd",
        "granite",
        _ODD,
        embedding_multiplier=3,
        logits_scaling=0.3,
        residual_multiplier=0.9,
        attention_multiplier=0.3,
        attention_bias=True,
        mlp_bias=True,
    ),
    _case("seed_oss", "seed_oss", head_dim=48),
    _case(
        "seed_oss, odd",
        "seed_oss",
        _ODD,
        attention_bias=False,
        attention_out_bias=True,
        mlp_bias=True,
        tied=True,
    ),
    _case(
        "phi3",
        "phi3",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        sliding_window=9,
    ),
    _case(
        "phi3, odd",
        "phi3",
        _FEW_HEADS,
        original_max_position_embeddings=256,
        rope_parameters=_longrope(48),
        tied=True,
    ),
    _case(
        "phi3, long",
        "phi3",
        original_max_position_embeddings=8,
        partial_rotary_factor=0.5,
        rope_parameters=_longrope(12),
    ),
    _case("smollm3", "smollm3", tied=True, layers=5),
    _case(
        "smollm3, odd",
        "smollm3",
        _FEW_HEADS,
        use_sliding_window=True,
        sliding_window=6,
        no_rope_layers=[1, 0, 0, 1],
        attention_bias=True,
        mlp_bias=True,
        layers=4,
    ),
    _case("olmo2", "olmo2"),
    _case("olmo2, odd", "olmo2", _ODD, attention_bias=True, tied=True),
    _case("olmo3", "olmo3", sliding_window=8, layers=5),
    _case(
        "olmo3, odd",
        "olmo3",
        _ODD,
        attention_bias=True,
        sliding_window=5,
        layer_types=[FULL, SLIDING, FULL],
        rope_parameters={FULL: _YARN, SLIDING: {"rope_type": "default", "rope_theta": 10000.0}},
        tied=True,
    ),
    _case("glm4", "glm4", head_dim=32),
    _case(
        "glm4, odd",
        "glm4",
        _ODD,
        attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        tied=True,
    ),
    _case(
        "gemma2",
        "gemma2",
        head_dim=32,
        sliding_window=8,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=6.0,
        tied=True,
    ),
    _case(
        "gemma2, odd",
        "gemma2",
        _ODD,
        sliding_window=5,
        query_pre_attn_scalar=10,
        attention_bias=True,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=None,
        layer_types=[FULL, SLIDING, SLIDING],
    ),
    _case(
        "gemma3", "gemma3_text", head_dim=32, sliding_window=8, query_pre_attn_scalar=24, tied=True, layers=7
    ),
    _case(
        "gemma3, odd",
        "gemma3_text",
        _ODD,
        sliding_window=5,
        query_pre_attn_scalar=10,
        attention_bias=True,
        final_logit_softcapping=4.0,
        layer_types=[SLIDING, FULL, SLIDING],
        rope_parameters={
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 100000.0},
            SLIDING: {"rope_type": "default", "rope_theta": 1000.0},
        },
    ),
    _case("exaone4", "exaone4", sliding_window=8, layers=5),
    _case(
        "exaone4, odd",
        "exaone4",
        _ODD,
        sliding_window=None,
        layer_types=[FULL, FULL, FULL],
        rope_parameters=_LLAMA3,
        tied=True,
    ),
    _case("cohere2", "cohere2", sliding_window=8, logit_scale=0.5, tied=True, layers=5),
    _case(
        "cohere2, odd",
        "cohere2",
        _ODD,
        sliding_window=5,
        logit_scale=0.3,
        attention_bias=True,
        layer_types=[FULL, SLIDING, SLIDING],
    ),
    _case(
        "hunyuan",
        "hunyuan_v1_dense",
        head_dim=32,
        rope_parameters={"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10000.0},
        tied=True,
    ),
    _case("hunyuan, odd", "hunyuan_v1_dense", _ODD, attention_bias=True),
    _case("stablelm", "stablelm", use_qkv_bias=True, partial_rotary_factor=0.25),
    _case(
        "stablelm, odd",
        "stablelm",
        _FEW_HEADS,
        use_parallel_residual=True,
        qk_layernorm=True,
        hidden_act="gelu_pytorch_tanh",
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        tied=True,
    ),
    _case("mistral in mistral3", "mistral3", text="mistral", head_dim=32, sliding_window=None),
    _case("mistral in mistral3, odd", "mistral3", _ODD, text="mistral", sliding_window=6, tied=True),
    _case(
        "ministral3 in mistral3",
        "mistral3",
        text="ministral3",
        head_dim=32,
        rope_parameters=_MINISTRAL,
        tied=True,
    ),
    _case("ministral3 in mistral3, odd", "mistral3", _ODD, text="ministral3", rope_parameters=_MINISTRAL),
    _case(
        "gemma3 in gemma3",
        "gemma3",
        text="gemma3_text",
        head_dim=32,
        sliding_window=8,
        query_pre_attn_scalar=24,
        tied=True,
        layers=7,
    ),
    _case(
        "gemma3 in gemma3, odd",
        "gemma3",
        _ODD,
        text="gemma3_text",
        sliding_window=5,
        query_pre_attn_scalar=10,
        final_logit_softcapping=4.0,
        layer_types=[SLIDING, FULL, SLIDING],
    ),
    _case(
        "gemma4",
        "gemma4_text",
        _GEMMA4,
        head_dim=32,
        global_head_dim=48,
        sliding_window=8,
        tied=True,
        layers=7,
    ),
    _case(
        "gemma4, odd",
        "gemma4_text",
        _GEMMA4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=24,
        global_head_dim=64,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        attention_bias=True,
        sliding_window=5,
        final_logit_softcapping=4.0,
        layer_types=[SLIDING, FULL, SLIDING],
        tied=True,
    ),
    _case(
        "gemma4 unified",
        "gemma4_unified_text",
        head_dim=32,
        global_head_dim=48,
        sliding_window=8,
        layers=7,
        tied=True,
    ),
    _case(
        "gemma4 unified, odd",
        "gemma4_unified_text",
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=24,
        global_head_dim=64,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        sliding_window=5,
        final_logit_softcapping=4.0,
        layer_types=[FULL, SLIDING, FULL],
        tied=True,
    ),
    _case(
        "gemma4 in gemma4",
        "gemma4",
        _GEMMA4,
        text="gemma4_text",
        head_dim=32,
        global_head_dim=48,
        sliding_window=8,
        tied=True,
        layers=7,
    ),
    _case(
        "gemma4 in gemma4, odd",
        "gemma4",
        _GEMMA4,
        text="gemma4_text",
        head_dim=24,
        global_head_dim=64,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        final_logit_softcapping=4.0,
        sliding_window=5,
        layer_types=[SLIDING, FULL, SLIDING],
        tied=True,
    ),
    _case(
        "unified in gemma4 unified",
        "gemma4_unified",
        text="gemma4_unified_text",
        head_dim=32,
        global_head_dim=48,
        sliding_window=8,
        tied=True,
        layers=7,
    ),
    _case(
        "unified in gemma4 unified, odd",
        "gemma4_unified",
        text="gemma4_unified_text",
        head_dim=24,
        global_head_dim=64,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        sliding_window=5,
        layer_types=[SLIDING, FULL, SLIDING],
        tied=True,
    ),
    _case("qwen3.5", "qwen3_5_text", _DELTA, head_dim=32, layers=5),
    _case(
        "qwen3.5, odd",
        "qwen3_5_text",
        _DELTA,
        num_attention_heads=6,
        num_key_value_heads=1,
        head_dim=48,
        layer_types=[LINEAR, FULL, LINEAR],
        tied=True,
    ),
    _case("qwen3.5 in qwen3.5", "qwen3_5", _DELTA, text="qwen3_5_text", head_dim=32, layers=5, tied=True),
    _case(
        "qwen3.5 in qwen3.5, odd",
        "qwen3_5",
        _DELTA,
        text="qwen3_5_text",
        num_attention_heads=6,
        num_key_value_heads=1,
        head_dim=48,
        layer_types=[FULL, LINEAR, LINEAR],
    ),
)
"""The first case of a family is plain, those after it are odd."""
