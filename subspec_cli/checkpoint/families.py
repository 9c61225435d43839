"""The families that run, as rows of a table, and the wrappers around their text models.

A row names the configuration's class and gives three rules: what a layer computes, which kinds of layers there are,
and how rotary positions read. ARCHITECTURE.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from subspec_cli.checkpoint.config_fields import number
from subspec_cli.checkpoint.family_rules import (
    all_sliding,
    cap,
    exaone4_kinds,
    exaone4_layer,
    gemma4,
    gemma4_layer,
    gemma_2_or_3,
    granite,
    llama,
    olmo,
    plain,
    qwen3_5,
    qwen3_5_layer,
    qwen_kinds,
    rope_if_sliding,
    smollm3_kinds,
    smollm3_layer,
    stablelm,
    two_ropes,
    with_own_head_dim,
)
from subspec_cli.checkpoint.layer_description import ALL_NORMS, OUTPUT_NORMS, Arithmetic
from subspec_cli.checkpoint.layer_kinds import (
    FULL,
    LINEAR,
    SLIDING,
    Fields,
    Layers,
    by_kind,
    every,
    with_one_window,
    without_windows,
)
from subspec_cli.checkpoint.layer_tensors import LAYER_FACTOR
from subspec_cli.checkpoint.rope_rule import RopeRule
from subspec_cli.checkpoint.tensor_names import (
    FOUR_NORMS,
    FUSED_GATE_UP,
    FUSED_QKV,
    PLAIN_NAMES,
    POST_NORMS,
    StoredNames,
)

_PLAIN_ROPE: Final = RopeRule()


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of models: one row of the table."""

    model_type: str
    """As config.json names it; also the key of its fields."""
    architecture: str
    arithmetic: Callable[[Fields], Arithmetic]
    """What a layer computes, from the fields."""
    layers: Layers = without_windows
    rope: RopeRule = _PLAIN_ROPE
    names: StoredNames = PLAIN_NAMES
    eps_field: str = "rms_norm_eps"
    own_fields: tuple[str, ...] = ()
    """Fields beside those of the class that its rules read, and that other families may not set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapper:
    """A larger model whose text part runs; its other parts are neither fetched nor read, where files allow it."""

    model_type: str
    architecture: str
    texts: tuple[str, ...]
    """Families that the text part may have; the first is the default."""
    names: StoredNames
    is_tied: bool
    """Default of `tie_word_embeddings` beside `text_config`."""
    changes: Callable[[Arithmetic], Arithmetic] = lambda arithmetic: arithmetic
    """What the wrapper computes otherwise than the text model by itself."""


_MINISTRAL_TABLE: Final = MappingProxyType(
    {
        "type": "yarn",
        "rope_theta": 1_000_000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16_384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
)
_GEMMA4_ROPE: Final = RopeRule(
    kinds=("default", "proportional"),
    sliding_theta=10_000.0,
    default_table={
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    },
    fills_tables=False,
    share=1.0,
)
_GEMMA4_NAMES: Final = replace(FOUR_NORMS, renamed={LAYER_FACTOR: "layer_scalar"})
_VISION: Final = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
_FAMILIES: Final = (
    Family(model_type="llama", architecture="LlamaForCausalLM", arithmetic=llama),
    Family(model_type="mistral", architecture="MistralForCausalLM", arithmetic=plain, layers=with_one_window),
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        arithmetic=lambda fields: plain(fields, qkv_bias=True),
        layers=by_kind(qwen_kinds),
    ),
    Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        arithmetic=lambda fields: plain(fields, qk_norm="heads"),
        layers=by_kind(qwen_kinds),
    ),
    Family(
        model_type="ministral3",
        architecture="Ministral3ForCausalLM",
        arithmetic=plain,
        layers=with_one_window,
        rope=RopeRule(has_query_growth=True, default_table=_MINISTRAL_TABLE),
    ),
    Family(
        model_type="ministral",
        architecture="MinistralForCausalLM",
        arithmetic=with_own_head_dim,
        layers=by_kind(all_sliding, needs_window=True),
    ),
    Family(model_type="granite", architecture="GraniteForCausalLM", arithmetic=granite),
    Family(
        model_type="seed_oss",
        architecture="SeedOssForCausalLM",
        arithmetic=lambda fields: plain(fields, output_bias=fields["attention_out_bias"]),
    ),
    Family(
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        arithmetic=plain,
        layers=with_one_window,
        rope=RopeRule(
            share=1.0, kinds=("default", "longrope"), synonyms={"su": "longrope", "yarn": "longrope"}
        ),
        names=replace(PLAIN_NAMES, fused={**FUSED_QKV, **FUSED_GATE_UP}),
    ),
    Family(
        model_type="smollm3",
        architecture="SmolLM3ForCausalLM",
        arithmetic=plain,
        layers=by_kind(smollm3_kinds, smollm3_layer),
        rope=RopeRule(theta=2_000_000.0),
    ),
    Family(
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        arithmetic=olmo,
        names=POST_NORMS,
    ),
    Family(
        model_type="olmo3",
        architecture="Olmo3ForCausalLM",
        arithmetic=olmo,
        layers=by_kind(every(4, field=None), two_ropes, needs_window=True),
        rope=RopeRule(theta=500_000.0, sliding_theta=500_000.0),
        names=POST_NORMS,
    ),
    Family(
        model_type="glm4",
        architecture="Glm4ForCausalLM",
        arithmetic=lambda fields: plain(fields, norms=ALL_NORMS, output_bias=False, is_interleaved=True),
        rope=RopeRule(share=0.5),
        names=replace(
            PLAIN_NAMES,
            norms={
                "attention_input": "input_layernorm",
                "attention_output": "post_self_attn_layernorm",
                "mlp_input": "post_attention_layernorm",
                "mlp_output": "post_mlp_layernorm",
            },
            fused=FUSED_GATE_UP,
        ),
    ),
    Family(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        arithmetic=lambda fields: gemma_2_or_3(fields, score_cap=cap(fields, "attn_logit_softcapping")),
        layers=by_kind(every(2, field=None), needs_window=True),
        names=FOUR_NORMS,
    ),
    Family(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        arithmetic=lambda fields: gemma_2_or_3(fields, qk_norm="heads"),
        layers=by_kind(every(6), two_ropes, needs_window=True),
        rope=RopeRule(theta=1_000_000.0, sliding_theta=10_000.0, sliding_theta_field="rope_local_base_freq"),
        names=FOUR_NORMS,
    ),
    Family(
        model_type="gemma4_text",
        architecture="Gemma4ForCausalLM",
        arithmetic=gemma4,
        layers=by_kind(every(6, field=None), gemma4_layer, last=FULL),
        rope=_GEMMA4_ROPE,
        names=_GEMMA4_NAMES,
        own_fields=("per_layer_config",),
    ),
    Family(
        model_type="gemma4_unified_text",
        architecture="Gemma4UnifiedForCausalLM",
        arithmetic=gemma4,
        layers=by_kind(every(6, field=None), gemma4_layer, last=FULL),
        rope=_GEMMA4_ROPE,
        names=_GEMMA4_NAMES,
        own_fields=("per_layer_config",),
    ),
    Family(
        model_type="exaone4",
        architecture="Exaone4ForCausalLM",
        arithmetic=lambda fields: plain(fields, norms=OUTPUT_NORMS, qk_norm="heads"),
        layers=by_kind(exaone4_kinds, exaone4_layer),
        names=POST_NORMS,
    ),
    Family(
        model_type="cohere2",
        architecture="Cohere2ForCausalLM",
        arithmetic=lambda fields: plain(
            fields,
            norm="layer",
            norms=("attention_input",),
            is_parallel=True,
            eps=fields["layer_norm_eps"],
            is_interleaved=True,
            rotation_rounding="once_from_rounded",
            logits_factor=number(fields, "logit_scale"),
        ),
        layers=by_kind(every(4), rope_if_sliding, needs_window=True),
        eps_field="layer_norm_eps",
    ),
    Family(
        model_type="qwen3_5_text",
        architecture="Qwen3_5ForCausalLM",
        arithmetic=qwen3_5,
        layers=by_kind(every(4, field="full_attention_interval", other=LINEAR), qwen3_5_layer, other=LINEAR),
        rope=RopeRule(kinds=("default",), share=0.25),
        names=replace(PLAIN_NAMES, others=("mtp.",)),
    ),
    Family(
        model_type="hunyuan_v1_dense",
        architecture="HunYuanDenseV1ForCausalLM",
        arithmetic=lambda fields: with_own_head_dim(fields, qk_norm="rotated_heads"),
        rope=RopeRule(has_alpha=True),
        names=replace(
            PLAIN_NAMES,
            renamed={
                "self_attn.q_norm.weight": "self_attn.query_layernorm.weight",
                "self_attn.k_norm.weight": "self_attn.key_layernorm.weight",
            },
        ),
    ),
    Family(
        model_type="stablelm",
        architecture="StableLmForCausalLM",
        arithmetic=stablelm,
        rope=RopeRule(share=0.25),
        eps_field="layer_norm_eps",
    ),
)
FAMILIES: Final = MappingProxyType({family.model_type: family for family in _FAMILIES})
_GEMMA4_WRAPPER_NAMES: Final = StoredNames(
    towers=("model.language_model.",),
    others=tuple(
        f"model.{part}."
        for part in ("vision_tower", "embed_vision", "vision_embedder", "audio_tower", "embed_audio")
    ),
)
_WRAPPERS: Final = (
    Wrapper(
        model_type="mistral3",
        architecture="Mistral3ForConditionalGeneration",
        texts=("mistral", "ministral3"),
        names=StoredNames(
            towers=("language_model.model.", "model.language_model."),
            heads=("language_model.lm_head.weight", "lm_head.weight"),
            others=_VISION,
        ),
        is_tied=True,
    ),
    Wrapper(
        model_type="gemma3",
        architecture="Gemma3ForConditionalGeneration",
        texts=("gemma3_text",),
        names=StoredNames(
            towers=("language_model.model.", "model.language_model."),
            heads=("language_model.lm_head.weight", "lm_head.weight"),
            others=_VISION,
        ),
        is_tied=True,
        # The library's class has no code for the cap of logits.
        changes=lambda arithmetic: replace(arithmetic, logits_cap=None),
    ),
    Wrapper(
        model_type="qwen3_5",
        architecture="Qwen3_5ForConditionalGeneration",
        texts=("qwen3_5_text",),
        names=StoredNames(towers=("model.language_model.",), others=("model.visual.", "mtp.")),
        is_tied=False,
    ),
    Wrapper(
        model_type="gemma4",
        architecture="Gemma4ForConditionalGeneration",
        texts=("gemma4_text",),
        names=_GEMMA4_WRAPPER_NAMES,
        is_tied=True,
    ),
    Wrapper(
        model_type="gemma4_unified",
        architecture="Gemma4UnifiedForConditionalGeneration",
        texts=("gemma4_unified_text",),
        names=_GEMMA4_WRAPPER_NAMES,
        is_tied=True,
    ),
)
WRAPPERS: Final = MappingProxyType({wrapper.model_type: wrapper for wrapper in _WRAPPERS})
SUPPORTED_ARCHITECTURES: Final = tuple(row.architecture for row in (*_FAMILIES, *_WRAPPERS))
