"""What a model is made of, read from its `config.json` alone: no weights, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from subspec_cli.checkpoint.config_fields import count, shown
from subspec_cli.checkpoint.configured_model import ConfiguredModel, configured_model
from subspec_cli.checkpoint.dtypes import DTYPES
from subspec_cli.checkpoint.layer_description import Arithmetic, AttentionShape, DeltaShape, Mixer
from subspec_cli.checkpoint.layer_kinds import LayerSource
from subspec_cli.checkpoint.layer_tensors import (
    DELTA_A,
    DELTA_B,
    DELTA_CONV,
    DELTA_DECAY,
    DELTA_NORM,
    DELTA_STEP,
    KEY_NORM,
    LAYER_BLOCKS,
    LAYER_FACTOR,
    LAYER_MATRICES,
    QUERY_NORM,
    head_norm_names,
    layer_prefix,
    matrices_of,
    norm_name,
)
from subspec_cli.errors import UnsupportedModelError

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
FINAL_NORM_BIAS = "model.norm.bias"
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """Sizes of matrices in files where some are in 8 bits, with their scales."""

    layers: tuple[int, ...]
    """Of each layer."""
    block: int
    """Of the largest block."""


@dataclass(frozen=True)
class ModelGeometry:
    """Sizes of a supported dense decoder, and what its layers compute."""

    architecture: str
    dtype: str
    """Dtype of the matrices as safetensors writes it: BF16, F16 or F32. Everything is computed in it."""
    hidden: int
    feed_forward: int
    vocab: int
    max_positions: int
    tied_head: bool
    mixers: tuple[Mixer, ...]
    """Attention, or what is in its place, of each layer."""
    arithmetic: Arithmetic
    stored: StoredBytes | None = None
    """Sizes of the matrices in files; None if they are stored in `dtype`."""

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.mixers)

    @cached_property
    def attention(self) -> tuple[AttentionShape, ...]:
        """The attention of the layers that have it."""
        return tuple(mixer for mixer in self.mixers if isinstance(mixer, AttentionShape))

    @cached_property
    def delta(self) -> tuple[DeltaShape, ...]:
        """The delta networks of the layers that have one; all of one shape."""
        return tuple(mixer for mixer in self.mixers if isinstance(mixer, DeltaShape))

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight."""
        return DTYPES[self.dtype].size_bytes

    @cached_property
    def distinct_attention(self) -> Mapping[AttentionShape, int]:
        """The different attentions over the cache, without rotary positions, and the first layer of each."""
        found: dict[AttentionShape, int] = {}
        for layer, mixer in enumerate(self.mixers):
            if isinstance(mixer, AttentionShape):
                found.setdefault(replace(mixer, rope=None, value_is_key=False, is_gated=False), layer)
        return found

    @cached_property
    def kv_row_bytes(self) -> int:
        """Bytes of one token in the KV cache: keys and values of all layers."""
        return sum(2 * shape.key_width for shape in self.attention) * self.element_bytes

    @cached_property
    def mask_keys(self) -> tuple[tuple[int | None, int], ...]:
        """Window, and query heads per kv head, of the layers that have the same masks."""
        return tuple(dict.fromkeys((shape.window, shape.group) for shape in self.attention))

    @property
    def rope_tables(self) -> int:
        """Number of rotary tables that layers use."""
        return len({shape.rope for shape in self.attention} - {None})

    @property
    def table_bytes(self) -> int:
        """Bytes of one vocabulary table: the embedding or the head."""
        return self.vocab * self.hidden * self.element_bytes

    @cached_property
    def block_bytes(self) -> dict[str, int]:
        """Most matrix bytes of each block of a layer."""
        found = [self._block_bytes(self.layer_shapes(layer)) for layer in self.representatives]
        return {block: max(blocks[block] for blocks in found) for block in LAYER_BLOCKS}

    @cached_property
    def largest_layer(self) -> int:
        """A layer whose matrices take the most bytes."""
        return max(self.representatives, key=lambda layer: self.layer_bytes[layer])

    @cached_property
    def layer_bytes(self) -> tuple[int, ...]:
        """Bytes of the matrices of each layer."""
        sizes = {
            self.mixers[layer]: sum(self._block_bytes(self.layer_shapes(layer)).values())
            for layer in self.representatives
        }
        return tuple(sizes[mixer] for mixer in self.mixers)

    @property
    def link_layer_bytes(self) -> tuple[int, ...]:
        """Bytes of the matrices of each layer as they are stored and streamed."""
        return self.layer_bytes if self.stored is None else self.stored.layers

    @property
    def link_block_bytes(self) -> int:
        """Bytes of the largest block as it is stored and streamed."""
        return max(self.block_bytes.values()) if self.stored is None else self.stored.block

    @property
    def matrix_bytes(self) -> int:
        """Bytes of the matrices of all layers."""
        return sum(self.layer_bytes)

    @property
    def layer_matrix_bytes(self) -> int:
        """Bytes of the matrices of the largest layer, which are streamed or resident."""
        return max(self.layer_bytes)

    @cached_property
    def small_bytes(self) -> int:
        """Bytes of all norms and biases, which are always resident."""
        return (
            sum(self._small_bytes(self.layer_shapes(layer)) for layer in range(self.layers))
            + sum(
                math.prod(shape)
                for name, shape in self.outer_shapes().items()
                if name not in (EMBEDDING, HEAD)
            )
            * self.element_bytes
        )

    @cached_property
    def model_bytes(self) -> int:
        """Bytes of all weights."""
        tables = self.table_bytes * (1 if self.tied_head else 2)
        return tables + self.matrix_bytes + self.small_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes of all weights as they are stored."""
        return self.model_bytes - self.matrix_bytes + sum(self.link_layer_bytes)

    @cached_property
    def representatives(self) -> tuple[int, ...]:
        """The first layer of each kind: layers of one kind have the same tensors and compute the same."""
        return tuple(self.mixers.index(mixer) for mixer in dict.fromkeys(self.mixers))

    def layer_shapes(self, layer: int = 0) -> dict[str, tuple[int, ...]]:
        """Tensor shapes of one layer, keyed by the name inside the layer."""
        mixer, arithmetic = self.mixers[layer], self.arithmetic
        shapes = self._delta_shapes(mixer) if isinstance(mixer, DeltaShape) else self._attention_shapes(mixer)
        shapes |= {
            "mlp.gate_proj.weight": (self.feed_forward, self.hidden),
            "mlp.up_proj.weight": (self.feed_forward, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.feed_forward),
        }
        biased = {
            "self_attn.q_proj": arithmetic.qkv_bias,
            "self_attn.k_proj": arithmetic.qkv_bias,
            "self_attn.v_proj": arithmetic.qkv_bias,
            "self_attn.o_proj": arithmetic.output_bias,
            "mlp.gate_proj": arithmetic.mlp_bias,
            "mlp.up_proj": arithmetic.mlp_bias,
            "mlp.down_proj": arithmetic.mlp_bias,
        }
        for name, has_bias in biased.items():
            if has_bias and f"{name}.weight" in shapes:
                shapes[f"{name}.bias"] = shapes[f"{name}.weight"][:1]
        shapes |= {norm_name(place): (self.hidden,) for place in arithmetic.norms}
        if arithmetic.norm_bias:
            shapes |= {norm_name(p).replace("weight", "bias"): (self.hidden,) for p in arithmetic.norms}
        if arithmetic.has_layer_factor:
            shapes[LAYER_FACTOR] = (1,)
        return shapes

    def _attention_shapes(self, attention: AttentionShape) -> dict[str, tuple[int, ...]]:
        q_width, kv_width = attention.query_width, attention.key_width
        shapes: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (attention.query_rows, self.hidden),
            "self_attn.k_proj.weight": (kv_width, self.hidden),
            "self_attn.v_proj.weight": (kv_width, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, q_width),
        }
        if attention.value_is_key:
            del shapes["self_attn.v_proj.weight"]
        if self.arithmetic.qk_norm == "projection":
            shapes |= {QUERY_NORM: (q_width,), KEY_NORM: (kv_width,)}
        elif self.arithmetic.qk_norm == "own_heads":
            names = head_norm_names(QUERY_NORM, attention.heads)
            names += head_norm_names(KEY_NORM, attention.kv_heads)
            shapes |= dict.fromkeys(names, (attention.head_dim,))
        elif self.arithmetic.qk_norm is not None:
            shapes |= {QUERY_NORM: (attention.head_dim,), KEY_NORM: (attention.head_dim,)}
        return shapes

    def _delta_shapes(self, delta: DeltaShape) -> dict[str, tuple[int, ...]]:
        return {
            "linear_attn.in_proj_qkv.weight": (delta.conv_width, self.hidden),
            "linear_attn.in_proj_z.weight": (delta.value_width, self.hidden),
            "linear_attn.out_proj.weight": (self.hidden, delta.value_width),
            DELTA_A: (delta.value_heads, self.hidden),
            DELTA_B: (delta.value_heads, self.hidden),
            DELTA_CONV: (delta.conv_width, 1, delta.kernel),
            DELTA_DECAY: (delta.value_heads,),
            DELTA_STEP: (delta.value_heads,),
            DELTA_NORM: (delta.value_dim,),
        }

    def layer_matrices(self, layer: int = 0) -> tuple[str, ...]:
        """The matrices of a layer, in order of use."""
        return matrices_of(self.layer_shapes(layer))

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors that the model needs."""
        shapes = self.outer_shapes()
        for layer in range(self.layers):
            shapes |= {layer_prefix(layer) + name: shape for name, shape in self.layer_shapes(layer).items()}
        return shapes

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors outside of layers."""
        shapes: dict[str, tuple[int, ...]] = {
            EMBEDDING: (self.vocab, self.hidden),
            FINAL_NORM: (self.hidden,),
        }
        if self.arithmetic.norm_bias:
            shapes[FINAL_NORM_BIAS] = (self.hidden,)
        if not self.tied_head:
            shapes[HEAD] = (self.vocab, self.hidden)
        return shapes

    def _block_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        return {
            block: sum(math.prod(shapes[name]) for name in names if name in shapes) * self.element_bytes
            for block, names in LAYER_BLOCKS.items()
        }

    def _small_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return sum(math.prod(s) for n, s in shapes.items() if n not in LAYER_MATRICES) * self.element_bytes


def geometry_from_config(config: Mapping[str, Any], dtype: str) -> ModelGeometry:
    """Geometry from a parsed `config.json`; `dtype` is that of the matrices.

    Raises:
        UnsupportedModelError: another family, or a field that is not supported, by its name.
    """
    return geometry_of(configured_model(config), dtype)


def geometry_of(model: ConfiguredModel, dtype: str) -> ModelGeometry:
    """Geometry of a model whose family and fields are read. Raises UnsupportedModelError."""
    fields, family = model.fields, model.family
    vocab, pad = count(fields, "vocab_size"), fields["pad_token_id"]
    if pad is not None and not -vocab <= pad < vocab:
        raise UnsupportedModelError(f"config field pad_token_id is {pad}, the vocabulary has {vocab} tokens")
    hidden = count(fields, "hidden_size")
    mixers = family.layers(LayerSource(family.model_type, model.config, fields))
    arithmetic = family.arithmetic(fields)
    if not 0 <= arithmetic.eps < math.inf:
        raise UnsupportedModelError(
            f"config field {family.eps_field} is {shown(arithmetic.eps)}, not a small positive number"
        )
    return ModelGeometry(
        architecture=model.architecture,
        dtype=dtype,
        hidden=hidden,
        feed_forward=count(fields, "intermediate_size"),
        vocab=vocab,
        max_positions=count(fields, "max_position_embeddings"),
        tied_head=model.is_tied,
        mixers=mixers,
        arithmetic=arithmetic,
    )
