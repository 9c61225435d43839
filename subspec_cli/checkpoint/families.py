"""The families that run, as rows of a table, and the wrappers around their text models.

A row names the configuration's class and gives three rules: what a layer computes, which kinds of layers there are,
and how rotary positions read. ARCHITECTURE.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

from subspec_cli.checkpoint.config_fields import count, number, read_fields, shown
from subspec_cli.checkpoint.layer_description import (
    ALL_NORMS,
    OUTPUT_NORMS,
    Activation,
    Arithmetic,
    AttentionShape,
    DeltaShape,
    Mixer,
)
from subspec_cli.checkpoint.layer_kinds import (
    FULL,
    FULL_ROPE,
    LINEAR,
    SLIDING,
    SLIDING_ROPE,
    Fields,
    Layers,
    LayerSource,
    NamedLayer,
    by_kind,
    every,
    head_size,
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
from subspec_cli.errors import UnsupportedModelError
from subspec_cli.units import printable

_ACTIVATIONS: Final[Mapping[str, Activation]] = MappingProxyType(
    {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
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


@dataclass(frozen=True, slots=True)
class ConfiguredModel:
    """A model whose family and fields are read."""

    architecture: str
    family: Family
    names: StoredNames
    config: Mapping[str, Any]
    """The text part's table of config.json; the whole of it without a wrapper."""
    fields: Mapping[str, Any]
    """Its fields, with the defaults of those that are missing."""
    is_tied: bool
    """Whether head and embedding are one table if the weights do not say otherwise."""


def plain(fields: Fields, **changes: Any) -> Arithmetic:  # noqa: ANN401 - fields of `Arithmetic`
    """What most families compute, with the changes of one. Raises UnsupportedModelError for a wrong field."""
    has_bias = bool(fields.get("attention_bias", False))
    return Arithmetic(
        **(
            {
                "attention_scale": head_size(fields) ** -0.5,
                "eps": fields.get("rms_norm_eps"),
                "activation": _activation(fields),
                "qkv_bias": has_bias,
                "output_bias": has_bias,
                "mlp_bias": bool(fields.get("mlp_bias", False)),
            }
            | changes
        )
    )


def _activation(fields: Fields) -> Activation:
    name = "hidden_act" if "hidden_act" in fields else "hidden_activation"
    if (named := fields[name]) not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UnsupportedModelError(f"{name} {shown(named)} is not supported, only {known}")
    return _ACTIVATIONS[named]


def _llama(fields: Fields) -> Arithmetic:
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    if heads > 0 and hidden % heads:
        raise UnsupportedModelError(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    return plain(fields)


def _granite(fields: Fields) -> Arithmetic:
    return plain(
        fields,
        attention_scale=number(fields, "attention_multiplier"),
        embedding_factor=number(fields, "embedding_multiplier"),
        residual_factor=number(fields, "residual_multiplier"),
        logits_divisor=number(fields, "logits_scaling"),
    )


def _gemma(fields: Fields, **changes: Any) -> Arithmetic:  # noqa: ANN401 - fields of `Arithmetic`
    if fields["use_bidirectional_attention"] not in (None, False, "vision"):
        raise UnsupportedModelError(
            "use_bidirectional_attention is not supported: text attends backwards only"
        )
    return plain(
        fields,
        **(
            {
                "norm": "scaled_from_one",
                "norms": ALL_NORMS,
                "embedding_factor": fields["hidden_size"] ** 0.5,
                "rounds_embedding_factor": True,
                "logits_cap": _cap(fields, "final_logit_softcapping"),
            }
            | changes
        ),
    )


def _gemma_2_or_3(fields: Fields, **changes: Any) -> Arithmetic:  # noqa: ANN401 - fields of `Arithmetic`
    return _gemma(fields, attention_scale=number(fields, "query_pre_attn_scalar") ** -0.5, **changes)


def _gemma4(fields: Fields) -> Arithmetic:
    refused = (
        "hidden_size_per_layer_input",
        "num_kv_shared_layers",
        "enable_moe_block",
        "use_double_wide_mlp",
    )
    for name in refused:
        if fields.get(name):
            raise UnsupportedModelError(
                f"config field {name} is {shown(fields[name])}, which is not supported"
            )
    return _gemma(
        fields,
        norm="powered",
        attention_scale=1.0,
        qk_norm="heads",
        normalizes_values=True,
        has_layer_factor=True,
    )


def _gemma4_layer(shape: AttentionShape, layer: NamedLayer) -> AttentionShape:
    is_full, value_is_key = layer.kind == FULL, layer.fields["attention_k_eq_v"]
    own = {"head_dim": shape.head_dim, "num_key_value_heads": shape.kv_heads} | _gemma4_sizes(
        layer, value_is_key
    )
    kv_heads = count(own, "num_key_value_heads")
    if shape.heads % kv_heads:
        raise UnsupportedModelError(
            f"{shape.heads} heads are no multiple of {kv_heads} in layer {layer.number}"
        )
    return replace(
        shape,
        kv_heads=kv_heads,
        head_dim=count(own, "head_dim", least=2, most=1 << 14),
        rope=FULL_ROPE if is_full else SLIDING_ROPE,
        value_is_key=is_full and value_is_key,
    )


def _gemma4_sizes(layer: NamedLayer, value_is_key: bool) -> dict[str, Any]:
    """Sizes of a layer's own: from `per_layer_config`, else those of layers with full attention."""
    if (by_layer := layer.config.get("per_layer_config")) is not None:
        own = by_layer.get(str(layer.number), {}) if isinstance(by_layer, dict) else None
        if not isinstance(own, dict) or not own.keys() <= {"head_dim", "num_key_value_heads"}:
            raise UnsupportedModelError(
                f"config field per_layer_config sets {shown(own)} for layer {layer.number}, only head_dim and "
                "num_key_value_heads are supported"
            )
        return own
    if layer.kind != FULL:
        return {}
    kv_heads = layer.config.get("num_global_key_value_heads")
    sizes = {"head_dim": layer.config.get("global_head_dim", 512)}
    return sizes if kv_heads is None or not value_is_key else sizes | {"num_key_value_heads": kv_heads}


def _qwen3_5(fields: Fields) -> Arithmetic:
    if _activation(fields) != "silu":
        raise UnsupportedModelError(f"hidden_act {shown(fields['hidden_act'])} is not supported, only silu")
    return plain(fields, norm="scaled_from_one", qk_norm="heads")


def _qwen3_5_layer(shape: AttentionShape, layer: NamedLayer) -> Mixer:
    for name, implied in (("attn_output_gate", True), ("output_gate_type", "swish")):
        if (named := layer.config.get(name, implied)) != implied:
            raise UnsupportedModelError(f"config field {name} is {shown(named)}, only {implied} is supported")
    if layer.kind == FULL:
        return replace(shape, is_gated=True)
    fields = layer.fields
    delta = DeltaShape(
        key_heads=count(fields, "linear_num_key_heads", most=1 << 14),
        value_heads=count(fields, "linear_num_value_heads", most=1 << 14),
        key_dim=count(fields, "linear_key_head_dim", most=1 << 14),
        value_dim=count(fields, "linear_value_head_dim", most=1 << 14),
        kernel=count(fields, "linear_conv_kernel_dim", most=64),
    )
    if delta.value_heads % delta.key_heads:
        raise UnsupportedModelError(
            f"linear_num_value_heads {delta.value_heads} is no multiple of linear_num_key_heads {delta.key_heads}"
        )
    return delta


def _cap(fields: Fields, name: str) -> float | None:
    return None if fields[name] is None else number(fields, name)


def _olmo(fields: Fields) -> Arithmetic:
    return plain(fields, norm="scaled", norms=OUTPUT_NORMS, qk_norm="projection", rotation_rounding="once")


def _qwen_kinds(source: LayerSource) -> list[str]:
    fields = source.fields
    layers, first = fields["num_hidden_layers"], fields["max_window_layers"]
    has_window = fields["use_sliding_window"] and fields["sliding_window"] is not None
    return [SLIDING if has_window and layer >= first else FULL for layer in range(layers)]


def _with_own_head_dim(fields: Fields, **changes: Any) -> Arithmetic:  # noqa: ANN401 - fields of `Arithmetic`
    """As `plain`, where the library's code takes the size of heads from config.json alone."""
    if fields["head_dim"] is None:
        raise UnsupportedModelError(
            "config field head_dim is missing or null: the library fails on this",
            'add "head_dim": the rows of q_proj divided by num_attention_heads',
        )
    return plain(fields, **changes)


def _all_sliding(source: LayerSource) -> list[str]:
    return [SLIDING] * int(source.fields["num_hidden_layers"])


def _has_rope(fields: Fields, layer: int) -> bool:
    named = fields["no_rope_layers"]
    if named is None:
        interval = fields["no_rope_layer_interval"]
        if interval < 1:
            raise UnsupportedModelError(f"config field no_rope_layer_interval is {interval}, not a count")
        return bool((layer + 1) % interval)
    if len(named) < fields["num_hidden_layers"]:
        raise UnsupportedModelError(
            f"config field no_rope_layers names {len(named)} of {fields['num_hidden_layers']} layers"
        )
    return bool(named[layer])


def _smollm3_kinds(source: LayerSource) -> list[str]:
    fields = source.fields
    has_window = fields["use_sliding_window"] and fields["sliding_window"] is not None
    return [
        SLIDING if has_window and not _has_rope(fields, layer) else FULL
        for layer in range(fields["num_hidden_layers"])
    ]


def _smollm3_layer(shape: AttentionShape, layer: NamedLayer) -> AttentionShape:
    return shape if _has_rope(layer.fields, layer.number) else replace(shape, rope=None)


def _two_ropes(shape: AttentionShape, layer: NamedLayer) -> AttentionShape:
    return replace(shape, rope=SLIDING_ROPE) if layer.kind == SLIDING else shape


def _rope_if_sliding(shape: AttentionShape, layer: NamedLayer) -> AttentionShape:
    return shape if layer.kind == SLIDING else replace(shape, rope=None)


def _exaone4_layer(shape: AttentionShape, layer: NamedLayer) -> AttentionShape:
    has_rope = layer.kind == SLIDING or layer.fields["sliding_window"] is None
    return shape if has_rope else replace(shape, rope=None)


def _exaone4_kinds(source: LayerSource) -> Sequence[str]:
    if source.fields["sliding_window"] is None:
        raise UnsupportedModelError(
            "config field layer_types is missing, and sliding_window is null: the library fails on this",
            'add "layer_types": "full_attention" for each layer',
        )
    return every(4)(source)


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
    Family(model_type="llama", architecture="LlamaForCausalLM", arithmetic=_llama),
    Family(model_type="mistral", architecture="MistralForCausalLM", arithmetic=plain, layers=with_one_window),
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        arithmetic=lambda fields: plain(fields, qkv_bias=True),
        layers=by_kind(_qwen_kinds),
    ),
    Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        arithmetic=lambda fields: plain(fields, qk_norm="heads"),
        layers=by_kind(_qwen_kinds),
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
        arithmetic=_with_own_head_dim,
        layers=by_kind(_all_sliding, needs_window=True),
    ),
    Family(model_type="granite", architecture="GraniteForCausalLM", arithmetic=_granite),
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
        layers=by_kind(_smollm3_kinds, _smollm3_layer),
        rope=RopeRule(theta=2_000_000.0),
    ),
    Family(
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        arithmetic=_olmo,
        names=POST_NORMS,
    ),
    Family(
        model_type="olmo3",
        architecture="Olmo3ForCausalLM",
        arithmetic=_olmo,
        layers=by_kind(every(4, field=None), _two_ropes, needs_window=True),
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
        arithmetic=lambda fields: _gemma_2_or_3(fields, score_cap=_cap(fields, "attn_logit_softcapping")),
        layers=by_kind(every(2, field=None), needs_window=True),
        names=FOUR_NORMS,
    ),
    Family(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        arithmetic=lambda fields: _gemma_2_or_3(fields, qk_norm="heads"),
        layers=by_kind(every(6), _two_ropes, needs_window=True),
        rope=RopeRule(theta=1_000_000.0, sliding_theta=10_000.0, sliding_theta_field="rope_local_base_freq"),
        names=FOUR_NORMS,
    ),
    Family(
        model_type="gemma4_text",
        architecture="Gemma4ForCausalLM",
        arithmetic=_gemma4,
        layers=by_kind(every(6, field=None), _gemma4_layer, last=FULL),
        rope=_GEMMA4_ROPE,
        names=_GEMMA4_NAMES,
        own_fields=("per_layer_config",),
    ),
    Family(
        model_type="gemma4_unified_text",
        architecture="Gemma4UnifiedForCausalLM",
        arithmetic=_gemma4,
        layers=by_kind(every(6, field=None), _gemma4_layer, last=FULL),
        rope=_GEMMA4_ROPE,
        names=_GEMMA4_NAMES,
        own_fields=("per_layer_config",),
    ),
    Family(
        model_type="exaone4",
        architecture="Exaone4ForCausalLM",
        arithmetic=lambda fields: plain(fields, norms=OUTPUT_NORMS, qk_norm="heads"),
        layers=by_kind(_exaone4_kinds, _exaone4_layer),
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
        layers=by_kind(every(4), _rope_if_sliding, needs_window=True),
        eps_field="layer_norm_eps",
    ),
    Family(
        model_type="qwen3_5_text",
        architecture="Qwen3_5ForCausalLM",
        arithmetic=_qwen3_5,
        layers=by_kind(every(4, field="full_attention_interval", other=LINEAR), _qwen3_5_layer, other=LINEAR),
        rope=RopeRule(kinds=("default",), share=0.25),
        names=replace(PLAIN_NAMES, others=("mtp.",)),
    ),
    Family(
        model_type="hunyuan_v1_dense",
        architecture="HunYuanDenseV1ForCausalLM",
        arithmetic=lambda fields: _with_own_head_dim(fields, qk_norm="rotated_heads"),
        rope=RopeRule(has_alpha=True),
        names=replace(
            PLAIN_NAMES,
            renamed={
                "self_attn.q_norm.weight": "self_attn.query_layernorm.weight",
                "self_attn.k_norm.weight": "self_attn.key_layernorm.weight",
            },
        ),
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


def configured_model(config: Mapping[str, Any]) -> ConfiguredModel:
    """Read which family a config.json names, and its fields.

    Raises:
        UnsupportedModelError: no supported family, two that differ, or a field that is not supported, by its name.
    """
    row = _row_of(config)
    if isinstance(row, Family):
        for name in ("text_config", "vision_config"):
            if config.get(name):
                raise UnsupportedModelError(f"config field {name} is not supported")
        fields = read_fields(row.model_type, config, row.own_fields)
        return ConfiguredModel(
            row.architecture, row, row.names, config, fields, fields["tie_word_embeddings"]
        )
    text = config.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise UnsupportedModelError(f"config field text_config is {shown(text)}, not a table")
    if not text:
        raise UnsupportedModelError(f"a {row.model_type} has its text part in text_config, which is missing")
    text = {"model_type": row.texts[0]} | text
    if text["model_type"] not in row.texts:
        raise UnsupportedModelError(
            f"the text part of a {row.model_type} is {shown(text['model_type'])}, not {' or '.join(row.texts)}"
        )
    is_tied = config.get("tie_word_embeddings", row.is_tied)
    if not isinstance(is_tied, bool):
        raise UnsupportedModelError(
            f"config field tie_word_embeddings is {shown(is_tied)}, not true or false"
        )
    own = FAMILIES[text["model_type"]]
    family = replace(own, arithmetic=lambda fields: row.changes(own.arithmetic(fields)))
    names = replace(own.names, towers=row.names.towers, heads=row.names.heads, others=row.names.others)
    return ConfiguredModel(
        row.architecture, family, names, text, read_fields(own.model_type, text, own.own_fields), is_tied
    )


def unread_tensors(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Prefixes of the stored tensors that text does not need; none for a model that is not supported."""
    model_type = config.get("model_type")
    row = (FAMILIES.get(model_type) or WRAPPERS.get(model_type)) if isinstance(model_type, str) else None
    return () if row is None else row.names.others


def _row_of(config: Mapping[str, Any]) -> Family | Wrapper:
    """The row that config.json names by `model_type`, which must agree with `architectures`."""
    model_type, named = config.get("model_type"), config.get("architectures") or []
    architectures = [printable(str(name))[:80] for name in (named if isinstance(named, list) else [named])]
    row = (FAMILIES.get(model_type) or WRAPPERS.get(model_type)) if isinstance(model_type, str) else None
    if row is not None and all(name == row.architecture for name in architectures):
        return row
    shown_names = ", ".join(architectures)
    if row is not None and set(architectures) & set(SUPPORTED_ARCHITECTURES):
        raise UnsupportedModelError(
            f"config.json names two families: model_type {row.model_type} and architectures {shown_names}",
            f'if the weights are those of a {row.model_type}, set "architectures": ["{row.architecture}"]',
        )
    if model_type is None and set(architectures) <= set(SUPPORTED_ARCHITECTURES):
        types = ", ".join((*FAMILIES, *WRAPPERS))
        raise UnsupportedModelError("config.json names no model_type", f'add "model_type": one of {types}')
    kind = "mixture-of-experts model " if any("expert" in key for key in config) else ""
    what = shown_names or f"model_type {printable(str(model_type))[:80]}"
    raise UnsupportedModelError(
        f"{kind}{what} is not supported" + (f" under model_type {row.model_type}" if row else ""),
        "supported are dense models: " + ", ".join(SUPPORTED_ARCHITECTURES),
    )
