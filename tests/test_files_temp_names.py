"""Unfinished files of several processes, machines and containers in one directory."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from subspec_cli.files import temp_names
from subspec_cli.files.atomic_write import atomic_write, sweep_stale_temps
from subspec_cli.files.temp_names import abandoned, is_temp_name, owner_tag, temp_path

HOUR_S = 3600


def dead_pid() -> int:
    return next(pid for pid in range(4_000_000, 4_190_000) if not Path(f"/proc/{pid}").exists())


def made(directory, monkeypatch, *, pid=None, space=None, age_s=0.0) -> Path:
    """A temporary file of another process."""
    with monkeypatch.context() as patch:
        if pid is not None:
            patch.setattr(os, "getpid", lambda: pid)
        if space is not None:
            patch.setattr(temp_names, "_process_space", lambda: space)
        path = temp_path(directory / "layer")
    path.write_bytes(b"x")
    os.utime(path, (path.stat().st_mtime - age_s,) * 2)
    return path


def test_names_are_unique_short_and_known(tmp_path):
    names = {temp_path(tmp_path / ("n" * 240)).name for _ in range(1000)}
    assert len(names) == 1000
    assert all(is_temp_name(name) and len(name) < 160 for name in names)
    assert not any(
        is_temp_name(name) for name in ("layer-00000.safetensors", ".a.tmp.x", ".a.tmp.1.2.3", "a.tmp.1")
    )
    assert is_temp_name(".a.tmp.123")


def test_a_process_of_this_machine_is_gone_once_it_is_dead(tmp_path, monkeypatch):
    gone = made(tmp_path, monkeypatch, pid=dead_pid())
    alive = [made(tmp_path, monkeypatch, pid=pid) for pid in (os.getppid(), os.getpid())]
    assert abandoned(list(tmp_path.iterdir())) == [gone]
    sweep_stale_temps(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(alive)


@pytest.mark.parametrize("space", ["0" * 8, "12345678"])
def test_of_a_process_elsewhere_only_long_silence_counts(tmp_path, monkeypatch, space):
    """Its process id says nothing here: it may be dead or alive there, or be our own."""
    for pid in (dead_pid(), os.getpid(), 1):
        fresh = made(tmp_path, monkeypatch, pid=pid, space=space, age_s=HOUR_S - 60)
        idle = made(tmp_path, monkeypatch, pid=pid, space=space, age_s=HOUR_S + 60)
        (tmp_path / ".lock").write_bytes(b"")
        assert abandoned([fresh, idle]) == [idle]


def test_the_disks_clock_counts_not_ours(tmp_path, monkeypatch):
    """A server whose clock is two hours behind: what is written there now is not old."""
    writing = made(tmp_path, monkeypatch, space="12345678", age_s=2 * HOUR_S)
    assert abandoned([writing]) == []


def test_names_of_earlier_versions_are_swept_when_idle(tmp_path):
    (tmp_path / f".a.tmp.{dead_pid()}").write_bytes(b"x")
    (tmp_path / ".b.tmp.7").write_bytes(b"x")
    os.utime(tmp_path / ".b.tmp.7", (5, 5))
    sweep_stale_temps(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f".a.tmp.{dead_pid()}"]


def test_a_system_that_tells_no_namespace(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "readlink", lambda path: (_ for _ in ()).throw(OSError(2, "none")))
    assert owner_tag().split(".")[1] == "0" * 8
    assert abandoned([made(tmp_path, monkeypatch, pid=dead_pid())]) == []


def test_many_writers_of_one_file_with_one_process_id(tmp_path, monkeypatch):
    """Each writes and sweeps all the time; nobody loses a file, and the last one stands whole."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    faults = []

    def write(letter):
        try:
            for _ in range(30):
                sweep_stale_temps(tmp_path)
                atomic_write(tmp_path / "file", letter * 100_000)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert set((tmp_path / "file").read_bytes()) in ({97}, {98}, {99})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
