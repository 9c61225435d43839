"""Atomic writes."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path

import pytest

from subspec_cli.errors import ExitCode, IntegrityError, ResourceError
from subspec_cli.files.atomic_write import atomic_write
from subspec_cli.files.temp_names import temp_path


def failing(number: int):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"old and longer")
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert names_in(tmp_path) == ["a.json"]


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_mode_follows_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        atomic_write(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


def test_data_is_on_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    calls = []
    for name in ("write", "fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, _r=real, _n=name: (calls.append(_n), _r(*args))[1])
    atomic_write(tmp_path / "a", b"x")
    assert calls == ["write", "fsync", "replace", "fsync"]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:3]))
    atomic_write(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO], ids=errno.errorcode.get
)
def test_failure_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, call, number):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(number))
        with pytest.raises(ResourceError) as caught:
            atomic_write(path, b"x" * 3000)
    assert caught.value.exit_code == ExitCode.RESOURCE
    for part in (errno.errorcode[number], str(path), "2.93 KiB needed", "free"):
        assert part in caught.value.message
    assert caught.value.hint
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["a"]


def test_disk_that_fills_up_half_way(tmp_path, monkeypatch):
    real, written = os.write, []

    def write(handle, data):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(1)
        return real(handle, data[:100])

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(ResourceError, match="ENOSPC"):
        atomic_write(tmp_path / "a", b"x" * 1000)
    assert names_in(tmp_path) == []


def test_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "a", b"x")
    assert names_in(tmp_path) == []


def test_planted_link_is_not_written_through(tmp_path, monkeypatch):
    """Even if somebody guessed the name."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    monkeypatch.setattr(secrets, "token_hex", lambda size: "0" * 2 * size)
    temp_path(tmp_path / "a").symlink_to(victim)
    with pytest.raises(IntegrityError, match="in the way"):
        atomic_write(tmp_path / "a", b"x")
    assert victim.read_bytes() == b"precious"


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(ResourceError, match=r"ENOENT.*needed.*free"):
        atomic_write(tmp_path / "no" / "a", b"x")
