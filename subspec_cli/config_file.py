"""Read settings: a flag wins over the TOML file, the file over the default."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import tomli

from subspec_cli.config import SECTIONS, Config, flag_of, settings_of
from subspec_cli.errors import UsageError
from subspec_cli.setting_rules import Setting

LOCAL_CONFIG: Final = "subspec.toml"
_MAX_CONFIG_BYTES: Final = 1 << 20


def resolve_config(flags: Mapping[str, Mapping[str, object]], file: Path | None = None) -> Config:
    """Resolve settings from `flags` (by section and key; None means not given), then `file`, then the defaults."""
    from_file = read_config_file(file) if file is not None else {}
    sections: dict[str, dict[str, Any]] = {}
    for section in SECTIONS:
        given = {key: value for key, value in flags.get(section, {}).items() if value is not None}
        from_flags = _read_section(section, given, path=None)
        sections[section] = {**from_file.get(section, {}), **from_flags}
    sections["sampling"]["given"] = frozenset(sections["sampling"])
    return Config(
        **{section: section_type(**sections[section]) for section, section_type in SECTIONS.items()}
    )


def with_setting(config: Config, section: str, key: str, value: object) -> Config:
    """The settings with one more value; raises UsageError if the setting does not take it."""
    values = _read_section(section, {key: value}, path=None)
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def find_config_file(explicit: str | None) -> Path | None:
    """The file to read: `explicit`, else subspec.toml here, else the user's own; None when there is none."""
    if explicit is not None:
        return Path(explicit)
    # Path.is_file raises where HOME is a directory that may not be read.
    return next((path for path in (Path(LOCAL_CONFIG), user_config_file()) if os.path.isfile(path)), None)


def user_config_file() -> Path:
    """Path of the user's own settings on this platform."""
    folder = os.environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(folder):  # XDG says to ignore a relative path
        usual = {"darwin": "~/Library/Application Support", "win32": "~/AppData/Roaming"}
        folder = os.path.expanduser(usual.get(sys.platform, "~/.config"))
    return Path(folder) / "subspec" / "config.toml"


def read_config_file(path: Path) -> dict[str, dict[str, object]]:
    """Read a TOML file; checked values by section and field name."""
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
        if name not in SECTIONS and isinstance(table, dict):
            raise UsageError(f"{path}: unknown section [{name}]", _nearest(name, list(SECTIONS), "sections"))
        if name not in SECTIONS:
            raise UsageError(f"{path}: {name} = {_shown(table)} stands outside any section", _home_of(name))
        if not isinstance(table, dict):
            place = f"{path}: {name} = {_shown(table)}"
            raise UsageError(f"{place} must be a section", f"write [{name}] on a line of its own")
    return list(document.items())


def _read_section(section: str, table: Mapping[str, object], path: Path | None) -> dict[str, object]:
    """Checked and converted values by field name; `path` is None for flags."""
    fields = _fields(section)
    values: dict[str, object] = {}
    for given, value in table.items():
        key = given.replace("-", "_")
        place = flag_of(key) if path is None else f"{path}: {section}.{given} = {_shown(value)}"
        if key not in fields:
            raise UsageError(f"{place}: unknown key", _home_of(key, section))
        name, setting = fields[key]
        if name in values:
            names = " and ".join(flag_of(one) for one in (setting.key, setting.alias) if one)
            raise UsageError(f"{place}: given twice", f"{names} say the same thing; give one")
        if not setting.rule.accepts(value):
            found = f", not {_shown(value)}" if path is None else ""
            hint = f"the same as the flag {flag_of(key)}" if path is not None and setting.help else ""
            raise UsageError(f"{place} must be {setting.rule.expected}{found}", hint)
        values[name] = setting.rule.convert(value)
    return values


def _fields(section: str) -> dict[str, tuple[str, Setting]]:
    """Field name and setting by key and alias."""
    settings = settings_of(SECTIONS[section])
    keys = {setting.key: (name, setting) for name, setting in settings.items()}
    return keys | {setting.alias: (name, setting) for name, setting in settings.items() if setting.alias}


def _keys(section: str) -> list[str]:
    return [setting.key for setting in settings_of(SECTIONS[section]).values()]


def _home_of(key: str, section: str | None = None) -> str:
    """A hint: the section of a misplaced key, else the nearest key."""
    key = key.replace("-", "_")
    for other in SECTIONS:
        if key in _fields(other):
            return f"{key} belongs in [{other}]"
    if section is not None:
        return _nearest(key, _keys(section), f"keys of [{section}]")
    return _nearest(key, [key for name in SECTIONS for key in _keys(name)], "keys")


def _nearest(word: str, choices: list[str], what: str) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    suggestion = f"did you mean {close[0]}? " if close else ""
    return f"{suggestion}{what}: {' '.join(choices)}"


def _shown(value: object) -> str:
    """A value as in TOML, shortened."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
