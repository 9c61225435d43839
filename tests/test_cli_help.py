"""Help: examples that can be run, and the words on the screen."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from subspec_cli.__main__ import main
from subspec_cli.cli.help import EXAMPLES

GROUPS = {
    "list": "models",
    "path": "models",
    "verify": "models",
    "remove": "models",
    "init": "config",
    "show": "config",
}
NOT_YET = {"chat"}
"""Commands that may be absent."""


def help_of(capsys, *words):
    assert main([*words, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - NOT_YET))
def test_every_help_has_examples_with_its_own_flags(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "200")
    command = [GROUPS[name], name] if name in GROUPS else [name]
    text = help_of(capsys, *command)
    assert "Examples:" in text
    for example in EXAMPLES[name]:
        assert example in text
        words = shlex.split(example.partition("subspec ")[2].rstrip(')"') if "$(" in example else example)
        words = words[words.index("subspec") + 1 :] if "subspec" in words else words
        words = words[: words.index("|")] if "|" in words else words
        assert words[: len(command)] == command or name == "path"
        flags = [word for word in words if re.fullmatch(r"-[a-z]|--[a-z-]+", word)]
        assert [
            flag for flag in flags if not re.search(rf"(?<![\w-]){flag}\b", text.partition("Examples:")[0])
        ] == []


def test_short_flags_are_the_long_ones(capsys):
    assert main(["run", "-m", "org/absent", "-s", "x", "-t", "0.5", "-n", "3", "hi"]) == 2
    assert "org/absent is not prepared" in capsys.readouterr().err
    assert main(["run", "-t", "-1", "hi"]) == 2
    assert "--temperature must be a number of at least 0" in capsys.readouterr().err


def test_the_words_on_the_screen_are_explained(capsys):
    assert main(["help", "terms"]) == 0
    text = capsys.readouterr().out
    for word in ["tau", "pass", "step", "shadow", "slot", "substitute", "survival", "exact", "numeric"]:
        assert re.search(rf"^(?:\S.*)?\b{word}\b.*: ", text, re.MULTILINE), word
    assert "**" not in text
    assert "Pareto" not in text
    assert max(map(len, text.splitlines())) <= 88
    assert main(["help"]) == 0
    assert "Usage: subspec" in capsys.readouterr().out


def test_help_on_a_narrow_terminal_has_no_boxes_and_no_markup():
    code = "import sys; from subspec_cli.__main__ import main; sys.exit(main(['run', '--help']))"
    narrow, wide = (
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"COLUMNS": columns},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for columns in ("40", "100")
    )
    assert "╭" in wide
    assert "╭" not in narrow
    assert "[bold" not in narrow
    assert max(map(len, narrow.splitlines())) <= 52
