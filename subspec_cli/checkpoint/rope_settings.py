"""Rotary positions as config.json sets them: which type, with which numbers, as the library would read them.

Old and new spellings are read in the library's order: a `rope_scaling` that is no empty value replaces
`rope_parameters`; what a table does not name comes from the fields beside it, then from the default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from subspec_cli.checkpoint.config_fields import shown
from subspec_cli.checkpoint.configured_model import ConfiguredModel
from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.layer_kinds import FULL, LAYER_KINDS, SLIDING
from subspec_cli.checkpoint.rope_rule import RopeRule
from subspec_cli.errors import UnsupportedModelError
from subspec_cli.units import printable

_ORIGINAL: Final = "original_max_position_embeddings"
_REQUIRED: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "default": (),
        "proportional": (),
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
        "proportional": ("factor",),
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
        "proportional": ("factor",),
        "linear": ("factor",),
        "yarn": _NULLABLE["yarn"],
        "longrope": _NULLABLE["longrope"],
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }
)
_STRETCHED: Final = ("yarn", "longrope", "llama3")
"""Types that know the positions of the model before it was stretched."""


class QueryGrowth(NamedTuple):
    """A factor of the query by its position: `1 + beta * ln(1 + floor(position / length))`."""

    beta: float
    length: int


@dataclass(frozen=True, slots=True)
class RopeSettings:
    """One table of rotary positions; all numbers are checked."""

    kind: str
    """The type, as the library names it."""
    parameters: Mapping[str, Any]
    """What the library's function of this type reads, with `rope_theta`."""
    head_dim: int
    max_positions: int
    query_growth: QueryGrowth | None = None

    @property
    def switch(self) -> int | None:
        """Positions after which longrope takes its long factors; None for other types."""
        return self.parameters[_ORIGINAL] if self.kind == "longrope" else None

    @property
    def turned(self) -> int:
        """Features of each head that are turned."""
        if self.kind == "proportional":  # frequencies of zero turn the rest by nothing
            return self.head_dim
        share: float = self.parameters.get("partial_rotary_factor", 1.0)
        return int(self.head_dim * share)


def read_ropes(model: ConfiguredModel, geometry: ModelGeometry) -> tuple[RopeSettings, ...]:
    """Rotary positions of a model: one table, or one for full attention and one for layers with a window.

    Raises:
        UnsupportedModelError: a type that is not run, tables by kind of layer where the family has one, or a number
            that is missing or wrong.
    """
    rule, config = model.family.rope, model.config
    tables = [_one_table(rule, config)] if rule.sliding_theta is None else _two_tables(rule, config)
    return tuple(_settings(model, geometry, number, table) for number, table in enumerate(tables))


def _head_dim(geometry: ModelGeometry, number: int) -> int:
    """The size of the heads that a table turns; a table that no layer uses may have any."""
    sizes = {shape.head_dim for shape in geometry.attention if shape.rope == number}
    if len(sizes) > 1:
        raise UnsupportedModelError(
            f"layers of one kind have heads of {' and '.join(map(str, sizes))} features"
        )
    return sizes.pop() if sizes else max(shape.head_dim for shape in geometry.attention)


def _settings(
    model: ConfiguredModel, geometry: ModelGeometry, number: int, table: Mapping[str, Any]
) -> RopeSettings:
    rule, head_dim = model.family.rope, _head_dim(geometry, number)
    kind = table.get("rope_type", table.get("type", "default"))
    if isinstance(kind, str):
        kind = rule.synonyms.get(kind, kind)
    parameters = dict(table)
    if kind == "dynamic" and rule.has_alpha and parameters.get("alpha"):
        kind = "default"
        parameters["rope_theta"] = _grown_theta(parameters, head_dim)
    if not isinstance(kind, str) or kind not in rule.kinds:
        # `dynamic` depends on the longest position in a call. An unknown type must not run as another one.
        raise UnsupportedModelError(
            f"rotary positions of type {printable(str(kind))[:80]} are not run",
            "supported types: " + ", ".join(rule.kinds),
        )
    if kind == "default" and not rule.fills_tables:
        parameters.pop("partial_rotary_factor", None)  # the library reads it in the other types only
    if kind in _STRETCHED:
        beside = {**model.config, **{k: v for k, v in model.fields.items() if k == _ORIGINAL}}
        if _ORIGINAL in beside:
            parameters[_ORIGINAL] = beside[_ORIGINAL]
        parameters.setdefault(_ORIGINAL, geometry.max_positions)
    turned = _check_share(model, parameters, head_dim)
    _check_numbers(kind, parameters, turned)
    growth = _query_growth(kind, parameters) if rule.has_query_growth else None
    return RopeSettings(kind, MappingProxyType(parameters), head_dim, geometry.max_positions, growth)


def _given_table(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    if config.get(name) and not isinstance(config[name], dict):
        raise UnsupportedModelError(f"config field {name} is {shown(config[name])}, not a table or null")
    return dict(config.get(name) or {})


def _one_table(rule: RopeRule, config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_scaling` replaces `rope_parameters`; fields beside the table fill it."""
    scaling, parameters = _given_table(config, "rope_scaling"), _given_table(config, "rope_parameters")
    table = scaling or parameters or dict(rule.default_table)
    nested = [name for name, value in table.items() if isinstance(value, dict) or name in LAYER_KINDS]
    if nested:
        raise UnsupportedModelError(
            f"rotary positions differ by kind of layer ({shown(', '.join(nested))}), which this family does not do",
            'write one table: "rope_parameters": {"rope_type": ..., "rope_theta": ...}',
        )
    return {"rope_theta": config.get("rope_theta", rule.theta)} | table


def _two_tables(rule: RopeRule, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`rope_scaling` is added to the table of full attention, and fields beside the tables fill them, where a family
    fills tables.
    """
    scaling, given = _given_table(config, "rope_scaling"), _given_table(config, "rope_parameters")
    if loose := [name for name in given if name not in LAYER_KINDS]:
        raise UnsupportedModelError(
            f"rope_parameters names {shown(', '.join(loose))} beside its kinds of layers",
            f'write one table for each: "rope_parameters": {{"{FULL}": {{...}}, "{SLIDING}": {{...}}}}',
        )
    if not rule.fills_tables:
        if config.get("rope_scaling") is not None:
            # The library would put it in the place of both tables, and fail.
            raise UnsupportedModelError(
                f"config field rope_scaling is {shown(config['rope_scaling'])}, which this family does not have",
                f'write rope_parameters: {{"{FULL}": {{...}}, "{SLIDING}": {{...}}}}',
            )
        found = rule.default_table if config.get("rope_parameters") is None else given
        return [_given_table(found, FULL), _given_table(found, SLIDING)]
    if "type" in scaling and "rope_type" not in scaling:
        # The library keeps the rope_type of its own table, and would not scale.
        raise UnsupportedModelError("rope_scaling names its type as `type`", "name it as `rope_type`")
    full = _given_table(given, FULL) | scaling
    sliding = _given_table(given, SLIDING)
    return [
        {"rope_theta": config.get("rope_theta", rule.theta)} | full,
        {"rope_theta": config.get(rule.sliding_theta_field, rule.sliding_theta)} | sliding,
    ]


def _check_share(model: ConfiguredModel, parameters: dict[str, Any], head_dim: int) -> int:
    """Fill in the share of each head that is turned, and return the features; refuse it where a family has none."""
    rule, name = model.family.rope, "partial_rotary_factor"
    if rule.share is None:
        for where in (model.config, parameters):
            if (share := where.get(name)) is not None and share != 1:
                raise UnsupportedModelError(f"{name} {shown(share)} is not supported, only 1")
        if parameters.get(name, 1) is None:
            raise UnsupportedModelError(f"{name} is null in the table of rotary positions")
        return head_dim
    share = parameters.setdefault(name, model.config.get(name, rule.share))
    if not _is_number(share) or not 0 < share <= 1:
        raise UnsupportedModelError(f"{name} is {shown(share)}, not a share of the head from 0 to 1")
    turned = int(head_dim * share)
    if turned < 2 or turned % 2:
        raise UnsupportedModelError(f"{name} {shown(share)} turns {turned} of {head_dim} features, not pairs")
    return turned


def _grown_theta(parameters: Mapping[str, Any], head_dim: int) -> float:
    for name in ("rope_theta", "alpha"):
        if not _is_number(parameters[name]) or parameters[name] <= 0:
            raise _wrong("dynamic", name, parameters[name], "a positive number")
    if head_dim <= 2:
        raise UnsupportedModelError(f"alpha needs heads of more than 2 features, not {head_dim}")
    grown: float = parameters["rope_theta"] * parameters["alpha"] ** (head_dim / (head_dim - 2))
    return grown


def _query_growth(kind: str, parameters: Mapping[str, Any]) -> QueryGrowth:
    names = ("llama_4_scaling_beta", _ORIGINAL)
    if missing := [name for name in names if name not in parameters]:
        raise UnsupportedModelError(f"rotary positions of type {kind} lack {', '.join(missing)}")
    beta, length = (parameters[name] for name in names)
    if not _is_number(beta):
        raise _wrong(kind, names[0], beta, "a number")
    if type(length) is not int or length < 1:
        raise _wrong(kind, names[1], length, "a count")
    return QueryGrowth(float(beta), length)


def _check_numbers(kind: str, parameters: Mapping[str, Any], turned: int) -> None:
    missing = [name for name in ("rope_theta", *_REQUIRED[kind]) if name not in parameters]
    if missing:
        raise UnsupportedModelError(f"rotary positions of type {kind} lack {', '.join(missing)}")
    for name in ("rope_theta", *_POSITIVE[kind]):
        if name in _NULLABLE[kind] and parameters.get(name) is None:
            continue
        if not _is_number(parameters[name]) or parameters[name] <= 0:
            raise _wrong(kind, name, parameters[name], "a positive number")
    if kind in _STRETCHED:
        original = parameters[_ORIGINAL]
        if type(original) is not int or original < 2:
            raise _wrong(kind, _ORIGINAL, original, "a count of at least 2")
    if kind == "yarn" and parameters["rope_theta"] <= 1:
        raise _wrong(kind, "rope_theta", parameters["rope_theta"], "a number above 1")
    if kind == "longrope":
        _check_factors(parameters, turned)


def _check_factors(parameters: Mapping[str, Any], turned: int) -> None:
    for name in ("short_factor", "long_factor"):
        factors = parameters[name]
        if not isinstance(factors, list) or not all(_is_number(factor) and factor > 0 for factor in factors):
            raise _wrong("longrope", name, factors, "a list of positive numbers")
        if len(factors) != turned // 2:
            raise UnsupportedModelError(
                f"{name} has {len(factors)} numbers, heads that turn {turned} features need {turned // 2}"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(kind: str, name: str, value: object, wanted: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{name} of rotary positions of type {kind} is {shown(value)}, not {wanted}")
