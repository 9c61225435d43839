"""Settings: what each one means, the values it takes, and where it is read from. No torch.

One field definition holds default, range and meaning for flag and TOML key alike; a flag wins over the file,
the file over the default. A key is the flag's name with underscores.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import tomli

from subspec_cli.errors import UsageError

LOCAL_CONFIG = "subspec.toml"
_MAX_CONFIG_BYTES = 1 << 20


class _Rule(NamedTuple):
    """The values a setting takes, and the words for them in messages."""

    expected: str
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], object] = lambda value: value
    has_flag: bool = True


def _setting(default: object, rule: _Rule, key: str = "") -> Any:  # noqa: ANN401 - `field` has its default's type
    return field(default=default, metadata={"rule": rule, "key": key})


def _whole(low: int, high: float = math.inf) -> _Rule:
    expected = (
        f"a whole number of at least {low}" if high == math.inf else f"a whole number from {low} to {high}"
    )
    return _Rule(expected, lambda value: type(value) is int and low <= value <= high)


def _number(expected: str, accepts: Callable[[float], bool]) -> _Rule:
    def is_accepted(value: object) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        return abs(value) < 1e300 and accepts(value)

    return _Rule(expected, is_accepted, float)


def _choice(*choices: object) -> _Rule:
    words = [str(choice) for choice in choices]
    expected = f"{', '.join(words[:-1])} or {words[-1]}"
    return _Rule(expected, lambda value: type(value) is type(choices[0]) and value in choices)


_GIB = _number("a number of GiB above 0", lambda gib: 0 < gib <= 1e6)
_SWITCH = _Rule("true or false", lambda value: isinstance(value, bool))
_TEXT = _Rule("a text", lambda value: isinstance(value, str))
_NAME = _Rule("a text that is not empty", lambda value: isinstance(value, str) and bool(value.strip()))
_TEXTS = _Rule(
    "a list of texts, none of them empty",
    lambda value: isinstance(value, list | tuple) and all(isinstance(item, str) and item for item in value),
    tuple,
)
_OVERRIDES = _Rule(
    "a table of 2, 4 or 8 bits by name pattern",
    lambda value: (
        isinstance(value, Mapping)
        and all(name.strip() and type(bits) is int and bits in (2, 4, 8) for name, bits in value.items())
    ),
    lambda value: tuple(value.items()),
    has_flag=False,
)


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and which of its prepared substitutes."""

    model: str | None = _setting(None, _NAME)
    """Hub id, local directory or `demo`; None takes the model prepared most recently."""
    revision: str | None = _setting(None, _NAME)
    """Branch, tag or commit on the hub; None takes the prepared one."""
    bits: int | None = _setting(None, _choice(2, 4, 8))
    """Bits of a substitute's weights; None takes what was prepared (`prepare` itself takes 4)."""


@dataclass(frozen=True)
class MemoryConfig:
    """What the target, its substitutes and the caches may occupy."""

    memory_gib: float | None = _setting(None, _GIB, key="vram_gb")
    """Budget in GiB: device memory on cuda, RAM on cpu; None takes what the device has to spare."""
    device: str = _setting("auto", _choice("auto", "cuda", "cpu"))
    """Where the model runs; auto takes cuda where there is one."""
    context: int | None = _setting(None, _whole(16))
    """Tokens of prompt and answer together; None takes min(the model's, 4096, what the plan holds)."""
    ram_gb: float | None = _setting(None, _GIB)
    """Host memory in GiB that the process may take beside a GPU's, or in all on cpu; layers that do not fit are
    read from disk. None takes what is free."""
    resident_layers: int | None = _setting(None, _whole(0))
    """Target layers kept in device memory; 0 streams every layer, None lets the plan decide."""
    reprobe: bool = _setting(False, _SWITCH)
    """Time this machine's link and kernels anew, in place of what was kept."""


@dataclass(frozen=True)
class DraftConfig:
    """The shape of the draft tree; None lets measured times decide."""

    depth: int | None = _setting(None, _whole(1, 64))
    """Draft tokens proposed one after another before the target checks them."""
    width: int | None = _setting(None, _whole(1, 8))
    """Alternatives kept side by side at each depth; 1 is a chain."""
    no_shadow: bool = _setting(False, _SWITCH)
    """Draft only between passes, not while a pass waits for weights."""
    no_speculation: bool = _setting(False, _SWITCH)
    """Decode plainly: one target pass for each token."""


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is chosen from the target's logits."""

    temperature: float = _setting(0.0, _number("a number of at least 0", lambda value: value >= 0))
    """0 takes the most likely token."""
    top_p: float = _setting(1.0, _number("a number above 0 and at most 1", lambda value: 0 < value <= 1))
    """Sample among the most likely tokens that together hold this probability."""
    top_k: int = _setting(0, _whole(0))
    """Sample among this many most likely tokens; 0 takes all."""
    seed: int | None = _setting(None, _whole(0, 2**63 - 1))
    """Same seed, same answer; None draws a fresh one, which is shown."""

    @property
    def is_greedy(self) -> bool:
        """Whether no chance is involved."""
        return self.temperature == 0


@dataclass(frozen=True)
class SubstituteConfig:
    """How `prepare` quantizes; `run` takes what was prepared."""

    bits: int | None = _setting(None, _choice(2, 4, 8))
    """Bits of a weight; None takes those of [model], or 4."""
    optimizer: str = _setting("minmax", _choice("minmax", "hqq"))
    """How scales are found: from the extremes, or by searching for the smallest error."""
    overrides: tuple[tuple[str, int], ...] = _setting((), _OVERRIDES)
    """Other bits for the matrices whose name inside the layer (`mlp.down_proj`) a pattern matches, the first
    that does."""


@dataclass(frozen=True)
class RunSection:
    """`subspec run`."""

    max_new_tokens: int = _setting(512, _whole(1))
    """Longest answer."""
    system: str | None = _setting(None, _TEXT)
    """System message of the chat template; None leaves it to the template."""
    stop: tuple[str, ...] = _setting((), _TEXTS)
    """Texts that end the answer; they are not part of it."""
    raw: bool = _setting(False, _SWITCH)
    """Complete the bare prompt, without the chat template."""
    plain: bool = _setting(False, _SWITCH)
    """No live statistics and no colours, also on a terminal."""


@dataclass(frozen=True)
class BenchSection:
    """`subspec bench`."""

    limit: int | None = _setting(None, _whole(1))
    """Questions to run, spread over the suite's categories; None runs all."""
    max_new_tokens: int = _setting(128, _whole(1))
    """Longest answer of each turn."""
    plain_tokens: int | None = _setting(None, _whole(1))
    """Longest answer of the plain arm, which is the slow one; None takes max_new_tokens."""
    questions: str | None = _setting(None, _NAME)
    """Local JSON lines file with the questions, in place of a download."""


@dataclass(frozen=True)
class Config:
    """Everything a run needs to know, resolved."""

    model: ModelConfig = ModelConfig()
    memory: MemoryConfig = MemoryConfig()
    draft: DraftConfig = DraftConfig()
    sampling: SamplingConfig = SamplingConfig()
    substitute: SubstituteConfig = SubstituteConfig()
    run: RunSection = RunSection()
    bench: BenchSection = BenchSection()

    def as_dict(self) -> dict[str, Any]:
        """Sections of plain values, for JSON."""
        values = {
            section: {key: getattr(getattr(self, section), name) for key, name in _names(section).items()}
            for section in _SECTIONS
        }
        values["run"]["stop"] = list(self.run.stop)
        values["substitute"]["overrides"] = dict(self.substitute.overrides)
        return values


_SECTIONS: dict[str, type[Any]] = {entry.name: type(entry.default) for entry in dataclasses.fields(Config)}
_ALIASES = {"memory": {"memory_gb": "vram_gb"}}


def _rules(section: str) -> dict[str, _Rule]:
    """The rule of each key."""
    return {_key(entry): entry.metadata["rule"] for entry in dataclasses.fields(_SECTIONS[section])}


def _names(section: str) -> dict[str, str]:
    """The field of each key."""
    return {_key(entry): entry.name for entry in dataclasses.fields(_SECTIONS[section])}


def _key(entry: dataclasses.Field[Any]) -> str:
    """A setting's name in files, flags and records."""
    return entry.metadata["key"] or entry.name


def resolve_config(flags: Mapping[str, Mapping[str, object]], file: Path | None = None) -> Config:
    """Settings from `flags` (by section; None means not given), then `file`, then the defaults."""
    from_file = read_config_file(file) if file is not None else {}
    sections = {}
    for section, section_type in _SECTIONS.items():
        given = {key: value for key, value in flags.get(section, {}).items() if value is not None}
        from_flags = _read_section(section, given, path=None)
        names, found = _names(section), {**from_file.get(section, {}), **from_flags}
        sections[section] = section_type(**{names[key]: value for key, value in found.items()})
    return Config(**sections)


def find_config_file(explicit: str | None) -> Path | None:
    """The file to read: `explicit`, else subspec.toml here, else the user's own; None when there is none."""
    if explicit is not None:
        return Path(explicit)
    return next((path for path in (Path(LOCAL_CONFIG), user_config_file()) if path.is_file()), None)


def user_config_file() -> Path:
    """Where the user's own settings lie on this platform."""
    folder = os.environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(folder):  # the XDG rule: a relative value is no value
        usual = {"darwin": "~/Library/Application Support", "win32": "~/AppData/Roaming"}
        folder = os.path.expanduser(usual.get(sys.platform, "~/.config"))
    return Path(folder) / "subspec" / "config.toml"


def read_config_file(path: Path) -> dict[str, dict[str, object]]:
    """Checked values of a TOML file, by section."""
    document = _parse(path)
    return {section: _read_section(section, table, path) for section, table in _tables(document, path)}


def _parse(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_CONFIG_BYTES + 1)
        if len(content) > _MAX_CONFIG_BYTES:
            raise UsageError(f"{path}: larger than 1 MiB, which is no settings file")
        return tomli.loads(content.decode("utf-8-sig"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"config file {path}: {reason}", "--config names a TOML file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}", "save the file as UTF-8") from error
    except tomli.TOMLDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UsageError(f"{path}: bad TOML at {place}: {error.msg}") from error
    except RecursionError as error:
        raise UsageError(f"{path}: bad TOML: nested too deeply") from error


def _tables(document: dict[str, Any], path: Path) -> list[tuple[str, dict[str, object]]]:
    for name, table in document.items():
        if name not in _SECTIONS and isinstance(table, dict):
            raise UsageError(f"{path}: unknown section [{name}]", _nearest(name, list(_SECTIONS), "sections"))
        if name not in _SECTIONS:
            raise UsageError(f"{path}: {name} = {_shown(table)} stands outside any section", _home_of(name))
        if not isinstance(table, dict):
            place = f"{path}: {name} = {_shown(table)}"
            raise UsageError(f"{place} must be a section", f"write [{name}] on a line of its own")
    return list(document.items())


def _read_section(section: str, table: Mapping[str, object], path: Path | None) -> dict[str, object]:
    """Checked and converted values; `path` is None for flags."""
    rules, aliases = _rules(section), _ALIASES.get(section, {})
    values: dict[str, object] = {}
    for name, value in table.items():
        key = name.replace("-", "_")
        flag = f"--{key.replace('_', '-')}"
        place = flag if path is None else f"{path}: {section}.{name} = {_shown(value)}"
        target = aliases.get(key, key)
        if target not in rules:
            raise UsageError(f"{place}: unknown key", _home_of(key, section))
        if target in values:
            raise UsageError(f"{place}: given twice", _same_thing(target, aliases))
        rule = rules[target]
        if not rule.accepts(value):
            found = f", not {_shown(value)}" if path is None else ""
            hint = f"the same as the flag {flag}" if path is not None and rule.has_flag else ""
            raise UsageError(f"{place} must be {rule.expected}{found}", hint)
        values[target] = rule.convert(value)
    return values


def _same_thing(key: str, aliases: Mapping[str, str]) -> str:
    names = [key, *(alias for alias, name in aliases.items() if name == key)]
    return f"{' and '.join('--' + name.replace('_', '-') for name in names)} say the same thing; give one"


def _home_of(key: str, section: str | None = None) -> str:
    """Where a misplaced or misspelt key belongs."""
    key = key.replace("-", "_")
    for other in _SECTIONS:
        if key in _rules(other) or key in _ALIASES.get(other, {}):
            return f"{key} belongs in [{other}]"
    if section is not None:
        return _nearest(key, list(_rules(section)), f"keys of [{section}]")
    return _nearest(key, [key for name in _SECTIONS for key in _rules(name)], "keys")


def _nearest(word: str, choices: list[str], what: str) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    suggestion = f"did you mean {close[0]}? " if close else ""
    return f"{suggestion}{what}: {' '.join(choices)}"


def _shown(value: object) -> str:
    """A value as TOML and the shell write it, shortened."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
