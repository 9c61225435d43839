"""`subspec config`: write a settings file, show the settings in force, and where they are read from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from subspec_cli.cli.options import ConfigOpt, DebugOpt, JsonOpt
from subspec_cli.config import SECTIONS, Config, settings_of
from subspec_cli.config_file import (
    LOCAL_CONFIG,
    find_config_file,
    read_config_file,
    resolve_config,
    user_config_file,
)
from subspec_cli.errors import UsageError
from subspec_cli.files.io_errors import write_error

PRESETS: Final = Path(__file__).parent.parent / "presets"

configuration = typer.Typer(name="config", help="Write, show and find the settings file.")

PresetOpt = Annotated[
    str | None,
    typer.Option(
        "--preset", metavar="NAME", help="Begin with a preset, such as laptop-cpu; a wrong name lists all."
    ),
]
UserOpt = Annotated[
    bool, typer.Option("--user", help="Write the user's own file, not subspec.toml in this directory.")
]


@configuration.command()
def init(preset: PresetOpt = None, user: UserOpt = False, _debug: DebugOpt = False) -> None:
    """Write a commented settings file; one that exists is left as it is."""
    from subspec_cli.cli.output import Output

    text = commented_settings() if preset is None else preset_text(preset)
    path = user_config_file() if user else Path(LOCAL_CONFIG).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UsageError(
            f"{path} exists", "edit it, or move it away; subspec config show shows it"
        ) from error
    except OSError as error:
        raise write_error(error, path) from error
    Output().result(str(path))


@configuration.command()
def show(config_file: ConfigOpt = None, as_json: JsonOpt = False, _debug: DebugOpt = False) -> None:
    """Show every setting that a command without flags takes, and where it comes from."""
    from subspec_cli.cli.output import Output

    file = find_config_file(config_file)
    given = read_config_file(file) if file is not None else {}
    config, output = resolve_config({}, file), Output()
    if as_json:
        document = {
            "file": None if file is None else file.absolute(),
            "settings": config.as_dict(),
            "from_file": {section: _keys_of(section, set(given.get(section, {}))) for section in SECTIONS},
        }
        output.document(document)
    else:
        output.result("\n".join(effective_lines(config, given, file)))


@configuration.command()
def path(as_json: JsonOpt = False, _debug: DebugOpt = False) -> None:
    """Write the places of settings files, in the order of their search; only the first that exists is read."""
    from subspec_cli.cli.output import Output

    output, read = Output(), find_config_file(None)
    places = [Path(LOCAL_CONFIG), user_config_file()]
    states = [
        "read" if place == read else "not read" if os.path.exists(place) else "absent" for place in places
    ]
    if as_json:
        output.document({str(place.absolute()): state for place, state in zip(places, states, strict=True)})
    else:
        output.tab_separated(
            [(str(place.absolute()), state) for place, state in zip(places, states, strict=True)]
        )


def preset_text(name: str) -> str:
    """The text of a preset; raises UsageError, which lists all, if there is none of this name."""
    names = sorted(file.stem for file in PRESETS.glob("*.toml"))
    if name not in names:
        raise UsageError(f"no preset is called {name}", f"presets: {' '.join(names)}")
    return (PRESETS / f"{name}.toml").read_text(encoding="utf-8")


def commented_settings() -> str:
    """A settings file in which every setting is a comment, with its help and its default."""
    defaults = Config().as_dict()
    lines = ["# Settings of subspec. Remove the # before a key to set it; a flag wins over this file."]
    for section, section_type in SECTIONS.items():
        lines += ["", f"[{section}]"]
        for setting in settings_of(section_type).values():
            default = defaults[section][setting.key]
            usual = f" Default: {setting.shown_default}." if setting.shown_default else ""
            if setting.help:
                lines.append(f"# {setting.help}{usual}")
            lines.append(f"#{setting.key} = {'' if default is None else _toml(default)}".rstrip())
    return "\n".join(lines) + "\n"


def effective_lines(config: Config, given: dict[str, dict[str, object]], file: Path | None) -> list[str]:
    """The settings as TOML, each with its origin; one without a value is a comment."""
    lines: list[str] = []
    values = config.as_dict()
    for section, section_type in SECTIONS.items():
        lines += ([""] if lines else []) + [f"[{section}]"]
        for name, setting in settings_of(section_type).items():
            value = values[section][setting.key]
            origin = str(file) if name in given.get(section, {}) else "default"
            if value is None:
                lines.append(f"# {setting.key}: {setting.shown_default or 'not set'}")
            else:
                lines.append(f"{setting.key} = {_toml(value)}  # {origin}")
    return lines


def _keys_of(section: str, names: set[str]) -> list[str]:
    return [setting.key for name, setting in settings_of(SECTIONS[section]).items() if name in names]


def _toml(value: Any) -> str:  # noqa: ANN401 - of any type that a setting has
    """A value of `Config.as_dict` as TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(name)} = {_toml(item)}" for name, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
