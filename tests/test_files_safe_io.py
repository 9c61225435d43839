"""Atomic writes, refusals to hang, and where things are kept."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from subspec_cli.errors import ExitCode, IntegrityError, ResourceError
from subspec_cli.files import free_space, home, safe_io


def failing(number: int):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"old and longer")
    safe_io.atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert names_in(tmp_path) == ["a.json"]


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_mode_follows_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        safe_io.atomic_write(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


def test_data_is_on_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    calls = []
    for name in ("write", "fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, _r=real, _n=name: (calls.append(_n), _r(*args))[1])
    safe_io.atomic_write(tmp_path / "a", b"x")
    assert calls == ["write", "fsync", "replace", "fsync"]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:3]))
    safe_io.atomic_write(tmp_path / "a", b"0123456789")
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
            safe_io.atomic_write(path, b"x" * 3000)
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
        safe_io.atomic_write(tmp_path / "a", b"x" * 1000)
    assert names_in(tmp_path) == []


def test_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        safe_io.atomic_write(tmp_path / "a", b"x")
    assert names_in(tmp_path) == []


def test_planted_link_is_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / f".a.tmp.{os.getpid()}").symlink_to(victim)
    with pytest.raises(IntegrityError, match="in the way"):
        safe_io.atomic_write(tmp_path / "a", b"x")
    assert victim.read_bytes() == b"precious"


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(ResourceError, match=r"ENOENT.*needed.*free"):
        safe_io.atomic_write(tmp_path / "no" / "a", b"x")


def test_sweep_takes_own_and_dead_temporary_files_only(tmp_path):
    dead = next(pid for pid in range(4_000_000, 4_190_000) if not Path(f"/proc/{pid}").exists())
    keep = ["layer-00000.safetensors", f".a.tmp.{os.getppid()}", ".a.tmp.x", ".a.tmp.99999999999999"]
    for name in [*keep, f".a.tmp.{dead}", f".a.tmp.{os.getpid()}"]:
        (tmp_path / name).write_bytes(b"x")
    safe_io.sweep_stale_temps(tmp_path)
    assert names_in(tmp_path) == sorted(keep)


def test_free_space(tmp_path):
    free_space.check_free_space(tmp_path / "not" / "yet", 1, "a test")
    with pytest.raises(ResourceError, match=r"a test needs 1024.0 TiB of disk, .* has .* free") as caught:
        free_space.check_free_space(tmp_path / "not" / "yet", 1 << 50, "a test")
    assert "SUBSPEC_HOME" in caught.value.hint


def test_hash(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert safe_io.sha256_file(tmp_path / "a").startswith("ba7816bf")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a named pipe"),
        (os.mkdir, "a directory"),
        (lambda path: path.symlink_to("/dev/zero"), "device"),
    ],
)
def test_special_files_are_refused_without_waiting(tmp_path, make, kind):
    make(tmp_path / "x")
    for reader in (safe_io.open_regular, safe_io.sha256_file, lambda path: safe_io.read_small_file(path, 9)):
        with pytest.raises(IntegrityError, match=kind):
            reader(tmp_path / "x")


@pytest.mark.parametrize("name", ["missing", "a\0b"])
def test_missing_file_and_impossible_name(tmp_path, name):
    with pytest.raises((IntegrityError, ResourceError), match="cannot read"):
        safe_io.open_regular(tmp_path / name)


def test_size_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert safe_io.read_small_file(tmp_path / "a", 5) == b"12345"
    with pytest.raises(IntegrityError, match=r"has 5 bytes; at most 4 B"):
        safe_io.read_small_file(tmp_path / "a", 4)


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
