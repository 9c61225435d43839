"""`subspec models` as a user calls it, over small prepared models."""

from __future__ import annotations

import io
import json
import os
import re
import sys

import pytest
from checkpoints import write_checkpoint
from fakes_cli import on_terminal
from fakes_store import LAYERS, Quantizer, content, resolve_model, run

from subspec_cli.__main__ import main
from subspec_cli.cli.models_table import TAB_HEADERS
from subspec_cli.errors import ExitCode
from subspec_cli.files.lock import directory_lock
from subspec_cli.substitutes.in_use import in_use, users_of
from subspec_cli.substitutes.manifest import MANIFEST_NAME, layer_file_name


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return tmp_path / "home"


@pytest.fixture
def model(tmp_path):
    return resolve_model(str(write_checkpoint(tmp_path / "model", layers=LAYERS)))


@pytest.fixture
def name(model):
    return str(model.directory)


def document(capsys):
    return json.loads(capsys.readouterr().out)


def test_list_shows_a_line_for_each_set_and_the_total(capsys, model, name):
    assert main(["models", "list"]) == 0
    assert "no model is prepared yet; subspec prepare demo" in capsys.readouterr().err
    run(model)
    with pytest.raises(KeyboardInterrupt):
        run(model, Quantizer(1), bits=4)
    assert main(["models", "list"]) == 0
    header, *rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert header == list(TAB_HEADERS)
    assert [row[0] for row in rows] == [name, name]
    assert {row[3] for row in rows} == {"complete", "partial"}
    assert {row[6] for row in rows} == {""}


@pytest.mark.parametrize(
    ("width", "missing"),
    [(40, {"revision", "target", "last", "substitutes"}), (80, {"revision", "target"}), (200, set())],
)
def test_list_fits_the_terminal(model, name, monkeypatch, width, missing):
    run(model)
    out, _ = on_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["models", "list"]) == 0
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= width
    header, _, row, total = [line for line in lines if line.strip()]
    headers = {"model", "revision", "substitutes", "state", "target", "size", "last"}
    assert headers - set(header.split()) == missing
    assert row.split()[0][-12:] == name[-12:]
    assert total.split()[0] == "all"


def test_list_as_json(capsys, model, name):
    prepared = run(model)
    assert main(["models", "list", "--json"]) == 0
    (found,) = document(capsys)["models"]
    assert (found["model"], found["revision"], found["bits"], found["optimizer"]) == (
        name,
        model.commit,
        8,
        "minmax",
    )
    assert (found["state"], found["layers"], found["last_used"]) == ("complete", LAYERS, None)
    assert found["target_bytes"] == (model.directory / "model.safetensors").stat().st_size
    assert found["directory"] == str(prepared.directory)
    (prepared.directory / MANIFEST_NAME).write_text("{")
    assert main(["models", "list", "--json"]) == 0
    (found,) = document(capsys)["models"]
    assert (found["state"], found["bits"], found["target_bytes"]) == ("unreadable", None, None)
    assert "not JSON" in found["problem"]


def test_path_is_the_directory_alone_on_stdout(capsys, model, name):
    prepared = run(model)
    assert main(["models", "path", name]) == 0
    assert capsys.readouterr().out == f"{prepared.directory}\n"
    assert main(["models", "path", name, "--json"]) == 0
    assert document(capsys) == {
        "model": name,
        "directory": str(prepared.directory),
        "source_directory": name,
    }
    assert main(["models", "path", "org/other"]) == 2
    assert "hint: subspec prepare org/other" in capsys.readouterr().err


def test_verify_says_that_all_is_sound(capsys, model, name):
    run(model)
    for argv in (["models", "verify"], ["models", "verify", name]):
        assert main(argv) == 0
        captured = capsys.readouterr()
        assert captured.out == "1 of 1 prepared models are as they were written\n"
        assert captured.err.splitlines()[-1].startswith(f"verifying {name} · ")
        assert "MB/s" in captured.err
    assert main(["models", "verify", "org/other"]) == 2


def test_verify_names_each_damaged_file_and_ends_with_6(capsys, model, name):
    prepared = run(model)
    for number in (0, 2):
        path = prepared.directory / layer_file_name(number)
        path.write_bytes(path.read_bytes()[:-1] + b"\xee")
    assert main(["models", "verify", name]) == ExitCode.INTEGRITY
    captured = capsys.readouterr()
    for number in (0, 2):
        assert f"{prepared.directory / layer_file_name(number)}: wrong SHA-256: expected" in captured.err
    assert captured.err.splitlines()[-2:] == [
        "subspec: error: 2 files are damaged",
        f" hint: subspec models verify {name} --repair",
    ]
    assert main(["models", "verify", "--json"]) == ExitCode.INTEGRITY
    (found,) = document(capsys)["models"]
    assert [item["file"] for item in found["findings"]] == [
        str(prepared.directory / layer_file_name(number)) for number in (0, 2)
    ]
    assert found["findings"][0]["expected"] == prepared.manifest.layers[0].sha256


def test_verify_says_what_is_not_done_yet(capsys, model):
    with pytest.raises(KeyboardInterrupt):
        run(model, Quantizer(1))
    assert main(["models", "verify"]) == 0
    assert "not done yet; the same subspec prepare goes on with it" in capsys.readouterr().err


def test_repair_of_what_nothing_tells_how_it_was_made(capsys, model):
    prepared = run(model)
    (prepared.directory / MANIFEST_NAME).write_text("{")
    assert main(["models", "verify", "--repair"]) == 2
    assert "nothing tells how" in capsys.readouterr().err


def test_remove_without_a_terminal_asks_for_yes(capsys, model, name):
    directory = run(model).directory
    before = content(directory)
    for more in ([], ["--json"]):
        assert main(["models", "remove", name, *more]) == 2
        captured = capsys.readouterr()
        assert f"{directory}: " in captured.err
        assert "removing needs a yes, and there is no terminal to ask on" in captured.err
        assert captured.out.startswith('{"error": ') if more else captured.out == ""
    assert content(directory) == before


def test_remove_refuses_what_a_run_uses(capsys, model, name):
    directory = run(model).directory
    with in_use(directory):
        before = content(directory)
        assert main(["models", "remove", name, "--yes"]) == ExitCode.BUSY
        told = capsys.readouterr().err
        assert f"{directory} is in use (pid {os.getpid()})" in told
        assert "--force removes it all the same" in told
        assert content(directory).keys() == before.keys()
        assert main(["models", "remove", name, "--yes", "--force"]) == 0
    assert not directory.exists()


def test_marks_of_ended_processes_do_not_count(model, name):
    directory = run(model).directory
    with in_use(directory), in_use(directory):
        assert users_of(directory) == [os.getpid()] * 2
    assert users_of(directory) == []
    left = directory / "in-use-99-0123abcd"
    left.touch()
    assert users_of(directory) == []
    assert left.exists()  # it may be about to be locked
    os.utime(left, (1, 1))
    assert users_of(directory) == []
    assert not left.exists()
    left.touch()
    assert main(["models", "remove", name, "--yes"]) == 0
    assert not directory.exists()


@pytest.mark.parametrize(("typed", "removed"), [("y", True), ("YES ", True), ("", False), ("no", False)])
def test_remove_asks_on_a_terminal(model, name, monkeypatch, typed, removed):
    directory = run(model).directory
    source = content(model.directory)
    stdout, stderr = on_terminal(monkeypatch)
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(prompt) or typed)
    assert main(["models", "remove", name]) == 0
    assert asked[0].startswith("free ")
    assert directory.exists() != removed
    assert ("are free again" in stdout.getvalue()) == removed
    assert ("nothing was removed" in stderr.getvalue()) != removed
    assert content(model.directory) == source


def test_remove_ends_quietly_at_the_end_of_input(model, name, monkeypatch):
    directory = run(model).directory
    on_terminal(monkeypatch)

    def leave(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", leave)
    assert main(["models", "remove", name]) == 0
    assert directory.exists()


def test_remove_all_but_the_latest(capsys, model, name):
    places = [run(model, bits=bits).directory for bits in (8, 4, 2)]
    for number, place in enumerate(places):
        os.utime(place / MANIFEST_NAME, (1000 - number, 1000 - number))
    assert main(["models", "remove", name, "--all-but-latest", "--yes", "--json"]) == 0
    found = document(capsys)
    assert found["removed"] == [str(place) for place in places[1:]]
    assert found["freed_bytes"] > 0
    assert [place.exists() for place in places] == [True, False, False]
    assert main(["models", "remove", name, "--all-but-latest"]) == 0
    assert "removed 0 sets" in capsys.readouterr().out
    assert main(["models", "remove", name, "--yes"]) == 0
    assert main(["models", "remove", name, "--yes"]) == 2


def test_remove_of_a_set_in_use_is_refused(capsys, model, name):
    directory = run(model).directory
    with directory_lock(directory):
        assert main(["models", "remove", name, "--yes"]) == ExitCode.BUSY
    assert f"pid {os.getpid()}" in capsys.readouterr().err
    assert (directory / MANIFEST_NAME).exists()


def test_without_a_command_what_there_is_is_named(capsys):
    assert main(["models"]) == 2
    error = capsys.readouterr().err
    assert "Missing command" in error
    assert "subspec models --help" in error


@pytest.mark.parametrize("argv", [["models", "list"], ["models", "verify"], ["models", "list", "--json"]])
def test_control_characters_in_a_directorys_name_do_not_reach_the_terminal(
    capsys, tmp_path, monkeypatch, argv
):
    named = write_checkpoint(tmp_path / "evil\x1b[2J\x9b\u202emodel", layers=LAYERS)
    prepared = run(resolve_model(str(named)))
    assert main(argv) == 0
    (prepared.directory / layer_file_name(0)).unlink()
    main(argv)
    main(["models", "remove", str(named)])
    main(["models", "path", str(named)])
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    assert "evil" in shown
    assert not set(shown) & set("\x1b\x9b\u202e")
