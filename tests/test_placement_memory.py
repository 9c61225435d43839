"""Memory readings: what the system says, and what this process takes beyond its start."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
from tiny_models import CPU

from subspec_cli.placement import memory
from subspec_cli.placement.memory import MemoryMeter, available_bytes, disk_read_bytes, total_bytes
from subspec_cli.units import MIB

SIZE = 96 * MIB


def touched(size: int) -> mmap.mmap:
    """Memory that is resident, and goes back to the system when closed."""
    held = mmap.mmap(-1, size)
    held.write(b"\1" * size)
    return held


def test_the_machine_has_memory_and_some_of_it_is_free() -> None:
    assert 0 < available_bytes(CPU) <= total_bytes(CPU)


def test_off_linux_an_ordinary_machine_is_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_path: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert total_bytes(CPU) == available_bytes(CPU) == 8 << 30
    assert disk_read_bytes() is None
    assert MemoryMeter(CPU).peak_bytes() == 0


def test_what_is_taken_after_the_start_is_counted_and_the_peak_stays() -> None:
    meter = MemoryMeter(CPU)
    held = touched(SIZE)
    taken = meter.current_bytes()
    held.close()
    assert abs(taken - SIZE) < SIZE // 2
    assert meter.current_bytes() < SIZE // 2
    assert meter.peak_bytes() >= SIZE * 3 // 4


def test_what_was_taken_before_the_start_does_not_count() -> None:
    """Importing the libraries peaks above what stays of it."""
    touched(SIZE).close()
    meter = MemoryMeter(CPU)
    assert meter.current_bytes() < SIZE // 2
    assert meter.peak_bytes() < SIZE // 2


def test_where_the_peak_cannot_be_reset_the_earlier_one_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "no" / "such" / "file")
    touched(SIZE).close()
    assert MemoryMeter(CPU).peak_bytes() < SIZE // 2


def test_disk_reads_are_those_that_storage_delivered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "io"
    path.write_text("rchar: 999\nsyscr: 4\nread_bytes: 4096\nwrite_bytes: 7\n")
    monkeypatch.setattr(memory, "_IO", path)
    assert disk_read_bytes() == 4096
    path.write_text("rchar: 999\n")
    assert disk_read_bytes() is None
