"""Settings: each field holds the default, the range and the help text of one setting, for flag and TOML key.

A key is the flag's name with underscores. Plain data: `cli.options` makes the flags, `config_file` reads TOML.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

from subspec_cli.units import SIZE_WORDS, parse_size_gib

BIT_WIDTHS: Final = (2, 4, 8)
"""Bits that a substitute's weights may have."""
DEFAULT_BITS: Final = 4
"""Bits that `prepare` takes when neither flag nor file names any."""
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


def _setting(default: object, rule: Rule, *words: str, **names: str) -> Any:  # noqa: ANN401 - as `field`
    """A field with the metadata `Setting(rule, *words, **names)`."""
    return field(default=default, metadata={"setting": Setting(rule, *words, **names)})


def _whole(low: int, high: float = math.inf) -> Rule:
    expected = (
        f"a whole number of at least {low}" if high == math.inf else f"a whole number from {low} to {high}"
    )
    return Rule(expected, lambda value: type(value) is int and low <= value <= high)


def _number(expected: str, accepts: Callable[[float], bool]) -> Rule:
    def is_accepted(value: object) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        return abs(value) < 1e300 and accepts(value)

    return Rule(expected, is_accepted, float)


def _size() -> Rule:
    numbers = _number(SIZE_WORDS, lambda gib: 0 < gib <= 1e6)

    def in_gib(value: Any) -> Any:  # noqa: ANN401 - of any type, from TOML
        with suppress(ValueError):
            return parse_size_gib(value) if isinstance(value, str) else value
        return None

    return Rule(SIZE_WORDS, lambda value: numbers.accepts(in_gib(value)), lambda value: float(in_gib(value)))


def _choice(*choices: object) -> Rule:
    words = [str(choice) for choice in choices]
    expected = f"{', '.join(words[:-1])} or {words[-1]}"
    return Rule(expected, lambda value: type(value) is type(choices[0]) and value in choices)


_BITS = _choice(*BIT_WIDTHS)
SIZE: Final = _size()
"""The rule of every size of memory: GiB as a number, or a text with a unit."""
AUTO: Final = "auto"
BUDGET: Final = Rule(
    f"{SIZE.expected}, or {AUTO}",
    lambda value: value == AUTO or SIZE.accepts(value),
    lambda value: None if value == AUTO else SIZE.convert(value),
)
"""The rule of the device's budget: a size, or `auto`, which takes the place of a file's size."""
_SWITCH = Rule("true or false", lambda value: isinstance(value, bool))
_TEXT = Rule("a text", lambda value: isinstance(value, str))
_NAME = Rule("a text that is not empty", lambda value: isinstance(value, str) and bool(value.strip()))
_TEXTS = Rule(
    "a list of texts, none of them empty",
    lambda value: isinstance(value, list | tuple) and all(isinstance(item, str) and item for item in value),
    tuple,
)
_OVERRIDES = Rule(
    f"a table of {_BITS.expected} bits by name pattern",
    lambda value: (
        isinstance(value, Mapping)
        and all(name.strip() and _BITS.accepts(bits) for name, bits in value.items())
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


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and which of its prepared substitutes."""

    model: str | None = _setting(
        None,
        _NAME,
        "Hub id, local directory, demo, or the last name of a prepared model.",
        "MODEL",
        "the model used last",
        letter="m",
    )
    revision: str | None = _setting(None, _NAME, "Branch, tag or commit on the hub.", "REV")
    """None takes the prepared one."""
    bits: int | None = _setting(None, _BITS, "Use the substitutes prepared with these bits.", "4|8|2")
    """None takes what was prepared."""


@dataclass(frozen=True)
class MemoryConfig:
    """What the target, its substitutes and the caches may occupy."""

    memory_gib: float | None = _setting(
        None,
        BUDGET,
        "Memory to use: the device's on cuda, RAM on cpu. 8 is 8 GiB; 500MB, 800MiB, 8GB and 1.5GiB say the unit; "
        "auto leaves what others use.",
        "SIZE",
        "auto",
        key="vram_gb",
        alias="memory_gb",
    )
    """Budget of the device. None is auto: what is free, less a reserve."""
    ram_gb: float | None = _setting(
        None,
        SIZE,
        "Host memory to use, as a number of GiB or with a unit; what does not fit is read from disk.",
        "SIZE",
        "what is free",
    )
    """On a GPU the host memory beside it, on cpu all of the process."""
    device: str = _setting("auto", _choice("auto", "cuda", "cpu"), "Where to run.", "auto|cuda|cpu")
    """auto takes cuda if there is a GPU."""
    context: int | None = _setting(
        None,
        _whole(16),
        "Tokens of prompt and answer together.",
        "N",
        "what the prompt and --max-new-tokens need; in a chat up to 4096, as the budget allows",
    )
    resident_layers: int | None = _setting(
        None,
        _whole(0),
        "Keep N target layers in memory; 0 streams all, also when all would fit.",
        "N",
        "planned",
    )
    no_residual: bool = _setting(
        False, _SWITCH, "Stream 16-bit weights raw, also where residuals are prepared."
    )
    reprobe: bool = _setting(
        False, _SWITCH, "Time link and kernels again, in place of what was kept from an earlier run."
    )


@dataclass(frozen=True)
class DraftConfig:
    """The shape of the draft tree; None lets measured times decide."""

    depth: int | None = _setting(None, _whole(1, 64), "Fix the depth of the draft tree.", "D", "adaptive")
    width: int | None = _setting(
        None, _whole(1, 8), "Fix the width of the draft tree; 1 is a chain.", "W", "adaptive"
    )
    no_shadow: bool = _setting(
        False, _SWITCH, "Draft only between passes, not while a pass waits for weights."
    )
    no_speculation: bool = _setting(
        False, _SWITCH, "Decode plainly, one pass per token: the same tokens, slower."
    )


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is chosen from the target's logits."""

    source: Literal["model", "greedy"] | None = _setting(
        None,
        _choice("model", "greedy"),
        "What no other flag says: generation_config.json's values, or greedy.",
        "model|greedy",
        "greedy; in a chat the model's",
        key="sampling",
    )
    """None is greedy, and in a chat the model's own values."""
    temperature: float = _setting(
        0.0,
        _number("a number of at least 0", lambda value: value >= 0),
        "0 takes the most likely token.",
        "T",
        letter="t",
    )
    top_p: float = _setting(
        1.0,
        _number("a number above 0 and at most 1", lambda value: 0 < value <= 1),
        "Sample among the most likely tokens holding this probability.",
        "P",
    )
    top_k: int = _setting(0, _whole(0), "Sample among the K most likely tokens; 0 takes all.", "K")
    min_p: float = _setting(
        0.0,
        _number("a number from 0 to 1", lambda value: 0 <= value <= 1),
        "Sample among tokens at least this share as likely as the best.",
        "P",
    )
    repetition_penalty: float = _setting(
        1.0,
        _number("a number above 0", lambda value: value > 0),
        "Penalty of tokens of prompt and answer, as transformers applies it; 1 is none.",
        "X",
    )
    presence_penalty: float = _setting(
        0.0,
        _number("a number from -100 to 100", lambda value: abs(value) <= 100),
        "Taken once from each token of the answer.",
        "X",
    )
    frequency_penalty: float = _setting(
        0.0,
        _number("a number from -100 to 100", lambda value: abs(value) <= 100),
        "Taken from a token for each time that it is in the answer.",
        "X",
    )
    logit_bias: tuple[tuple[str, float], ...] = _setting(
        (), BIASES, 'Added to logits: JSON such as {"65": 2.5, " the": -100}, ids or tokens.', "FILE"
    )
    """By token: digits are an id, another text is itself one token."""
    seed: int | None = _setting(
        None, _whole(0, 2**63 - 1), "Same seed, same answer.", "S", "a fresh one, shown"
    )
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    """Fields that a flag or a file gave; a model's own values replace the others."""

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


@dataclass(frozen=True)
class SubstituteConfig:
    """How `prepare` quantizes; `run` takes what was prepared."""

    bits: int | None = _setting(None, _BITS, "Bits per substitute weight.", "4|8|2", str(DEFAULT_BITS))
    """None takes those of [model], else `DEFAULT_BITS`."""
    optimizer: Literal["minmax", "hqq"] = _setting(
        "minmax", _choice("minmax", "hqq"), "How scales are found; hqq is slower."
    )
    """minmax takes a group's extremes, hqq searches for the smallest error."""
    residual: bool = _setting(False, _SWITCH, "Write residuals too, so that passes stream fewer bytes.")
    overrides: tuple[tuple[str, int], ...] = _setting((), _OVERRIDES)
    """Other bits for matrices, by a pattern of the name inside the layer (`mlp.down_proj`); the first pattern
    that matches is used."""


@dataclass(frozen=True)
class RunConfig:
    """What only `subspec run` takes."""

    max_new_tokens: int = _setting(512, _whole(1), "Longest answer.", "N", letter="n")
    stop: tuple[str, ...] = _setting(
        (), _TEXTS, "End the answer before this text or special token; may be given several times.", "TEXT"
    )
    system: str | None = _setting(None, _TEXT, "System message of the chat template.", "TEXT", letter="s")
    """None leaves it to the template."""
    raw: bool = _setting(False, _SWITCH, "Complete the bare text, without chat template.")
    plain: bool = _setting(
        False, _SWITCH, "The raw text, without statistics and colours, also on a terminal."
    )


@dataclass(frozen=True)
class BenchConfig:
    """What only `subspec bench` takes."""

    limit: int | None = _setting(None, _whole(1), "Questions to run, over all categories.", "N", "all")
    max_new_tokens: int = _setting(128, _whole(1), "Longest answer of each turn.", "N", letter="n")
    plain_tokens: int | None = _setting(
        None, _whole(1), "Longest answer of the plain arm, the slow one.", "K", "as --max-new-tokens"
    )
    repeat: int = _setting(1, _whole(1), "Times to ask every question; figures are medians.", "N")
    questions: str | None = _setting(None, _NAME, "The suite's questions from a local file.", "FILE")
    """None takes the suite's own."""
    resume: str | None = _setting(None, _NAME, "Continue an interrupted record, which is updated.", "FILE")
    peer: str | None = _setting(
        None,
        _choice("accelerate"),
        "Measure the library's own offload beside, in the same budget.",
        "accelerate",
    )
    plot: str | None = _setting(None, _NAME, "Draw the figures as FILE.png or FILE.svg.", "FILE")


@dataclass(frozen=True)
class AuditConfig:
    """What only `subspec audit` takes."""

    tokens: int = _setting(24, _whole(1), "Longest answer.", "N")
    limit: int | None = _setting(None, _whole(1), "Questions to answer, over all categories.", "N", "all")
    questions: str | None = _setting(
        None, _NAME, "Questions from a local JSON lines file, as MT-Bench's.", "FILE", "the shipped sample"
    )
    """None takes the shipped sample."""


def _panel(title: str) -> dict[str, str]:
    return {"panel": title}


@dataclass(frozen=True)
class Config:
    """All settings, resolved. A field is a section of the file; its panel is the heading in `--help`."""

    model: ModelConfig = ModelConfig()
    memory: MemoryConfig = field(default=MemoryConfig(), metadata=_panel("Memory and device"))
    draft: DraftConfig = field(default=DraftConfig(), metadata=_panel("Speculation"))
    sampling: SamplingConfig = field(default=SamplingConfig(), metadata=_panel("Sampling"))
    substitute: SubstituteConfig = SubstituteConfig()
    run: RunConfig = RunConfig()
    bench: BenchConfig = BenchConfig()
    audit: AuditConfig = AuditConfig()

    def as_dict(self) -> dict[str, Any]:
        """Sections of plain values by key, for JSON."""
        values = {
            section: {
                setting.key: getattr(getattr(self, section), name)
                for name, setting in settings_of(section_type).items()
            }
            for section, section_type in SECTIONS.items()
        }
        values["run"]["stop"] = list(self.run.stop)
        values["substitute"]["overrides"] = dict(self.substitute.overrides)
        values["sampling"]["logit_bias"] = dict(self.sampling.logit_bias)
        return values


SECTIONS: Final[dict[str, type[Any]]] = {
    entry.name: type(entry.default) for entry in dataclasses.fields(Config)
}


def settings_of(section: type[Any]) -> dict[str, Setting]:
    """The settings of a section by field name."""
    entries = [entry for entry in dataclasses.fields(section) if "setting" in entry.metadata]
    found = {entry.name: entry.metadata["setting"] for entry in entries}
    return {name: setting._replace(key=setting.key or name) for name, setting in found.items()}


def flag_of(key: str) -> str:
    """The flag of a key: vram_gb has --vram-gb."""
    return f"--{key.replace('_', '-')}"
