"""What a session trusts: files that change under it, damage that is repaired, the note of the last use."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import closing

import pytest
from checkpoints import as_hub_snapshot
from fakes_session import answer_to, open_tiny, prepare_quietly, wanted
from tiny_models import make_tiny_model, one_thread  # noqa: F401 - a fixture

from subspec_cli.__main__ import main
from subspec_cli.errors import ExitCode, IntegrityError, ResourceError
from subspec_cli.files import direct_io
from subspec_cli.session.prepare import prepare
from subspec_cli.substitutes.inventory import list_stored
from subspec_cli.substitutes.last_use import LAST_USED_NAME
from subspec_cli.substitutes.manifest import layer_file_name
from subspec_cli.substitutes.prepared_model import find_prepared
from subspec_cli.substitutes.settings import SubstituteSettings

COMMIT = "a" * 40


@pytest.fixture(autouse=True)
def subspec_home(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), "qwen2", layers=2, hidden=64)


@pytest.fixture
def own(pristine, tmp_path):
    """A prepared model that a test may damage."""
    directory = shutil.copytree(pristine, tmp_path / "model")
    prepare_quietly(directory)
    return directory


def shard_of(directory):
    return directory / "model.safetensors"


def truncate(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def replace_by_copy(path):
    shutil.copy(path, path.with_name("copy"))
    os.replace(path.with_name("copy"), path)


def overwrite(path):
    with path.open("r+b") as file:
        file.seek(-5000, os.SEEK_END)
        file.write(bytes(4000))


def overwrite_and_put_the_time_back(path):
    status = path.stat()
    overwrite(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [truncate, replace_by_copy, overwrite, overwrite_and_put_the_time_back])
def test_a_target_file_that_changes_while_answering_ends_the_answer_before_its_next_token(own, change):
    with open_tiny(own) as session:
        expected = answer_to(session, "Hello", 40).token_ids
        session.reset()
        ids = session.encode_prompt("Hello", system=None, raw=False)
        given = []
        with closing(session.generate(ids, max_new_tokens=40, stop=())) as deltas:
            given += next(deltas).token_ids
            change(shard_of(own))
            with pytest.raises(
                IntegrityError, match=r"model\.safetensors changed while it was in use"
            ) as caught:
                given += [token for delta in deltas for token in delta.token_ids]
    assert caught.value.exit_code == ExitCode.INTEGRITY
    assert given == expected[: len(given)]
    assert len(given) < 40


def test_an_answer_ends_when_products_are_no_longer_whole(own, monkeypatch):
    """OpenMP grants fewer threads from some pass on: no token of that pass is given."""
    from subspec_cli.session import session as session_module

    calls = []

    def check():
        calls.append(None)
        if len(calls) == 3:
            raise ResourceError("matrix products are wrong on this machine")

    with open_tiny(own) as session:
        expected = answer_to(session, "Hello", 40).token_ids
        session.reset()
        monkeypatch.setattr(session_module, "check_products", check)
        ids = session.encode_prompt("Hello", system=None, raw=False)
        given = []
        deltas = session.generate(ids, max_new_tokens=40, stop=())
        with pytest.raises(ResourceError, match="products are wrong"):
            given.extend(token for delta in deltas for token in delta.token_ids)
    assert 0 < len(given) < len(expected)
    assert given == expected[: len(given)]


def test_a_model_held_in_memory_does_not_care_what_becomes_of_its_files(own):
    with open_tiny(own, memory={"resident_layers": None}) as session:
        expected = answer_to(session, "Hello", 8).outcome
        shard_of(own).unlink()
        assert answer_to(session, "Hello", 8).outcome == expected


def test_a_target_file_that_changes_while_loading_gives_no_session(own, monkeypatch):
    from subspec_cli.session import blocks

    original = blocks.read_resident

    def meddle(layouts):
        overwrite(shard_of(own))
        return original(layouts)

    monkeypatch.setattr(blocks, "read_resident", meddle)
    with pytest.raises(IntegrityError, match="changed while it was in use"):
        open_tiny(own, memory={"resident_layers": 1})


def test_a_disk_that_fails_while_streaming_is_named(own, monkeypatch):
    with open_tiny(own) as session:
        ids = session.encode_prompt("Hello", system=None, raw=False)
        expected = answer_to(session, "Hello", 12).token_ids
        session.reset()
        deltas = session.generate(ids, max_new_tokens=12, stop=())
        given = list(next(deltas).token_ids)

        def fails(*args):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(direct_io.os, "preadv", fails)
        with pytest.raises(IntegrityError, match=r"model\.safetensors: Input/output error at byte") as caught:
            given += [token for delta in deltas for token in delta.token_ids]
        deltas.close()
    assert caught.value.exit_code == ExitCode.INTEGRITY
    assert given == expected[: len(given)]


def test_opening_notes_the_use_and_leaves_the_manifest_alone(own):
    directory = find_prepared(str(own)).directory
    before = (directory / "manifest.json").read_bytes()
    assert list_stored()[0].last_used_s is None
    open_tiny(own).close()
    assert list_stored()[0].last_used_s > 1e9
    assert (directory / "manifest.json").read_bytes() == before
    (directory / LAST_USED_NAME).unlink()
    (directory / LAST_USED_NAME).mkdir()  # as good as a place that cannot be written
    open_tiny(own).close()


def test_a_damaged_substitute_is_repaired_to_the_same_bytes_and_nothing_else_is_made(own, capsys):
    directory = find_prepared(str(own)).directory
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    kept = (directory / layer_file_name(1)).stat()
    path = directory / layer_file_name(0)
    path.write_bytes(path.read_bytes()[:-2] + b"xx")
    with pytest.raises(IntegrityError) as caught:
        open_tiny(own)
    assert caught.value.hint == f"subspec models verify {own} --repair"
    assert main(caught.value.hint.split()[1:]) == 0
    assert "repaired" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert (directory / layer_file_name(1)).stat() == kept
    open_tiny(own).close()


def test_a_set_of_mixed_widths_is_repaired_as_it_was_made(own):
    options = SubstituteSettings(4, "hqq", (("*.down_proj", 8),))
    report = prepare(str(own), options, progress=lambda state: None)
    before = (report.directory / "manifest.json").read_bytes()
    (report.directory / layer_file_name(0)).unlink()
    assert main(["models", "verify", str(own), "--repair"]) == 0
    assert (report.directory / "manifest.json").read_bytes() == before
    assert len(list_stored()) == 2


def test_a_damaged_directory_of_the_user_is_not_touched(own, capsys):
    status = shard_of(own).stat()
    overwrite(shard_of(own))
    os.utime(shard_of(own), ns=(status.st_atime_ns, status.st_mtime_ns))
    damaged = shard_of(own).read_bytes()
    assert main(["models", "verify", "--repair"]) == ExitCode.INTEGRITY
    captured = capsys.readouterr()
    assert "still" in captured.err
    assert "put the named files back" in captured.err
    assert shard_of(own).read_bytes() == damaged


def test_a_damaged_file_of_the_hubs_cache_is_dropped_and_fetched_again(pristine, tmp_path, monkeypatch):
    import hashlib

    from huggingface_hub import constants

    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    snapshot = as_hub_snapshot(shutil.copytree(pristine, tmp_path / "copy"), cache, COMMIT)
    shard = snapshot / "model.safetensors"
    good = shard.read_bytes()
    blob = shard.resolve().rename(shard.resolve().with_name(hashlib.sha256(good).hexdigest()))
    shard.unlink()
    shard.symlink_to(blob)
    prepare("org/tiny", wanted({}), revision=COMMIT, progress=lambda state: None)
    blob.write_bytes(good[:-1] + b"\x7f")
    asked = []

    def fetch(model, settings, **how):
        asked.append((model, how["revision"], shard.is_symlink(), blob.exists()))
        blob.write_bytes(good)
        shard.symlink_to(blob)

    monkeypatch.setattr("subspec_cli.session.prepare.prepare", fetch)
    assert main(["models", "verify", "org/tiny", "--repair"]) == 0
    assert asked == [("org/tiny", COMMIT, False, False)]


def test_a_home_that_is_read_only_is_enough_to_run_and_to_see_that_all_is_prepared(own, monkeypatch):
    with open_tiny(own) as session:
        expected = answer_to(session, "Hello", 10).outcome
    tried = []

    def refusing(name, real):
        def call(path, *args, **how):
            writes = name != "open" or args[0] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)
            if writes and str(path).startswith(os.environ["SUBSPEC_HOME"]):
                tried.append(str(path))
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return real(path, *args, **how)

        return call

    for name in ("open", "mkdir", "utime", "replace", "unlink"):
        monkeypatch.setattr(os, name, refusing(name, getattr(os, name)))
    with open_tiny(own) as session:
        assert answer_to(session, "Hello", 10).outcome == expected
    assert main(["prepare", str(own)]) == 0
    assert tried
