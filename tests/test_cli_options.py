"""Options from settings: each is in the help, each reaches its setting, and completion offers them."""

import re
from typing import Annotated, get_args

import pytest
import typer
from test_cli_boundary import HEAVY, run_python

from subspec_cli.__main__ import main
from subspec_cli.bench.sources import Suite
from subspec_cli.cli.app import app as whole_app
from subspec_cli.cli.completion import complete_model
from subspec_cli.cli.options import with_settings
from subspec_cli.config import (
    SECTIONS,
    BenchConfig,
    DraftConfig,
    MemoryConfig,
    ModelConfig,
    flag_of,
    settings_of,
)

COMMANDS = {
    "model": "run",
    "substitute": "prepare",
    "bench": "bench",
    "audit": "audit",
    "batch": "batch",
    "serve": "serve",
}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_is_in_the_help(capsys, monkeypatch, section):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([COMMANDS.get(section, "run"), "--help"]) == 0
    rows = capsys.readouterr().out.splitlines()
    settings = settings_of(SECTIONS[section]).values()
    for setting in settings:
        (row,) = [row for row in rows if re.match(rf"│ {flag_of(setting.key)}\b(?!-)", row)] or [""]
        assert bool(row) == bool(setting.help), setting.key
        # Markup is rendered, and a long line may be folded.
        assert setting.help.split("[")[0][:60] in row
        assert setting.metavar in row
    assert any(setting.help for setting in settings)


def invoke(command, *argv):
    app = typer.Typer()
    app.command()(command)
    app.callback()(lambda: None)
    parser = typer.main.get_command(app)
    with parser.make_context("test", [command.__name__, *map(str, argv)]) as context:
        parser.invoke(context)


def test_a_command_gets_what_flag_and_file_say(tmp_path):
    seen = []

    @with_settings(BenchConfig, "out", ModelConfig, MemoryConfig, without=("model.bits", "memory.reprobe"))
    def measure(
        settings,
        model: Annotated[str | None, typer.Argument()] = None,
        out: Annotated[str, typer.Option("--out")] = "-",
        quick: bool = False,
    ):
        seen.append((settings, model, out, quick))

    file = tmp_path / "settings.toml"
    file.write_text("[memory]\nvram_gb = 3\ncontext = 99\nreprobe = true\n[draft]\ndepth = 7\n")
    invoke(measure, "m/x", "--memory-gb", "2048MiB", "--limit", 5, "--quick", "--config", file)
    ((settings, model, out, quick),) = seen
    assert (model, out, quick, settings.file) == ("m/x", "-", True, file)
    assert settings.config.memory == MemoryConfig(memory_gib=2.0, context=99, reprobe=True)
    # A parameter of the command stands for the setting of its name, and a section without options is read too.
    assert settings.config.model == ModelConfig(model="m/x")
    assert settings.config.draft == DraftConfig(depth=7)
    assert settings.config.bench == BenchConfig(limit=5)
    assert settings.flags["memory"]["memory_gb"] == 2.0
    assert settings.flags["memory"]["vram_gb"] is None
    assert {"bits", "reprobe"}.isdisjoint(settings.flags["model"].keys() | settings.flags["memory"].keys())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("subspec run --me", ["--memory-gb"]),
        ("subspec run --no-sh", ["--no-shadow"]),
        ("subspec bench --max", ["--max-new-tokens"]),
        ("subspec bench ", [*get_args(Suite), "compare", "plot"]),
        ("subspec prepare demo --optimizer ", ["minmax", "hqq"]),
        ("subspec pl", ["plan"]),
        ("subspec run -m d", ["demo"]),
        ("subspec prepare d", ["demo"]),
    ],
)
def test_completion_is_answered_in_light(tmp_path, words, expected):
    words_before = str(words.count(" "))
    code = f"""
import os, sys
os.environ |= {{"_SUBSPEC_COMPLETE": "complete_bash", "COMP_WORDS": {words!r}, "COMP_CWORD": {words_before!r}}}
from subspec_cli.__main__ import main
status = main([])
assert not set({HEAVY!r}) & sys.modules.keys()
sys.exit(status)
"""
    result = run_python(code, cwd=tmp_path)
    assert (result.returncode, result.stdout.split(), result.stderr) == (0, expected, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_asks_this_program(capsys, shell):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"_SUBSPEC_COMPLETE=complete_{shell}" in script
    assert script.startswith({"bash": "_subspec", "zsh": "#compdef subspec", "fish": "complete"}[shell])
    assert main(["completion", "tcsh"]) == 2


def test_names_of_prepared_models_are_completed(monkeypatch):
    ids = ["/data/tiny-chat", "Qwen/Qwen2.5-7B", "demo"]
    monkeypatch.setattr("subspec_cli.substitutes.prepared_names.prepared_ids", lambda: ids)
    assert complete_model("") == ["demo", "tiny-chat", "Qwen/Qwen2.5-7B"]
    assert complete_model("t") == ["tiny-chat"]
    assert complete_model("/da") == ["/data/tiny-chat"]
    assert complete_model("Qwen/") == ["Qwen/Qwen2.5-7B"]


def flags_of(command, name="subspec"):
    """Every flag of a command and of those below it, with how often it is declared."""
    declared = [flag for option in command.params for flag in (*option.opts, *option.secondary_opts)]
    yield name, [flag for flag in declared if flag.startswith("-")]
    for below, child in getattr(command, "commands", {}).items():
        yield from flags_of(child, f"{name} {below}")


def test_no_flag_is_declared_twice():
    """Else one of the two settings never hears of it, as a setting and its negation in two sections."""
    found = dict(flags_of(typer.main.get_command(whole_app)))
    assert len(found) > 10
    for name, flags in found.items():
        assert sorted(flags) == sorted(set(flags)), name
