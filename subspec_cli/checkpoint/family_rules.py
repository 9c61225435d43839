"""The rules of families: what a layer computes and which kinds of layers there are, by the fields.

Each rule refuses, by name, the values that would change what is computed and are not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

from subspec_cli.checkpoint.config_fields import count, number, shown
from subspec_cli.checkpoint.layer_description import (
    ALL_NORMS,
    INPUT_NORMS,
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
    SLIDING,
    SLIDING_ROPE,
    Fields,
    LayerSource,
    NamedLayer,
    every,
    head_size,
)
from subspec_cli.errors import UnsupportedModelError

_ACTIVATIONS: Final[Mapping[str, Activation]] = MappingProxyType(
    {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
)


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


def llama(fields: Fields, **changes: Any) -> Arithmetic:  # noqa: ANN401 - fields of `Arithmetic`
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    if heads > 0 and hidden % heads:
        raise UnsupportedModelError(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    return plain(fields, **changes)


def stablelm(fields: Fields) -> Arithmetic:
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    if (named := fields.get("head_dim", hidden // heads)) != hidden // heads:
        raise UnsupportedModelError(
            f"config field head_dim is {shown(named)}, heads have {hidden // heads} features",
            "remove the field",
        )
    is_parallel = fields["use_parallel_residual"]
    return llama(
        fields,
        norm="fused_layer",
        norms=INPUT_NORMS[:1] if is_parallel else INPUT_NORMS,
        norm_bias=True,
        is_parallel=is_parallel,
        eps=fields["layer_norm_eps"],
        qk_norm="own_heads" if fields["qk_layernorm"] else None,
        qkv_bias=fields["use_qkv_bias"],
    )


def granite(fields: Fields) -> Arithmetic:
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
                "logits_cap": cap(fields, "final_logit_softcapping"),
            }
            | changes
        ),
    )


def gemma_2_or_3(fields: Fields, **changes: Any) -> Arithmetic:  # noqa: ANN401 - fields of `Arithmetic`
    return _gemma(fields, attention_scale=number(fields, "query_pre_attn_scalar") ** -0.5, **changes)


def gemma4(fields: Fields) -> Arithmetic:
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


def gemma4_layer(shape: AttentionShape, layer: NamedLayer) -> AttentionShape:
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


def qwen3_5(fields: Fields) -> Arithmetic:
    if _activation(fields) != "silu":
        raise UnsupportedModelError(f"hidden_act {shown(fields['hidden_act'])} is not supported, only silu")
    return plain(fields, norm="scaled_from_one", qk_norm="heads")


def qwen3_5_layer(shape: AttentionShape, layer: NamedLayer) -> Mixer:
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


def cap(fields: Fields, name: str) -> float | None:
    return None if fields[name] is None else number(fields, name)


def olmo(fields: Fields) -> Arithmetic:
    return plain(fields, norm="scaled", norms=OUTPUT_NORMS, qk_norm="projection", rotation_rounding="once")


def qwen_kinds(source: LayerSource) -> list[str]:
    fields = source.fields
    layers, first = fields["num_hidden_layers"], fields["max_window_layers"]
    has_window = fields["use_sliding_window"] and fields["sliding_window"] is not None
    return [SLIDING if has_window and layer >= first else FULL for layer in range(layers)]


def with_own_head_dim(fields: Fields, **changes: Any) -> Arithmetic:  # noqa: ANN401 - fields of `Arithmetic`
    """As `plain`, where the library's code takes the size of heads from config.json alone."""
    if fields["head_dim"] is None:
        raise UnsupportedModelError(
            "config field head_dim is missing or null: the library fails on this",
            'add "head_dim": the rows of q_proj divided by num_attention_heads',
        )
    return plain(fields, **changes)


def all_sliding(source: LayerSource) -> list[str]:
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


def smollm3_kinds(source: LayerSource) -> list[str]:
    fields = source.fields
    has_window = fields["use_sliding_window"] and fields["sliding_window"] is not None
    return [
        SLIDING if has_window and not _has_rope(fields, layer) else FULL
        for layer in range(fields["num_hidden_layers"])
    ]


def smollm3_layer(shape: AttentionShape, layer: NamedLayer) -> AttentionShape:
    return shape if _has_rope(layer.fields, layer.number) else replace(shape, rope=None)


def two_ropes(shape: AttentionShape, layer: NamedLayer) -> AttentionShape:
    return replace(shape, rope=SLIDING_ROPE) if layer.kind == SLIDING else shape


def rope_if_sliding(shape: AttentionShape, layer: NamedLayer) -> AttentionShape:
    return shape if layer.kind == SLIDING else replace(shape, rope=None)


def exaone4_layer(shape: AttentionShape, layer: NamedLayer) -> AttentionShape:
    has_rope = layer.kind == SLIDING or layer.fields["sliding_window"] is None
    return shape if has_rope else replace(shape, rope=None)


def exaone4_kinds(source: LayerSource) -> Sequence[str]:
    if source.fields["sliding_window"] is None:
        raise UnsupportedModelError(
            "config field layer_types is missing, and sliding_window is null: the library fails on this",
            'add "layer_types": "full_attention" for each layer',
        )
    return every(4)(source)
