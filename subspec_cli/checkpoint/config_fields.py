"""The fields of config.json that a family has: their types and defaults, and the fields that no family may set.

A field that is missing has the default of the family's configuration class in transformers. A test compares these
tables with those classes; they are not imported here, since `subspec plan` answers without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

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
        "texts": (),
        "table": (dict,),
    }
)


_LISTED: Final[Mapping[str, type]] = MappingProxyType({"ids": int, "texts": str})
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


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models, as its configuration names it."""

    model_type: str
    architecture: str
    fields: Mapping[str, Field]


_LAYER_FIELDS: Final = MappingProxyType(
    {
        "hidden_size": Field("int", 4096),
        "num_hidden_layers": Field("int", 32),
        "num_attention_heads": Field("int", 32),
        "hidden_act": Field("text", "silu"),
        "initializer_range": Field("float", 0.02),
        "rms_norm_eps": Field("float", 1e-6),
        "use_cache": Field("bool", True),
        "pad_token_id": Field("int?"),
        "tie_word_embeddings": Field("bool", False),
        "rope_parameters": Field("table?"),
    }
)
_WINDOW_FIELDS: Final = MappingProxyType(
    {
        "use_sliding_window": Field("bool", False),
        "sliding_window": Field("int?", 4096),
        "max_window_layers": Field("int", 28),
        "layer_types": Field("texts?"),
    }
)
_QWEN_FIELDS: Final = MappingProxyType(
    _LAYER_FIELDS
    | _WINDOW_FIELDS
    | {
        "vocab_size": Field("int", 151936),
        "intermediate_size": Field("int", 22016),
        "num_key_value_heads": Field("int?", 32),
        "max_position_embeddings": Field("int", 32768),
        "attention_dropout": Field("number", 0.0),
        "bos_token_id": Field("int?"),
        "eos_token_id": Field("ids?"),
    }
)
_FAMILIES: Final = (
    Family(
        "llama",
        "LlamaForCausalLM",
        _LAYER_FIELDS
        | {
            "vocab_size": Field("int", 32000),
            "intermediate_size": Field("int", 11008),
            "num_key_value_heads": Field("int?"),
            "max_position_embeddings": Field("int", 2048),
            "pretraining_tp": Field("int?", 1),
            "attention_bias": Field("bool", False),
            "attention_dropout": Field("number?", 0.0),
            "mlp_bias": Field("bool", False),
            "head_dim": Field("int?"),
            "bos_token_id": Field("int?", 1),
            "eos_token_id": Field("ids?", 2),
        },
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        _LAYER_FIELDS
        | {
            "vocab_size": Field("int", 32000),
            "intermediate_size": Field("int", 14336),
            "num_key_value_heads": Field("int", 8),
            "max_position_embeddings": Field("int", 131072),
            "sliding_window": Field("int?", 4096),
            "attention_dropout": Field("number", 0.0),
            "head_dim": Field("int?"),
            "bos_token_id": Field("int?", 1),
            "eos_token_id": Field("ids?", 2),
        },
    ),
    Family("qwen2", "Qwen2ForCausalLM", _QWEN_FIELDS),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        _QWEN_FIELDS | {"head_dim": Field("int", 128), "attention_bias": Field("bool", False)},
    ),
)
FAMILIES: Final = MappingProxyType({family.model_type: family for family in _FAMILIES})
SUPPORTED_ARCHITECTURES: Final = tuple(family.architecture for family in _FAMILIES)
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
    "attention_sinks",
    "attention_chunk_size",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_kv_shared_layers",
    "per_layer_config",
    "is_encoder_decoder",
    "use_bidirectional_attention",
    "text_config",
    "vision_config",
)
"""Fields that would change the model's function if they had a value. No supported family has them."""


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that config.json names by `model_type`, which must agree with `architectures`.

    Raises:
        UnsupportedModelError: no supported family, or two that differ.
    """
    model_type, named = config.get("model_type"), config.get("architectures") or []
    architectures = [printable(str(name))[:80] for name in (named if isinstance(named, list) else [named])]
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is not None and all(name == family.architecture for name in architectures):
        return family
    shown_names = ", ".join(architectures)
    if family is not None and set(architectures) & set(SUPPORTED_ARCHITECTURES):
        raise UnsupportedModelError(
            f"config.json names two families: model_type {family.model_type} and architectures {shown_names}",
            f'if the weights are those of a {family.model_type}, set "architectures": ["{family.architecture}"]',
        )
    if model_type is None and set(architectures) <= set(SUPPORTED_ARCHITECTURES):
        types = ", ".join(FAMILIES)
        raise UnsupportedModelError("config.json names no model_type", f'add "model_type": one of {types}')
    kind = "mixture-of-experts model " if any("expert" in key for key in config) else ""
    what = shown_names or f"model_type {printable(str(model_type))[:80]}"
    raise UnsupportedModelError(
        f"{kind}{what} is not supported" + (f" under model_type {family.model_type}" if family else ""),
        "supported are dense models: " + ", ".join(SUPPORTED_ARCHITECTURES),
    )


def read_fields(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a family's fields, with the defaults of those that are missing.

    Raises:
        UnsupportedModelError: a field of another type, or one that no supported family has.
    """
    for name, field in family.fields.items():
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
        if config.get(name):
            raise UnsupportedModelError(f"config field {name} is not supported")
    return {name: config.get(name, field.default) for name, field in family.fields.items()}


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
        "texts": "a list",
        "table": "a table",
    }
)


def _described(field: Field) -> str:
    return _DESCRIPTIONS[field.kind.removesuffix("?")] + (" or null" if field.kind.endswith("?") else "")
