"""Where prepared models are kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from subspec_cli.errors import ResourceError
from subspec_cli.files import home


def test_home_is_chosen_by_environment_then_platform(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path))
    assert home.prepared_root() == tmp_path / "prepared"
    monkeypatch.setenv("SUBSPEC_HOME", "~/here")
    assert home.subspec_home() == Path("/home/someone/here")
    monkeypatch.setenv("SUBSPEC_HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert home.subspec_home() == Path("/var/cache/me/subspec")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert home.subspec_home() == Path("/home/someone/.cache/subspec")
    monkeypatch.setattr("sys.platform", "darwin")
    assert home.subspec_home() == Path("/home/someone/Library/Caches/subspec")
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert home.subspec_home() == Path("/local/subspec")
    monkeypatch.delenv("LOCALAPPDATA")
    assert home.subspec_home() == Path("/home/someone/AppData/Local/subspec")


def test_home_that_cannot_be_made(tmp_path, monkeypatch):
    home.make_home_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResourceError, match=str(tmp_path / "file")) as caught:
        home.make_home_directory(tmp_path / "file" / "b")
    assert "SUBSPEC_HOME" in caught.value.hint
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(ResourceError, match="no permission") as caught:
        home.make_home_directory(tmp_path / "a")
    assert "SUBSPEC_HOME" in caught.value.hint


def test_compiled_loops_are_kept_under_the_home_unless_the_user_has_a_place(monkeypatch, tmp_path):
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path))
    environment = {}
    home.keep_compiled_loops(environment)
    assert environment == {"NUMBA_CACHE_DIR": str(tmp_path / "numba")}
    environment = {"NUMBA_CACHE_DIR": "/elsewhere"}
    home.keep_compiled_loops(environment)
    assert environment == {"NUMBA_CACHE_DIR": "/elsewhere"}
