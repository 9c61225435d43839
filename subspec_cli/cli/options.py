"""Make command-line options from the settings in `subspec_cli.config`.

An option that is not given is None: the config file, then the default, decide. `config_file` checks the ranges.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from inspect import Parameter
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union

import typer

from subspec_cli.cli.bias_file import read_bias_file
from subspec_cli.cli.completion import complete_model
from subspec_cli.config import Config, ModelConfig, flag_of, settings_of
from subspec_cli.config_file import find_config_file, resolve_config
from subspec_cli.setting_rules import AUTO, BIASES, BUDGET, SIZE, Setting
from subspec_cli.units import SIZE_WORDS, parse_size_gib

DebugOpt = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]
ConfigOpt = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="TOML settings; flags win over them.",
        show_default="subspec.toml, else the user's config.toml",
    ),
]
FilesOpt = Annotated[
    list[Path] | None,
    typer.Option(
        "--file",
        "-f",
        metavar="PATH",
        help="Text file to ask about, under its name; may be given several times.",
        show_default=False,
    ),
]
SystemFileOpt = Annotated[
    Path | None,
    typer.Option(
        "--system-file", metavar="PATH", help="Read the system message from a text file.", show_default=False
    ),
]
FollowLinksOpt = Annotated[
    bool,
    typer.Option("--follow-links", help="Read files outside MODEL's directory that links in it lead to."),
]
_CONFIG = Parameter("config_file", Parameter.KEYWORD_ONLY, default=None, annotation=ConfigOpt)
_DEBUG = Parameter("_debug", Parameter.KEYWORD_ONLY, default=False, annotation=DebugOpt)


class Settings(NamedTuple):
    """The resolved settings that `with_settings` passes to a command."""

    config: Config
    file: Path | None
    """The config file that was read."""
    flags: Mapping[str, Mapping[str, Any]]
    """Values from the command line, by section and key; None is not given."""


def with_settings(
    *places: type[Any] | str, without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options of config sections to a command, which takes the resolved `Settings` first.

    `places` is the order in `--help`: a section class stands for its options (those of [model] are followed by
    `--config`), a string for the command's own parameter of that name; its other parameters come last. A parameter
    of the command that has the name of a setting replaces the setting's option. Settings in `without`, such as
    `memory.reprobe`, get no option.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = dict(list(inspect.signature(command, eval_str=True).parameters.items())[1:])
        parameters: dict[str, Parameter] = {}
        keys: dict[str, list[str]] = {}
        for place in places:
            if isinstance(place, str):
                parameters[place] = own[place]
                continue
            section = next(entry for entry in dataclasses.fields(Config) if type(entry.default) is place)
            options = {option.name: option for option in _options(section, without)}
            keys[section.name] = list(options)
            parameters |= {key: own.get(key, option) for key, option in options.items()}
            if place is ModelConfig:
                parameters["config_file"] = _CONFIG
        parameters |= {**own, "_debug": _DEBUG}

        @functools.wraps(command)
        def run_command(**values: Any) -> None:  # noqa: ANN401 - of any type, from the parser
            # A list option that was not given is an empty list.
            given = {name: None if value == [] else value for name, value in values.items()}
            flags = {section: {key: given[key] for key in names} for section, names in keys.items()}
            file = find_config_file(given["config_file"])
            settings = Settings(resolve_config(flags, file), file, flags)
            command(settings, **{name: values[name] for name in own})

        shown = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in parameters.values()]
        run_command.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        run_command.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
        return run_command

    return decorate


def number(text: str) -> float:
    """A number, or an error that shows what was written."""
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a number") from error


def size(text: str) -> float:
    """GiB of a size, or an error that shows what was written."""
    try:
        return parse_size_gib(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not {SIZE_WORDS}") from error


def budget(text: str) -> float | str:
    """GiB of a size, or `auto`; an error shows what was written."""
    return AUTO if text.strip().lower() == AUTO else size(text)


def whole(text: str) -> int:
    """A whole number, or an error that shows what was written."""
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a whole number") from error


def _options(section: dataclasses.Field[Any], without: Collection[str]) -> Iterator[Parameter]:
    """A parameter for each flag of a section, named by its key."""
    defaults, kinds = section.default, typing.get_type_hints(type(section.default))
    panel = section.metadata.get("panel")
    for name, setting in settings_of(type(defaults)).items():
        if setting.help and f"{section.name}.{setting.key}" not in without:
            shown = _shown_default(getattr(defaults, name), setting)
            yield _option(setting.key, kinds[name], setting, show_default=shown, rich_help_panel=panel)
            if setting.alias:
                same = setting._replace(help=f"The same as {flag_of(setting.key)}.")
                yield _option(setting.alias, kinds[name], same, show_default=shown, rich_help_panel=panel)


def _option(key: str, kind: Any, setting: Setting, **shown: Any) -> Parameter:  # noqa: ANN401 - typer's
    """One option. `kind` is the field's type: an optional value, a switch, a choice, texts or a file's content."""
    if typing.get_origin(kind) in (UnionType, Union):
        kind = typing.get_args(kind)[0]
    parsers: dict[Any, Callable[[str], Any]] = {float: number, int: whole}
    parser = size if setting.rule is SIZE else parsers.get(kind)
    if setting.rule is BIASES:
        kind, parser = dict[str, Any], read_bias_file
    if typing.get_origin(kind) is tuple:
        kind = list[str]
    if setting.rule is BUDGET:
        parser = budget
    names = [f"{flag_of(key)}/{flag_of(_inverse(key))}" if kind is bool else flag_of(key)]
    if setting.letter and key == setting.key:
        names.append(f"-{setting.letter}")
    metavar = setting.metavar or None
    if key == "model":
        shown["autocompletion"] = complete_model
    option = typer.Option(None, *names, help=setting.help, metavar=metavar, parser=parser, **shown)
    return Parameter(key, Parameter.KEYWORD_ONLY, default=option, annotation=kind | None)


def _inverse(key: str) -> str:
    """The switch that overrides a file's `true`: raw and no_raw, no_shadow and shadow."""
    return key.removeprefix("no_") if key.startswith("no_") else f"no_{key}"


def _shown_default(default: object, setting: Setting) -> str | bool:
    if setting.shown_default or isinstance(default, bool) or not isinstance(default, int | float | str):
        return setting.shown_default or False
    return f"{default:g}" if isinstance(default, float) else str(default)
