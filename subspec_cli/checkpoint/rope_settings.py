"""Rotary positions as config.json sets them: which type, with which numbers, as the library would read them.

Old and new spellings are read in the library's order: a `rope_scaling` that is no empty value replaces
`rope_parameters`; what a table does not name comes from the fields beside it, then from the default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from subspec_cli.checkpoint.config_fields import shown
from subspec_cli.checkpoint.geometry import LAYER_KINDS, ModelGeometry
from subspec_cli.errors import UnsupportedModelError
from subspec_cli.units import printable

_DEFAULT_THETA: Final = 10_000.0
_REQUIRED: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "default": (),
        "linear": ("factor",),
        "yarn": ("factor",),
        "longrope": ("short_factor", "long_factor"),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }
)
"""The types that are run, and what each must name."""
_NULLABLE: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "default": (),
        "linear": (),
        "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        "longrope": ("factor", "attention_factor"),
        "llama3": (),
    }
)
"""Numbers for which the library has a value of its own if they are null or missing."""
_POSITIVE: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "default": (),
        "linear": ("factor",),
        "yarn": _NULLABLE["yarn"],
        "longrope": _NULLABLE["longrope"],
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }
)
_STRETCHED: Final = ("yarn", "longrope", "llama3")
"""Types that know the positions of the model before it was stretched."""


@dataclass(frozen=True, slots=True)
class RopeSettings:
    """Rotary positions of a model; all numbers are checked."""

    kind: str
    """The type, as the library names it."""
    parameters: Mapping[str, Any]
    """What the library's function of this type reads, with `rope_theta`."""
    head_dim: int
    max_positions: int

    @property
    def switch(self) -> int | None:
        """Positions after which longrope takes its long factors; None for other types."""
        return self.parameters["original_max_position_embeddings"] if self.kind == "longrope" else None


def read_rope(config: Mapping[str, Any], geometry: ModelGeometry) -> RopeSettings:
    """Rotary positions of a model.

    Raises:
        UnsupportedModelError: a type that is not run, tables by kind of layer, or a number that is missing or wrong.
    """
    table = _table(config)
    kind = table.get("rope_type", table.get("type", "default"))
    if not isinstance(kind, str) or kind not in _REQUIRED:
        # `dynamic` depends on the longest position in a call. An unknown type must not run as another one.
        raise UnsupportedModelError(
            f"rotary positions of type {printable(str(kind))[:80]} are not run",
            "supported types: " + ", ".join(_REQUIRED),
        )
    parameters = {"rope_theta": config.get("rope_theta", _DEFAULT_THETA)} | table
    if kind in _STRETCHED:
        if "original_max_position_embeddings" in config:
            parameters["original_max_position_embeddings"] = config["original_max_position_embeddings"]
        parameters.setdefault("original_max_position_embeddings", geometry.max_positions)
    _check_share(config, table)
    _check_numbers(kind, parameters, geometry.head_dim)
    return RopeSettings(kind, MappingProxyType(parameters), geometry.head_dim, geometry.max_positions)


def _table(config: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("rope_scaling", "rope_parameters"):
        if config.get(name) and not isinstance(config[name], dict):
            raise UnsupportedModelError(f"config field {name} is {shown(config[name])}, not a table or null")
    table: dict[str, Any] = config.get("rope_scaling") or config.get("rope_parameters") or {}
    nested = [name for name, value in table.items() if isinstance(value, dict) or name in LAYER_KINDS]
    if nested:
        raise UnsupportedModelError(
            f"rotary positions differ by kind of layer ({shown(', '.join(nested))}), which this family does not do",
            'write one table: "rope_parameters": {"rope_type": ..., "rope_theta": ...}',
        )
    return table


def _check_share(config: Mapping[str, Any], table: Mapping[str, Any]) -> None:
    """Refuse rotation of a part of each head: no supported family has it."""
    for where in (config, table):
        if (share := where.get("partial_rotary_factor")) is not None and share != 1:
            raise UnsupportedModelError(f"partial_rotary_factor {shown(share)} is not supported, only 1")
    if table.get("partial_rotary_factor", 1) is None:
        raise UnsupportedModelError("partial_rotary_factor is null in the table of rotary positions")


def _check_numbers(kind: str, parameters: Mapping[str, Any], head_dim: int) -> None:
    missing = [name for name in _REQUIRED[kind] if name not in parameters]
    if missing:
        raise UnsupportedModelError(f"rotary positions of type {kind} lack {', '.join(missing)}")
    for name in ("rope_theta", *_POSITIVE[kind]):
        if name in _NULLABLE[kind] and parameters.get(name) is None:
            continue
        if not _is_number(parameters[name]) or parameters[name] <= 0:
            raise _wrong(kind, name, parameters[name], "a positive number")
    if kind in _STRETCHED:
        original = parameters["original_max_position_embeddings"]
        if type(original) is not int or original < 2:
            raise _wrong(kind, "original_max_position_embeddings", original, "a count of at least 2")
    if kind == "yarn" and parameters["rope_theta"] <= 1:
        raise _wrong(kind, "rope_theta", parameters["rope_theta"], "a number above 1")
    if kind == "longrope":
        _check_factors(parameters, head_dim)


def _check_factors(parameters: Mapping[str, Any], head_dim: int) -> None:
    for name in ("short_factor", "long_factor"):
        factors = parameters[name]
        if not isinstance(factors, list) or not all(_is_number(factor) and factor > 0 for factor in factors):
            raise _wrong("longrope", name, factors, "a list of positive numbers")
        if len(factors) != head_dim // 2:
            raise UnsupportedModelError(
                f"{name} has {len(factors)} numbers, heads of size {head_dim} need {head_dim // 2}"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(kind: str, name: str, value: object, wanted: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{name} of rotary positions of type {kind} is {shown(value)}, not {wanted}")
