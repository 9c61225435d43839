"""Which family a config.json names, and the fields of its text part: alone, or inside a wrapper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from subspec_cli.checkpoint.config_fields import read_fields, shown
from subspec_cli.checkpoint.families import FAMILIES, SUPPORTED_ARCHITECTURES, WRAPPERS, Family, Wrapper
from subspec_cli.checkpoint.tensor_names import StoredNames
from subspec_cli.errors import UnsupportedModelError
from subspec_cli.units import printable


@dataclass(frozen=True, slots=True)
class ConfiguredModel:
    """A model whose family and fields are read."""

    architecture: str
    family: Family
    names: StoredNames
    config: Mapping[str, Any]
    """The text part's table of config.json; the whole of it without a wrapper."""
    fields: Mapping[str, Any]
    """Its fields, with the defaults of those that are missing."""
    is_tied: bool
    """Whether head and embedding are one table if the weights do not say otherwise."""


def configured_model(config: Mapping[str, Any]) -> ConfiguredModel:
    """Read which family a config.json names, and its fields.

    Raises:
        UnsupportedModelError: no supported family, two that differ, or a field that is not supported, by its name.
    """
    row = _row_of(config)
    if isinstance(row, Family):
        for name in ("text_config", "vision_config"):
            if config.get(name):
                raise UnsupportedModelError(f"config field {name} is not supported")
        fields = read_fields(row.model_type, config, row.own_fields)
        return ConfiguredModel(
            row.architecture, row, row.names, config, fields, fields["tie_word_embeddings"]
        )
    text = config.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise UnsupportedModelError(f"config field text_config is {shown(text)}, not a table")
    if not text:
        raise UnsupportedModelError(f"a {row.model_type} has its text part in text_config, which is missing")
    text = {"model_type": row.texts[0]} | text
    if text["model_type"] not in row.texts:
        raise UnsupportedModelError(
            f"the text part of a {row.model_type} is {shown(text['model_type'])}, not {' or '.join(row.texts)}"
        )
    is_tied = config.get("tie_word_embeddings", row.is_tied)
    if not isinstance(is_tied, bool):
        raise UnsupportedModelError(
            f"config field tie_word_embeddings is {shown(is_tied)}, not true or false"
        )
    own = FAMILIES[text["model_type"]]
    family = replace(own, arithmetic=lambda fields: row.changes(own.arithmetic(fields)))
    names = replace(own.names, towers=row.names.towers, heads=row.names.heads, others=row.names.others)
    return ConfiguredModel(
        row.architecture, family, names, text, read_fields(own.model_type, text, own.own_fields), is_tied
    )


def unread_tensors(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Prefixes of the stored tensors that text does not need; none for a model that is not supported."""
    row = _named_row(config)
    return () if row is None else row.names.others


def _named_row(config: Mapping[str, Any]) -> Family | Wrapper | None:
    model_type = config.get("model_type")
    return (FAMILIES.get(model_type) or WRAPPERS.get(model_type)) if isinstance(model_type, str) else None


def _row_of(config: Mapping[str, Any]) -> Family | Wrapper:
    """The row that config.json names by `model_type`, which must agree with `architectures`."""
    model_type, named = config.get("model_type"), config.get("architectures") or []
    architectures = [printable(str(name))[:80] for name in (named if isinstance(named, list) else [named])]
    row = _named_row(config)
    if row is not None and all(name == row.architecture for name in architectures):
        return row
    shown_names = ", ".join(architectures)
    if row is not None and set(architectures) & set(SUPPORTED_ARCHITECTURES):
        raise UnsupportedModelError(
            f"config.json names two families: model_type {row.model_type} and architectures {shown_names}",
            f'if the weights are those of a {row.model_type}, set "architectures": ["{row.architecture}"]',
        )
    if model_type is None and set(architectures) <= set(SUPPORTED_ARCHITECTURES):
        types = ", ".join((*FAMILIES, *WRAPPERS))
        raise UnsupportedModelError("config.json names no model_type", f'add "model_type": one of {types}')
    kind = "mixture-of-experts model " if any("expert" in key for key in config) else ""
    what = shown_names or f"model_type {printable(str(model_type))[:80]}"
    raise UnsupportedModelError(
        f"{kind}{what} is not supported" + (f" under model_type {row.model_type}" if row else ""),
        "supported are dense models: " + ", ".join(SUPPORTED_ARCHITECTURES),
    )
