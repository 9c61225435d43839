"""`subspec config`: what it writes can be read, and what it shows is in force."""

import json

import pytest
import tomli

from subspec_cli.__main__ import main
from subspec_cli.config import Config
from subspec_cli.config_file import read_config_file, resolve_config, user_config_file
from subspec_cli.errors import ExitCode


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    return folder


def test_the_written_file_has_every_setting_and_changes_none(capsys, here):
    assert main(["config", "init"]) == 0
    file = here / "subspec.toml"
    assert capsys.readouterr().out == f"{file}\n"
    assert resolve_config({}, file) == Config()
    text = file.read_text()
    assert "[bold]" not in text
    # Without the marks before keys it sets every default.
    usable = "\n".join(
        line.removeprefix("#") for line in text.splitlines() if line[:2] != "# " and not line.endswith("=")
    )
    assert set(tomli.loads(usable)) == set(Config().as_dict())
    (here / "all.toml").write_text(usable)
    assert resolve_config({}, here / "all.toml") == Config()


def test_a_file_that_exists_is_left_as_it_is(capsys, here):
    (here / "subspec.toml").write_text("# mine\n")
    assert main(["config", "init"]) == ExitCode.USAGE
    assert "subspec.toml exists" in capsys.readouterr().err
    assert (here / "subspec.toml").read_text() == "# mine\n"
    assert main(["config", "init", "--user", "--preset", "laptop-cpu"]) == 0
    assert read_config_file(user_config_file())["memory"]["memory_gib"] == 1.5
    assert main(["config", "init", "--user", "--preset", "laptop"]) == ExitCode.USAGE
    assert "presets: demo laptop-cpu qwen2.5-14b-12gb" in capsys.readouterr().err


def test_settings_are_shown_with_their_origin(capsys, here):
    text = '[memory]\nvram_gb = "500MiB"\n[run]\nstop = ["é"]\n[substitute.overrides]\n"*.down_proj" = 8\n'
    text += "[sampling.logit_bias]\n65 = -4.0\n"
    (here / "subspec.toml").write_text(text)
    assert main(["config", "show"]) == 0
    shown = capsys.readouterr().out
    assert "vram_gb = 0.48828125  # subspec.toml\n" in shown
    assert "temperature = 0.0  # default\n" in shown
    assert "# model: the model used last\n" in shown
    (here / "again.toml").write_text(shown)
    assert resolve_config({}, here / "again.toml") == resolve_config({}, here / "subspec.toml")
    assert main(["config", "show", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file"] == str(here / "subspec.toml")
    assert found["from_file"]["memory"] == ["vram_gb"]
    assert found["settings"]["run"]["stop"] == ["é"]


def test_the_places_are_named_in_the_order_of_search(capsys, here):
    for state in ("absent", "read"):
        assert main(["config", "path"]) == 0
        assert capsys.readouterr().out == f"{here / 'subspec.toml'}\t{state}\n{user_config_file()}\tabsent\n"
        (here / "subspec.toml").touch()
