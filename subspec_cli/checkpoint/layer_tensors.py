"""The tensors of a decoder layer: their names, and the blocks in which they are streamed.

The names are this program's own; `tensor_names` finds them under the names that a checkpoint has. Matrices keep the
names that most checkpoints give them, and norms are named by their place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
        "linear_attn.in_proj_qkv.weight",
        "linear_attn.in_proj_z.weight",
        "linear_attn.out_proj.weight",
    ),
    "gate": ("mlp.gate_proj.weight",),
    "up": ("mlp.up_proj.weight",),
    "down": ("mlp.down_proj.weight",),
}
"""The units in which a layer is streamed, in order of use. Only matrices are; all other tensors are resident.

A layer need not have all of these matrices. The projections of a few rows in a delta layer count as small tensors.
"""
FEED_FORWARD: Final[tuple[BlockKind, ...]] = ("gate", "up", "down")
"""The blocks of a layer that follow its attention."""
LAYER_MATRICES: Final = tuple(name for names in LAYER_BLOCKS.values() for name in names)
QUERY_NORM: Final = "self_attn.q_norm.weight"
KEY_NORM: Final = "self_attn.k_norm.weight"
DELTA_NORM: Final = "linear_attn.norm.weight"
DELTA_CONV: Final = "linear_attn.conv1d.weight"
DELTA_DECAY: Final = "linear_attn.A_log"
DELTA_STEP: Final = "linear_attn.dt_bias"
DELTA_A: Final = "linear_attn.in_proj_a.weight"
DELTA_B: Final = "linear_attn.in_proj_b.weight"
LAYER_FACTOR: Final = "layer_factor"
LAYERS_PREFIX: Final = "model.layers."


def norm_name(place: str) -> str:
    """The name of the norm at a place of a layer."""
    return f"{place}_norm.weight"


def head_norm_names(norm: str, heads: int) -> tuple[str, ...]:
    """The names of the norms of queries or keys where each head has its own."""
    parts = norm.replace("_norm.weight", "_layernorm.norms")
    return tuple(f"{parts}.{head}.weight" for head in range(heads))


def scale_name(matrix: str) -> str:
    """The name of the scales of a matrix that is stored in 8 bits."""
    return f"{matrix}_scale"


def matrices_of(names: Iterable[str]) -> tuple[str, ...]:
    """The matrices among the tensors of a layer, in order of use."""
    held = set(names)
    return tuple(name for name in LAYER_MATRICES if name in held)


def block_entries(tensors: Mapping[str, TensorEntry], layer: int) -> list[list[TensorEntry]]:
    """The tensor entries of each block of a layer, in order of use, with the names inside the layer.

    The scales of a matrix in 8 bits are in its block.
    """
    prefix = layer_prefix(layer)
    return [
        [
            replace(tensors[prefix + stored], name=stored)
            for name in names
            for stored in (name, scale_name(name))
            if prefix + stored in tensors
        ]
        for names in LAYER_BLOCKS.values()
    ]


def layer_prefix(layer: int) -> str:
    """The prefix of the names of a decoder layer's tensors."""
    return f"{LAYERS_PREFIX}{layer}."


def spread(count: int, layers: int) -> tuple[int, ...]:
    """`count` layer numbers of `layers`, evenly spread, so that the link is busy while resident layers compute."""
    return tuple(sorted({(2 * i + 1) * layers // (2 * count) for i in range(count)})) if count else ()
