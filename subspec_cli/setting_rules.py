"""The rules of settings: what values they take, and the metadata of a field that is a setting. Plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import field
from typing import Any, Final, NamedTuple

from subspec_cli.units import SIZE_WORDS, parse_size_gib

BIT_WIDTHS: Final = (2, 4, 8)
"""Bits that a substitute's weights may have."""
DEFAULT_BITS: Final = 4
"""Bits that `prepare` takes when neither flag nor file names any."""
MOST_PARALLEL: Final = 64
"""Most answers at a time."""
MOST_REPLICAS: Final = 256
"""Most replicas of one model."""
MOST_BIAS: Final = 100
"""Largest bias of a logit, as in the OpenAI API."""


class Rule(NamedTuple):
    """The values that a setting takes, and the words for them in messages."""

    expected: str
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], object] = lambda value: value


class Setting(NamedTuple):
    """The metadata of one setting. Plain data; the command line makes its options from it."""

    rule: Rule
    help: str = ""
    """One line for `--help`; a setting without one has no flag."""
    metavar: str = ""
    shown_default: str = ""
    """What `--help` says about the default; empty shows the default value itself."""
    key: str = ""
    """Name in files, flags and records, if it is not the field's."""
    alias: str = ""
    """Second key of the same setting."""
    letter: str = ""
    """Its flag of one letter."""


def setting(default: object, rule: Rule, *words: str, **names: str) -> Any:  # noqa: ANN401 - as `field`
    """A field with the metadata `Setting(rule, *words, **names)`."""
    return field(default=default, metadata={"setting": Setting(rule, *words, **names)})


def whole(low: int, high: float = math.inf) -> Rule:
    expected = (
        f"a whole number of at least {low}" if high == math.inf else f"a whole number from {low} to {high}"
    )
    return Rule(expected, lambda value: type(value) is int and low <= value <= high)


def number(expected: str, accepts: Callable[[float], bool]) -> Rule:
    def is_accepted(value: object) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        return abs(value) < 1e300 and accepts(value)

    return Rule(expected, is_accepted, float)


def _size() -> Rule:
    numbers = number(SIZE_WORDS, lambda gib: 0 < gib <= 1e6)

    def in_gib(value: Any) -> Any:  # noqa: ANN401 - of any type, from TOML
        with suppress(ValueError):
            return parse_size_gib(value) if isinstance(value, str) else value
        return None

    return Rule(SIZE_WORDS, lambda value: numbers.accepts(in_gib(value)), lambda value: float(in_gib(value)))


def choice(*choices: object) -> Rule:
    words = [str(choice) for choice in choices]
    expected = f"{', '.join(words[:-1])} or {words[-1]}"
    return Rule(expected, lambda value: type(value) is type(choices[0]) and value in choices)


BITS = choice(*BIT_WIDTHS)
SIZE: Final = _size()
"""The rule of every size of memory: GiB as a number, or a text with a unit."""
AUTO: Final = "auto"
BUDGET: Final = Rule(
    f"{SIZE.expected}, or {AUTO}",
    lambda value: value == AUTO or SIZE.accepts(value),
    lambda value: None if value == AUTO else SIZE.convert(value),
)
"""The rule of the device's budget: a size, or `auto`, which takes the place of a file's size."""
SWITCH = Rule("true or false", lambda value: isinstance(value, bool))
TEXT = Rule("a text", lambda value: isinstance(value, str))
NAME = Rule("a text that is not empty", lambda value: isinstance(value, str) and bool(value.strip()))
TEXTS = Rule(
    "a list of texts, none of them empty",
    lambda value: isinstance(value, list | tuple) and all(isinstance(item, str) and item for item in value),
    tuple,
)
OVERRIDES = Rule(
    f"a table of {BITS.expected} bits by name pattern",
    lambda value: (
        isinstance(value, Mapping)
        and all(name.strip() and BITS.accepts(bits) for name, bits in value.items())
    ),
    lambda value: tuple(value.items()),
)
BIASES: Final = Rule(
    f"a table of numbers from -{MOST_BIAS} to {MOST_BIAS} by token id, or by a text that is one token",
    lambda value: (
        isinstance(value, Mapping)
        and all(key for key in value)
        and all(type(bias) in (int, float) and abs(bias) <= MOST_BIAS for bias in value.values())
    ),
    lambda value: tuple((key, float(bias)) for key, bias in value.items()),
)
"""The rule of the biases of logits; on the command line they come from a file."""
