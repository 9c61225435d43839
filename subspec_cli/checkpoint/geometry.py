"""What a model is made of, read from its `config.json` alone: no weights, no torch.

The supported families share one layer: RMSNorm, grouped-query attention with rotary positions, RMSNorm,
SiLU-gated feed-forward. Their differences (biases, norms on queries and keys, sliding windows) are fields here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from subspec_cli.checkpoint.config_fields import Family, family_of, read_fields, shown
from subspec_cli.checkpoint.dtypes import DTYPES
from subspec_cli.checkpoint.layer_tensors import LAYER_BLOCKS, LAYER_MATRICES
from subspec_cli.errors import UnsupportedModelError

LAYER_KINDS: Final = ("sliding_attention", "full_attention")


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """Sizes of a supported dense decoder."""

    architecture: str
    dtype: str
    """Dtype of the matrices as safetensors writes it: BF16, F16 or F32. Everything is computed in it."""
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


def geometry_from_config(config: Mapping[str, Any], dtype: str) -> ModelGeometry:
    """Geometry from a parsed `config.json`; `dtype` is that of the matrices.

    Raises:
        UnsupportedModelError: another family, or a field that is not supported, by its name.
    """
    family = family_of(config)
    fields = read_fields(family, config)
    if (act := fields["hidden_act"]) not in ("silu", "swish"):
        raise UnsupportedModelError(f"hidden_act {shown(act)} is not supported, only silu")
    heads, layers = _count(fields, "num_attention_heads"), _count(fields, "num_hidden_layers", most=10_000)
    hidden, vocab = _count(fields, "hidden_size"), _count(fields, "vocab_size")
    kv_heads = heads if fields["num_key_value_heads"] is None else _count(fields, "num_key_value_heads")
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    if family.model_type == "llama" and hidden % heads:
        raise UnsupportedModelError(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    eps, pad = fields["rms_norm_eps"], fields["pad_token_id"]
    if not 0 <= eps < math.inf:
        raise UnsupportedModelError(f"config field rms_norm_eps is {shown(eps)}, not a small positive number")
    if pad is not None and not -vocab <= pad < vocab:
        raise UnsupportedModelError(f"config field pad_token_id is {pad}, the vocabulary has {vocab} tokens")
    bias = bool(fields.get("attention_bias", False))
    return ModelGeometry(
        architecture=family.architecture,
        dtype=dtype,
        layers=layers,
        hidden=hidden,
        feed_forward=_count(fields, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(config, fields),
        vocab=vocab,
        max_positions=_count(fields, "max_position_embeddings"),
        rms_norm_eps=eps,
        tied_head=fields["tie_word_embeddings"],
        qkv_bias=family.model_type == "qwen2" or bias,
        output_bias=bias,
        mlp_bias=bool(fields.get("mlp_bias", False)),
        qk_norm=family.model_type == "qwen3",
        windows=_windows(family, config, fields),
    )


def _count(fields: Mapping[str, Any], key: str, *, least: int = 1, most: int = 1 << 28) -> int:
    value: int = fields[key]
    if type(value) is not int or not least <= value <= most:
        raise UnsupportedModelError(
            f"config field {key} is {shown(value)}, not a count from {least} to {most}"
        )
    return value


def _head_dim(config: Mapping[str, Any], fields: Mapping[str, Any]) -> int:
    # Qwen2's code in the library reads a head_dim that its configuration class does not have.
    if "head_dim" not in fields and config.get("head_dim", 0) is None:
        raise UnsupportedModelError("config field head_dim is null", "remove the field")
    given = {"head_dim": fields.get("head_dim", config.get("head_dim"))}
    derived = fields["hidden_size"] // fields["num_attention_heads"]
    size = derived if given["head_dim"] is None else _count(given, "head_dim", most=1 << 14)
    if size < 2 or size % 2:
        raise UnsupportedModelError(f"heads of size {size} are not supported: rotary positions turn pairs")
    return size


def _windows(family: Family, config: Mapping[str, Any], fields: Mapping[str, Any]) -> tuple[int | None, ...]:
    layers: int = fields["num_hidden_layers"]
    if "sliding_window" not in fields:
        if config.get("sliding_window") is not None:
            raise UnsupportedModelError(
                f"a {family.model_type} has no sliding_window, config.json sets {shown(config['sliding_window'])}",
                'remove the field, or name the family that has it, such as "model_type": "mistral"',
            )
        _check_kinds(config.get("layer_types"), layers, ("full_attention",))
        return (None,) * layers
    window = None
    if fields.get("use_sliding_window", True) and fields["sliding_window"] is not None:
        window = _count(fields, "sliding_window")
    possible = LAYER_KINDS if window is not None else ("full_attention",)
    if "layer_types" not in fields:
        # All layers of such a family have the same window.
        _check_kinds(config.get("layer_types"), layers, possible[:1])
        return (window,) * layers
    if (kinds := fields["layer_types"]) is not None:
        _check_kinds(kinds, layers, possible)
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = fields["max_window_layers"]
    return tuple(window if layer >= first else None for layer in range(layers))


def _check_kinds(kinds: object, layers: int, possible: tuple[str, ...]) -> None:
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in possible for kind in kinds):
        raise UnsupportedModelError(
            f"config field layer_types is {shown(kinds)}, not {layers} times {' or '.join(possible)}"
        )
