"""The names that a checkpoint has for the tensors of a model, and how they become this program's own.

A fused projection is read as its parts, which are consecutive rows of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from subspec_cli.checkpoint.eight_bit import WEIGHT_SCALES
from subspec_cli.checkpoint.layer_tensors import norm_name
from subspec_cli.checkpoint.safetensors_header import TensorEntry

_LAYER: Final = re.compile(r"(model\.layers\.\d+\.)(.+)")
_TOWER: Final = "model."
_HEAD: Final = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredNames:
    """How a family's checkpoints name their tensors."""

    towers: tuple[str, ...] = (_TOWER,)
    """Prefixes that the text model may have."""
    heads: tuple[str, ...] = (_HEAD,)
    others: tuple[str, ...] = ()
    """Prefixes of tensors that text does not need."""
    norms: Mapping[str, str] = field(
        default_factory=lambda: {
            "attention_input": "input_layernorm",
            "mlp_input": "post_attention_layernorm",
        }
    )
    """Stored name of the norm at each place."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Other tensors of a layer that have another name: own name to stored name."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Parts of each fused projection, in the order of its rows."""

    def is_other(self, name: str) -> bool:
        """Whether a tensor belongs to a part of the model that text does not need."""
        return name.startswith(self.others)

    def own_entries(
        self, stored: Mapping[str, TensorEntry], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, TensorEntry]:
        """The entries of the text model by this program's names; `shapes` are those that the model needs.

        Names that mean nothing here stay as they are.
        """
        own_of = {
            stored_name: own
            for own, stored_name in (
                *((norm_name(place), f"{name}.weight") for place, name in self.norms.items()),
                *((_bias(norm_name(place)), f"{name}.bias") for place, name in self.norms.items()),
                *self.renamed.items(),
            )
        }
        found: dict[str, TensorEntry] = {}
        for name, entry in stored.items():
            if self.is_other(name):
                continue
            own = self._without_prefix(name)
            if (match := _LAYER.fullmatch(own)) is None:
                found[own] = replace(entry, name=own)
                continue
            prefix, inside = match.groups()
            parts = list(self._parts(prefix, inside, entry, shapes))
            if not parts:
                own = prefix + own_of.get(inside, inside)
                parts = [replace(entry, name=own)]
            found |= {part.name: part for part in parts}
        return found

    def _without_prefix(self, name: str) -> str:
        if name in self.heads:
            return _HEAD
        tower = next((tower for tower in self.towers if name.startswith(tower)), None)
        return name if tower is None else _TOWER + name.removeprefix(tower)

    def _parts(
        self, prefix: str, inside: str, entry: TensorEntry, shapes: Mapping[str, tuple[int, ...]]
    ) -> Iterator[TensorEntry]:
        """Yield the parts of a fused projection; nothing if it is none, or does not have the parts' shape."""
        projection, _, what = inside.rpartition(".")
        owners = [f"{prefix}{part}" for part in self.fused.get(projection, ())]
        if owners and what in WEIGHT_SCALES:
            yield from _scale_parts(entry, what, {owner: shapes[f"{owner}.weight"][0] for owner in owners})
            return
        names = [f"{owner}.{what}" for owner in owners]
        if not names or any(name not in shapes for name in names):
            return
        wanted = [shapes[name] for name in names]
        if entry.shape != (sum(shape[0] for shape in wanted), *wanted[0][1:]):
            return
        yield from _row_parts(entry, dict(zip(names, wanted, strict=True)))


def _row_parts(entry: TensorEntry, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[TensorEntry]:
    """Yield the consecutive rows of a tensor as tensors of these names and shapes."""
    offset_bytes, element_bytes = entry.offset_bytes, entry.size_bytes // math.prod(entry.shape)
    for name, shape in shapes.items():
        size_bytes = math.prod(shape) * element_bytes
        yield TensorEntry(name, entry.dtype, shape, entry.path, offset_bytes, size_bytes)
        offset_bytes += size_bytes


def _scale_parts(entry: TensorEntry, what: str, rows_of: Mapping[str, int]) -> Iterator[TensorEntry]:
    """Yield the scales of a fused projection's parts, which have so many rows.

    One scale belongs to all parts. Nothing is yielded for units that cross the border of a part.
    """
    if math.prod(entry.shape) == 1:
        yield from (replace(entry, name=f"{owner}.{what}") for owner in rows_of)
        return
    units = entry.shape[0] if len(entry.shape) == 2 else 0
    unit_rows, rest = divmod(sum(rows_of.values()), units) if units else (0, 0)
    if unit_rows == 0 or rest or any(rows % unit_rows for rows in rows_of.values()):
        return
    yield from _row_parts(
        entry,
        {f"{owner}.{what}": (rows // unit_rows, *entry.shape[1:]) for owner, rows in rows_of.items()},
    )


def _bias(name: str) -> str:
    return name.removesuffix("weight") + "bias"


PLAIN_NAMES: Final = StoredNames()
POST_NORMS: Final = replace(
    PLAIN_NAMES,
    norms={"attention_output": "post_attention_layernorm", "mlp_output": "post_feedforward_layernorm"},
)
FOUR_NORMS: Final = replace(
    PLAIN_NAMES,
    norms={
        "attention_input": "input_layernorm",
        "attention_output": "post_attention_layernorm",
        "mlp_input": "pre_feedforward_layernorm",
        "mlp_output": "post_feedforward_layernorm",
    },
)
FUSED_QKV: Final[Mapping[str, tuple[str, ...]]] = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
}
FUSED_GATE_UP: Final[Mapping[str, tuple[str, ...]]] = {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}
