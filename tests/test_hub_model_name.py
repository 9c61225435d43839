"""Values of the MODEL argument."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import subspec_cli
from subspec_cli.errors import UsageError
from subspec_cli.hub.command_hints import prepare_command
from subspec_cli.hub.model_name import DEMO_DIRECTORY, ModelName, check_revision, name_of_id, parse_model_name


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    (tmp_path / "demo").mkdir()
    (tmp_path / "file").write_bytes(b"")
    parse = parse_model_name
    assert parse("org/tiny").directory == tmp_path / "org" / "tiny"
    assert parse("org/tiny/..").model_id == str(tmp_path / "org")
    assert parse("./demo").directory == tmp_path / "demo"
    assert parse("demo").directory == DEMO_DIRECTORY
    for name in ("foo.gguf", "org/foo.GGUF", "file.gguf", "./no.gguf"):
        (tmp_path / "file.gguf").write_bytes(b"")
        with pytest.raises(UsageError, match="GGUF files are not read"):
            parse(name)
    for name in ("gpt2", "Qwen/Qwen2.5-7B-Instruct", "a_b/c.d"):
        assert parse(name) == ModelName(name, None)
    for name in ("/no", "./no", "../../etc/no", "~/no/such", "~nobody-here"):
        with pytest.raises(UsageError, match="no such directory"):
            parse(name)
    with pytest.raises(UsageError, match="is a file"):
        parse("file")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name, what in (
        ("loop", "a link that"),
        ("./gone", "a link that"),
        ("pipe", "neither a directory nor a"),
    ):
        with pytest.raises(UsageError, match=f"{name} is {what}") as caught:
            parse(name)
        assert caught.value.hint
    too_long = "a/" + "b" * 97
    paths = ("", " ", "a/b/c", "no/", "a b", "a/..", "C:\\x", "https://huggingface.co/a/b")
    odd = ("a/-b", "-a", "a--b", "a..b", too_long, "a\x1b[2J", "a\nb", "a\0", "\u202eab")
    for name in (*paths, *odd):
        with pytest.raises(UsageError, match="neither a directory nor the name") as caught:
            parse(name)
        assert caught.value.message.isprintable()


@pytest.mark.parametrize("revision", ["", "../x", "a/../b", "-x", "/x", "a b", "x" * 201, "a\x1b"])
def test_revisions_that_cannot_be(revision):
    with pytest.raises(UsageError, match="is no revision"):
        check_revision(ModelName("org/tiny", None), revision)


def test_canonical_ids_do_not_depend_on_where_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert name_of_id("org/tiny") == ModelName("org/tiny", None)
    assert name_of_id("demo").directory == DEMO_DIRECTORY
    assert name_of_id(str(tmp_path / "org")).directory == tmp_path / "org"
    with pytest.raises(UsageError, match="no such directory"):
        name_of_id(str(tmp_path / "gone"))
    with pytest.raises(UsageError):
        name_of_id("../../x")


def test_a_folder_of_the_hubs_cache_means_its_snapshot(tmp_path):
    """Of `main`, or the only one; else the hint gives paths that work."""
    repo = tmp_path / "models--org--my--tiny"
    one, two = (repo / "snapshots" / (letter * 40) for letter in "ab")
    (repo / "snapshots").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"none of its snapshots has a config\.json") as caught:
        parse_model_name(str(repo))
    assert caught.value.hint == "fetch the model: subspec prepare org/my--tiny"
    for snapshot in (one, two):
        snapshot.mkdir()
    (one / "config.json").write_text("{}")
    for given in (repo, repo / "snapshots", one):
        assert parse_model_name(str(given)) == ModelName(str(one), one)
    (two / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="2 snapshots, and none of them is its main one") as caught:
        parse_model_name(str(repo))
    assert caught.value.hint == f"give a snapshot: {one} or {two}"
    (repo / "refs").mkdir()
    for text, meant in ((two.name + "\n", two), (one.name, one)):
        (repo / "refs" / "main").write_text(text)
        assert parse_model_name(str(repo)).directory == meant
    (repo / "refs" / "main").write_text("c" * 40)  # a commit that was never fetched
    with pytest.raises(UsageError, match="none of them is its main one"):
        parse_model_name(str(repo))


def test_a_folder_that_only_looks_like_the_cache_is_itself(tmp_path):
    for name in ("models--org--tiny", "x"):
        (tmp_path / name / "snapshots" / "a").mkdir(parents=True)
        (tmp_path / name / "snapshots" / "a" / "config.json").write_text("{}")
    (tmp_path / "models--org--tiny" / "config.json").write_text("{}")
    for name in ("models--org--tiny", "x", "x/snapshots"):
        assert parse_model_name(str(tmp_path / name)).directory == tmp_path / name


def test_prepare_command_is_quoted():
    command = prepare_command
    assert command("org/tiny") == "subspec prepare org/tiny"
    assert command("/my models/x", bits=8, force=True) == "subspec prepare '/my models/x' --force --bits 8"


def test_package_demo_is_where_it_is_looked_for():
    package = Path(subspec_cli.__file__).parent
    assert package / "demo" == DEMO_DIRECTORY
