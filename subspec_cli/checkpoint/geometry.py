"""What a model is made of, read from its `config.json` and tensor table alone: no weights, no torch.

The supported families share one layer: RMSNorm, grouped-query attention with rotary positions, RMSNorm,
SiLU-gated feed-forward. Their differences (biases, norms on queries and keys, sliding windows) are fields here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from subspec_cli.checkpoint.dtypes import DTYPES, WEIGHT_DTYPES
from subspec_cli.checkpoint.layer_tensors import LAYER_BLOCKS, LAYER_MATRICES
from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.errors import IntegrityError, UnsupportedModelError
from subspec_cli.units import printable

SUPPORTED_ARCHITECTURES: Final = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
_ROPE_TYPES: Final = ("default", "linear", "yarn", "longrope", "llama3")
_LIBRARY_WINDOW: Final = 4096
"""Sliding window, in positions, that the library assumes if config.json names none."""


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """Sizes of a supported dense decoder."""

    architecture: str
    dtype: str
    """Checkpoint dtype as safetensors writes it: BF16, F16 or F32."""
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    rms_norm_eps: float
    tied_head: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    """Sliding window in positions per layer; None: the layer attends to all positions."""

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight."""
        return DTYPES[self.dtype].size_bytes

    @property
    def kv_row_bytes(self) -> int:
        """Bytes of one token in the KV cache: keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.element_bytes

    @property
    def table_bytes(self) -> int:
        """Bytes of one vocabulary table: the embedding or the head."""
        return self.vocab * self.hidden * self.element_bytes

    @property
    def block_bytes(self) -> dict[str, int]:
        """Matrix bytes of each block of one layer."""
        shapes = self.layer_shapes()
        return {
            block: sum(math.prod(shapes[name]) for name in names) * self.element_bytes
            for block, names in LAYER_BLOCKS.items()
        }

    @property
    def layer_matrix_bytes(self) -> int:
        """Bytes of the matrices of one layer, which are streamed or resident."""
        return sum(self.block_bytes.values())

    @property
    def layer_small_bytes(self) -> int:
        """Bytes of the norms and biases of one layer, which are always resident."""
        shapes = self.layer_shapes()
        return sum(math.prod(s) for n, s in shapes.items() if n not in LAYER_MATRICES) * self.element_bytes

    @property
    def model_bytes(self) -> int:
        """Bytes of all weights."""
        tables = self.table_bytes * (1 if self.tied_head else 2)
        layer = self.layer_matrix_bytes + self.layer_small_bytes
        return tables + self.layers * layer + self.hidden * self.element_bytes

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor shapes of one layer, keyed by the name inside the layer."""
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (self.hidden,),
            "self_attn.q_proj.weight": (q_width, self.hidden),
            "self_attn.k_proj.weight": (kv_width, self.hidden),
            "self_attn.v_proj.weight": (kv_width, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, q_width),
            "post_attention_layernorm.weight": (self.hidden,),
            "mlp.gate_proj.weight": (self.feed_forward, self.hidden),
            "mlp.up_proj.weight": (self.feed_forward, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.feed_forward),
        }
        if self.qkv_bias:
            shapes["self_attn.q_proj.bias"] = (q_width,)
            shapes["self_attn.k_proj.bias"] = shapes["self_attn.v_proj.bias"] = (kv_width,)
        if self.output_bias:
            shapes["self_attn.o_proj.bias"] = (self.hidden,)
        if self.mlp_bias:
            shapes["mlp.gate_proj.bias"] = shapes["mlp.up_proj.bias"] = (self.feed_forward,)
            shapes["mlp.down_proj.bias"] = (self.hidden,)
        if self.qk_norm:
            shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (self.head_dim,)
        return shapes

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors that the checkpoint must hold."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        if not self.tied_head:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        for layer in range(self.layers):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in self.layer_shapes().items()}
        return shapes


def read_geometry(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> ModelGeometry:
    """Geometry of a checkpoint, checked against its tensor table.

    Raises:
        UnsupportedModelError: another architecture, or a setting that is not supported.
        IntegrityError: tensors that are missing, unexpected or of another shape.
    """
    geometry = geometry_from_config(config, _checkpoint_dtype(tensors))
    if "lm_head.weight" in tensors:
        # The library ties only equal tables, so running the stored head is right in both cases.
        geometry = replace(geometry, tied_head=False)
    _check_tensors(geometry, tensors)
    return geometry


def geometry_from_config(config: Mapping[str, Any], dtype: str) -> ModelGeometry:
    """Geometry from a parsed `config.json`. Raises UnsupportedModelError with the field that is not supported."""
    architecture = _architecture(config)
    _refuse_unsupported_settings(config)
    hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    layers = _count(config, "num_hidden_layers", most=10_000)
    kv_heads = _count(config, "num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    bias = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") and bool(
        config.get("attention_bias", False)
    )
    return ModelGeometry(
        architecture=architecture,
        dtype=dtype,
        layers=layers,
        hidden=hidden,
        feed_forward=_count(config, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_count(config, "head_dim", default=hidden // heads),
        vocab=_count(config, "vocab_size"),
        max_positions=_count(config, "max_position_embeddings"),
        rms_norm_eps=_number(config, "rms_norm_eps", default=1e-6),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=architecture == "Qwen2ForCausalLM" or bias,
        output_bias=bias,
        mlp_bias=architecture == "LlamaForCausalLM" and bool(config.get("mlp_bias", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        windows=_windows(architecture, config, layers),
    )


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures") or ["(none named)"]
    architecture = printable(str(named[0] if isinstance(named, list) else named))
    if architecture not in SUPPORTED_ARCHITECTURES:
        kind = "mixture-of-experts model " if any("expert" in key for key in config) else ""
        raise UnsupportedModelError(
            f"{kind}{architecture} is not supported",
            "supported are dense models: " + ", ".join(SUPPORTED_ARCHITECTURES),
        )
    return architecture


def _refuse_unsupported_settings(config: Mapping[str, Any]) -> None:
    if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise UnsupportedModelError(f"hidden_act {printable(str(act))} is not supported, only silu")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UnsupportedModelError(
            f"rope_parameters or rope_scaling is no table: {printable(str(rope))[:80]}"
        )
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in _ROPE_TYPES:
        # `dynamic` depends on the longest position in a call. An unknown type must not run as another one.
        raise UnsupportedModelError(
            f"rotary positions of type {printable(str(rope_type))[:80]} are not run",
            "supported types: " + ", ".join(_ROPE_TYPES),
        )
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (1.0, None):
        raise UnsupportedModelError("partial_rotary_factor other than 1 is not supported")
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "attention_sinks", "num_local_experts"):
        if config.get(key):
            raise UnsupportedModelError(f"config field {key} is not supported")


def _count(
    config: Mapping[str, Any], key: str, *, default: int | None = None, least: int = 1, most: int = 1 << 28
) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UnsupportedModelError(
            f"config field {key} is {printable(str(value))[:80]}, not a count from {least} to {most}"
        )
    return value


def _number(config: Mapping[str, Any], key: str, *, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UnsupportedModelError(f"config field {key} is {printable(str(value))[:80]}, not a number")
    return float(value)


def _windows(architecture: str, config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    everywhere = architecture == "MistralForCausalLM"
    if architecture == "LlamaForCausalLM" or not (everywhere or config.get("use_sliding_window", False)):
        return (None,) * layers
    if config.get("sliding_window", _LIBRARY_WINDOW) is None:
        return (None,) * layers
    window = _count(config, "sliding_window", default=_LIBRARY_WINDOW)
    if everywhere:
        return (window,) * layers
    if kinds := config.get("layer_types"):
        known = isinstance(kinds, list) and all(
            kind in ("sliding_attention", "full_attention") for kind in kinds
        )
        if not known or len(kinds) != layers:
            raise UnsupportedModelError(
                "config field layer_types does not name one known kind for each layer"
            )
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = _count(config, "max_window_layers", default=28, least=0)
    return tuple(window if layer >= first else None for layer in range(layers))


def _checkpoint_dtype(tensors: Mapping[str, TensorEntry]) -> str:
    dtypes = sorted({entry.dtype for name, entry in tensors.items() if name.endswith("proj.weight")})
    if len(dtypes) != 1 or dtypes[0] not in WEIGHT_DTYPES:
        raise UnsupportedModelError(
            f"weights of type {', '.join(dtypes) or '(none)'} are not supported",
            "the checkpoint must be in one of BF16, F16, F32",
        )
    return dtypes[0]


def _check_tensors(geometry: ModelGeometry, tensors: Mapping[str, TensorEntry]) -> None:
    expected = geometry.tensor_shapes()
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise IntegrityError(f"{len(missing)} tensors are missing: {_some(missing)}")
    unexpected = sorted(
        name for name in tensors.keys() - expected.keys() if "rotary_emb.inv_freq" not in name
    )
    if unexpected:
        raise IntegrityError(f"{len(unexpected)} tensors are not expected: {_some(unexpected)}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise IntegrityError(
                f"tensor {printable(name)} has shape {list(tensors[name].shape)}, expected {list(shape)}"
            )
        if tensors[name].dtype != geometry.dtype:
            raise IntegrityError(
                f"tensor {printable(name)} is {tensors[name].dtype} in a {geometry.dtype} model"
            )


def _some(names: list[str]) -> str:
    return ", ".join(printable(name) for name in names[:4]) + (", …" if len(names) > 4 else "")
