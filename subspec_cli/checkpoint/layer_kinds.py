"""The kinds of layers that a configuration names: windows, and which layers have rotary positions.

A model either has one kind of layer or names each layer's kind in `layer_types`; what is missing follows the rule of
the family's configuration class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from subspec_cli.checkpoint.config_fields import count, shown
from subspec_cli.checkpoint.layer_description import AttentionShape, Mixer
from subspec_cli.errors import UnsupportedModelError

FULL: Final = "full_attention"
SLIDING: Final = "sliding_attention"
LINEAR: Final = "linear_attention"
LAYER_KINDS: Final = (SLIDING, FULL)
FULL_ROPE: Final = 0
"""Rotary table of layers with full attention, and of all layers if there is one table."""
SLIDING_ROPE: Final = 1
"""Rotary table of layers with a window, in families that have two."""

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LayerSource:
    """What the layers of a model are made from."""

    model_type: str
    config: Fields
    """config.json, or the text part's table of it."""
    fields: Fields
    """The family's fields, with the defaults of those that are missing."""


@dataclass(frozen=True, slots=True)
class NamedLayer:
    """One layer, as `layer_types` names it."""

    kind: str
    number: int
    config: Fields
    fields: Fields


Layers = Callable[[LayerSource], tuple[Mixer, ...]]
"""Makes what mixes the tokens in each layer. Raises UnsupportedModelError."""
Kinds = Callable[[LayerSource], Sequence[str]]
"""Names the kind of each layer where config.json does not."""
Refine = Callable[[AttentionShape, NamedLayer], Mixer]
"""Changes the attention of one layer."""


def without_windows(source: LayerSource) -> tuple[AttentionShape, ...]:
    """All layers attend to all positions."""
    config, fields = source.config, source.fields
    if config.get("sliding_window") is not None:
        raise UnsupportedModelError(
            f"a {source.model_type} has no sliding_window, config.json sets {shown(config['sliding_window'])}",
            'remove the field, or name the family that has it, such as "model_type": "mistral"',
        )
    layers = _layer_count(fields)
    _check_kinds(config.get("layer_types"), layers, (FULL,))
    return (attention_shape(fields),) * layers


def with_one_window(source: LayerSource) -> tuple[AttentionShape, ...]:
    """All layers have the same window, or none has one."""
    config, fields = source.config, source.fields
    layers, window = _layer_count(fields), _window(fields)
    _check_kinds(config.get("layer_types"), layers, (SLIDING,) if window is not None else (FULL,))
    return (replace(attention_shape(fields), window=window),) * layers


def by_kind(
    default: Kinds,
    refine: Refine = lambda shape, _: shape,
    *,
    other: str = SLIDING,
    last: str | None = None,
    needs_window: bool = False,
) -> Layers:
    """Each layer has a kind, which `default` gives where none are named.

    `other` is the kind beside full attention, and `last` that of the last layer whatever is named. `needs_window`:
    the library fails on a window that is null, even if no layer has one.
    """

    def layers_of(source: LayerSource) -> tuple[Mixer, ...]:
        fields = source.fields
        if needs_window and fields["sliding_window"] is None:
            raise UnsupportedModelError("config field sliding_window is null", "remove the field")
        window = _window(fields) if other == SLIDING else None
        possible = (other, FULL) if window is not None or other != SLIDING else (FULL,)
        layers, kinds = _layer_count(fields), fields["layer_types"]
        if kinds is None:
            kinds = default(source)
        _check_kinds(kinds, layers, possible)
        if last is not None:
            kinds = [*kinds[:-1], last]
        shape = attention_shape(fields)
        return tuple(
            refine(
                replace(shape, window=window if kind == SLIDING else None),
                NamedLayer(kind, number, source.config, fields),
            )
            for number, kind in enumerate(kinds)
        )

    return layers_of


def every(pattern: int, *, field: str | None = "sliding_window_pattern", other: str = SLIDING) -> Kinds:
    """Of so many layers the last has full attention; `field` may name another number."""

    def kinds_of(source: LayerSource) -> Sequence[str]:
        number = pattern if field is None else source.config.get(field, pattern)
        if type(number) is not int or number < 1:
            raise UnsupportedModelError(f"config field {field} is {shown(number)}, not a count of at least 1")
        return [other if (layer + 1) % number else FULL for layer in range(_layer_count(source.fields))]

    return kinds_of


def attention_shape(fields: Fields) -> AttentionShape:
    """The attention that layers of full attention have. Raises UnsupportedModelError."""
    heads = count(fields, "num_attention_heads")
    kv_heads = heads if fields["num_key_value_heads"] is None else count(fields, "num_key_value_heads")
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    return AttentionShape(heads, kv_heads, head_size(fields))


def head_size(fields: Fields) -> int:
    """Features of each head. Raises UnsupportedModelError."""
    if fields.get("head_dim") is None:
        size = count(fields, "hidden_size") // count(fields, "num_attention_heads")
    else:
        size = count(fields, "head_dim", most=1 << 14)
    if size < 2 or size % 2:
        raise UnsupportedModelError(f"heads of size {size} are not supported: rotary positions turn pairs")
    return size


def _layer_count(fields: Fields) -> int:
    return count(fields, "num_hidden_layers", most=10_000)


def _window(fields: Fields) -> int | None:
    if not fields.get("use_sliding_window", True) or fields["sliding_window"] is None:
        return None
    return count(fields, "sliding_window")


def _check_kinds(kinds: object, layers: int, possible: tuple[str, ...]) -> None:
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in possible for kind in kinds):
        raise UnsupportedModelError(
            f"config field layer_types is {shown(kinds)}, not {layers} times {' or '.join(possible)}"
        )
