"""The tensors of a decoder layer: their names, and the blocks in which they are streamed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final, Literal

from subspec_cli.checkpoint.safetensors_header import TensorEntry

BlockKind = Literal["attention", "gate", "up", "down"]
LAYER_BLOCKS: Final[Mapping[BlockKind, tuple[str, ...]]] = {
    "attention": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
    ),
    "gate": ("mlp.gate_proj.weight",),
    "up": ("mlp.up_proj.weight",),
    "down": ("mlp.down_proj.weight",),
}
"""The units in which a layer is streamed, in order of use. Only matrices are; all other tensors are resident."""
FEED_FORWARD: Final[tuple[BlockKind, ...]] = ("gate", "up", "down")
"""The blocks of a layer that follow its attention."""
LAYER_MATRICES: Final = tuple(name for names in LAYER_BLOCKS.values() for name in names)


def block_entries(tensors: Mapping[str, TensorEntry], layer: int) -> list[list[TensorEntry]]:
    """The tensor entries of each block of a layer, in order of use, with the names inside the layer."""
    prefix = layer_prefix(layer)
    return [[replace(tensors[prefix + name], name=name) for name in names] for names in LAYER_BLOCKS.values()]


def layer_prefix(layer: int) -> str:
    """The prefix of the names of a decoder layer's tensors."""
    return f"model.layers.{layer}."


def spread(count: int, layers: int) -> tuple[int, ...]:
    """`count` layer numbers of `layers`, evenly spread, so that the link is busy while resident layers compute."""
    return tuple(sorted({(2 * i + 1) * layers // (2 * count) for i in range(count)})) if count else ()
