"""What a decoder layer computes, as data: the target's and the draft's arithmetic read this, and no family's name.

`families` makes it from a configuration. Roundings are those of the library: a value is rounded to the model's type
where its description says so, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

NormKind = Literal["rounded_then_scaled", "scaled", "scaled_from_one", "powered", "layer", "fused_layer"]
"""How a norm rounds and scales; all statistics are float32.

rounded_then_scaled: normalized, rounded, times the weight, rounded again. scaled: times the weight in float32,
rounded once. scaled_from_one: as scaled, by 1 + weight. powered: as scaled, by the power -1/2 in place of the inverse
root. layer: as scaled, after the mean is subtracted (LayerNorm), with a bias if the layer has one. fused_layer: the
same by the kernel of `torch.nn.LayerNorm`, whose last bits differ.
"""
NormPlace = Literal["attention_input", "attention_output", "mlp_input", "mlp_output"]
QKNorm = Literal["heads", "own_heads", "projection", "rotated_heads"]
"""Norms of queries and keys: of each head before rotary positions (own_heads: with a weight of its own), of the whole
projection before them, or of each head after them."""
Activation = Literal["silu", "gelu_tanh"]
RotationRounding = Literal["each_step", "once", "once_from_rounded"]
"""each_step: tables, both products and their sum are rounded. once: all in float32. once_from_rounded: tables are
rounded, the rest is in float32."""

INPUT_NORMS: Final[tuple[NormPlace, ...]] = ("attention_input", "mlp_input")
OUTPUT_NORMS: Final[tuple[NormPlace, ...]] = ("attention_output", "mlp_output")
ALL_NORMS: Final[tuple[NormPlace, ...]] = (*INPUT_NORMS, *OUTPUT_NORMS)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The attention of one layer."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    """Sliding window in positions; None attends to all positions."""
    rope: int | None = 0
    """Number of the model's rotary table; None: no rotary positions."""
    value_is_key: bool = False
    """Whether the value is the raw key projection, so that the layer has no matrix for values."""
    is_gated: bool = False
    """Whether the query projection has, behind each head, a gate of the head's output."""

    @property
    def group(self) -> int:
        """Query heads per key and value head."""
        return self.heads // self.kv_heads

    @property
    def query_width(self) -> int:
        """Features of all queries."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Features of all keys."""
        return self.kv_heads * self.head_dim

    @property
    def query_rows(self) -> int:
        """Features that the query projection gives: queries, and gates if there are any."""
        return self.query_width * (2 if self.is_gated else 1)


@dataclass(frozen=True, slots=True)
class DeltaShape:
    """A gated delta network: a layer with a recurrent state in place of attention (arXiv 2412.06464)."""

    key_heads: int
    value_heads: int
    """A multiple of the key heads; consecutive ones share a key head."""
    key_dim: int
    value_dim: int
    kernel: int
    """Tokens that the convolution sees, the newest one included."""

    @property
    def conv_width(self) -> int:
        """Features of queries, keys and values together, which go through the convolution."""
        return 2 * self.key_heads * self.key_dim + self.value_width

    @property
    def value_width(self) -> int:
        """Features of all values."""
        return self.value_heads * self.value_dim

    @property
    def state_elements(self) -> int:
        """Elements of the recurrent state."""
        return self.value_heads * self.key_dim * self.value_dim


Mixer = AttentionShape | DeltaShape
"""What mixes the tokens in one layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """What all layers of a model, its embedding and its head have in common."""

    attention_scale: float
    """Factor of the scores."""
    eps: float
    """Added to the variance in norms."""
    norm: NormKind = "rounded_then_scaled"
    norms: tuple[NormPlace, ...] = INPUT_NORMS
    is_parallel: bool = False
    """Whether the feed-forward has the input of attention; its output is added after that of attention."""
    qk_norm: QKNorm | None = None
    normalizes_values: bool = False
    """Whether each value head is normalized, without a weight."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    activation: Activation = "silu"
    is_interleaved: bool = False
    """Whether rotary positions turn the pair (2i, 2i + 1) in place of (i, i + d/2)."""
    rotation_rounding: RotationRounding = "each_step"
    score_cap: float | None = None
    """Scores become cap * tanh(score / cap)."""
    embedding_factor: float = 1.0
    rounds_embedding_factor: bool = False
    """Whether the factor is rounded to the model's type first."""
    residual_factor: float = 1.0
    """Factor of what attention and feed-forward add to the hidden states."""
    has_layer_factor: bool = False
    """Whether each layer has a tensor of one element, a factor of its output."""
    logits_factor: float = 1.0
    logits_divisor: float = 1.0
    logits_cap: float | None = None
