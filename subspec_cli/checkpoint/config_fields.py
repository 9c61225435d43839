"""The fields of config.json: their types, their defaults by family, and the fields that no family may set.

A field that is missing has the default of the family's configuration class in transformers. `family_fields.toml`
holds them, and a test compares it with those classes; they are not imported here, since `subspec plan` answers
without them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Final

import tomli

from subspec_cli.errors import UnsupportedModelError
from subspec_cli.units import printable

_JSON_TYPES: Final[Mapping[str, tuple[type, ...]]] = MappingProxyType(
    {
        "int": (int,),
        "float": (float,),
        "number": (int, float),
        "bool": (bool,),
        "text": (str,),
        "ids": (int,),
        "ints": (),
        "texts": (),
        "table": (dict,),
        "number_or_text": (int, str),
    }
)


_LISTED: Final[Mapping[str, type]] = MappingProxyType({"ids": int, "ints": int, "texts": str})
"""Kinds that are lists, or may be, and what is in them."""


_TYPE_NAMES: Final = ("bfloat16", "float16", "float32", "float64", "half", "float", "double")


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a configuration."""

    kind: str
    """A key of the JSON types; with `?`, null is a value too."""
    default: Any = None
    """Value of a missing field."""

    def takes(self, value: object) -> bool:
        """Whether a JSON value has this field's type. `true` is no number, and 1 is no float, as in the library."""
        if value is None:
            return self.kind.endswith("?")
        kind = self.kind.removesuffix("?")
        if isinstance(value, list):
            return kind in _LISTED and all(type(item) is _LISTED[kind] for item in value)
        return type(value) in _JSON_TYPES[kind]


def _read_table() -> Mapping[str, Mapping[str, Field]]:
    text = (files("subspec_cli.checkpoint") / "family_fields.toml").read_text("utf-8")
    read = {
        family: {name: Field(*entry) for name, entry in fields.items()}
        for family, fields in tomli.loads(text).items()
    }
    shared = read.pop("shared")
    return MappingProxyType({family: MappingProxyType(shared | fields) for family, fields in read.items()})


FAMILY_FIELDS: Final = _read_table()
"""Fields by model_type."""
COMMON_FIELDS: Final = frozenset(
    {
        "transformers_version",
        "architectures",
        "output_hidden_states",
        "return_dict",
        "dtype",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "id2label",
        "label2id",
        "problem_type",
    }
)
"""Fields that every family has and that do not change what a model computes, but for those in `REFUSED_FIELDS`."""
REFUSED_FIELDS: Final = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "num_kv_shared_layers",
    "use_bidirectional_attention",
    "attention_sinks",
    "attention_chunk_size",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "per_layer_config",
    "is_encoder_decoder",
)
"""Fields that would change what a model computes if they had a value. A family that has one reads it itself."""


def read_fields(model_type: str, config: Mapping[str, Any], own: Collection[str] = ()) -> dict[str, Any]:
    """The values of a family's fields, with the defaults of those that are missing.

    `own` are fields that the family reads itself and that others may not set.

    Raises:
        UnsupportedModelError: a field of another type, or one that no supported family has.
    """
    fields = FAMILY_FIELDS[model_type]
    for name, field in fields.items():
        if name in config and not field.takes(config[name]):
            raise UnsupportedModelError(
                f"config field {name} is {shown(config[name])}, not {_described(field)}",
                "correct config.json, or take the model from its source again",
            )
    # The weights say what type they are of; the library only needs the name to be one that it knows.
    name = next((name for name in ("dtype", "torch_dtype") if config.get(name) is not None), "dtype")
    if config.get(name) not in (None, *_TYPE_NAMES):
        raise UnsupportedModelError(
            f"config field {name} is {shown(config[name])}, not the name of a type",
            f"correct config.json: one of {', '.join(_TYPE_NAMES)}",
        )
    for name in REFUSED_FIELDS:
        if config.get(name) and name not in fields and name not in own:
            raise UnsupportedModelError(f"config field {name} is not supported")
    # Some families' code in the library reads a head_dim that their configuration class does not have.
    if "head_dim" not in fields and config.get("head_dim", 0) is None:
        raise UnsupportedModelError("config field head_dim is null", "remove the field")
    given = {"head_dim": config["head_dim"]} if "head_dim" in config else {}
    return {name: config.get(name, field.default) for name, field in fields.items()} | given


def count(fields: Mapping[str, Any], key: str, *, least: int = 1, most: int = 1 << 28) -> int:
    """A field that is a count. Raises UnsupportedModelError if it is none, or out of bounds."""
    value: int = fields[key]
    if type(value) is not int or not least <= value <= most:
        raise UnsupportedModelError(
            f"config field {key} is {shown(value)}, not a count from {least} to {most}"
        )
    return value


def number(fields: Mapping[str, Any], key: str, *, positive: bool = True) -> float:
    """A field that is a finite number. Raises UnsupportedModelError if it is none."""
    value = fields[key]
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or (positive and value <= 0):
        wanted = "a positive number" if positive else "a number"
        raise UnsupportedModelError(f"config field {key} is {shown(value)}, not {wanted}")
    return float(value)


def shown(value: object) -> str:
    """A value of config.json as an error shows it."""
    return printable(repr(value) if isinstance(value, str) else str(value))[:80]


_DESCRIPTIONS: Final = MappingProxyType(
    {
        "int": "a whole number",
        "float": "a number with a fraction",
        "number": "a number",
        "bool": "true or false",
        "text": "a text",
        "ids": "a token id or a list of them",
        "ints": "a list of whole numbers",
        "texts": "a list",
        "table": "a table",
        "number_or_text": "a whole number or a text",
    }
)


def _described(field: Field) -> str:
    return _DESCRIPTIONS[field.kind.removesuffix("?")] + (" or null" if field.kind.endswith("?") else "")
