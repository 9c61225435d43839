"""Memory readings: what the system says, and what this process takes beyond its start."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import pytest
from tiny_models import CPU

from subspec_cli.errors import ResourceError
from subspec_cli.streaming import memory_meter
from subspec_cli.streaming.memory_meter import (
    MemoryMeter,
    allocator_share,
    available_bytes,
    disk_read_bytes,
    return_freed_memory_now,
    total_bytes,
)
from subspec_cli.units import GIB, MIB

SIZE = 96 * MIB


def touched(size: int) -> mmap.mmap:
    """Memory that is resident, and goes back to the system when closed."""
    held = mmap.mmap(-1, size)
    held.write(b"\1" * size)
    return held


def test_the_machine_has_memory_and_some_of_it_is_free() -> None:
    assert 0 < available_bytes(CPU) <= total_bytes(CPU)


def test_off_linux_an_ordinary_machine_is_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_path: Path, **_how: str) -> str:
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


def test_the_whole_process_is_the_bare_one_and_what_was_taken() -> None:
    meter = MemoryMeter(CPU)
    touched(SIZE).close()
    assert meter.process_peak_bytes() == meter.bare_bytes + meter.peak_bytes()
    assert meter.bare_bytes > MIB


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library")
def test_memory_freed_in_small_pieces_goes_back() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    pieces = []
    for _ in range(SIZE // 65_536):
        pieces.append(libc.malloc(ctypes.c_size_t(65_536)))
        ctypes.memset(pieces[-1], 1, 65_536)
    meter = MemoryMeter(CPU)
    last = pieces.pop()  # it lies above the others, so the heap cannot shrink from its end
    for piece in pieces:
        libc.free(piece)
    held = memory_meter._status_bytes("VmRSS")
    return_freed_memory_now()
    assert held - memory_meter._status_bytes("VmRSS") > SIZE // 2
    assert meter.current_bytes() == 0
    libc.free(last)


def test_where_the_peak_cannot_be_reset_the_earlier_one_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory_meter, "_CLEAR_REFS", tmp_path / "no" / "such" / "file")
    touched(SIZE).close()
    assert MemoryMeter(CPU).peak_bytes() < SIZE // 2


def test_disk_reads_are_those_that_storage_delivered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "io"
    path.write_text("rchar: 999\nsyscr: 4\nread_bytes: 4096\nwrite_bytes: 7\n")
    monkeypatch.setattr(memory_meter, "_IO", path)
    assert disk_read_bytes() == 4096
    path.write_text("rchar: 999\n")
    assert disk_read_bytes() is None


def test_the_allocators_share_and_the_context_make_the_budget() -> None:
    assert allocator_share(8 * GIB, GIB // 2, 24 * GIB) * 24 * GIB + GIB // 2 == pytest.approx(8 * GIB)
    assert allocator_share(24 * GIB, 0, 24 * GIB) == 1.0
    # A budget beyond the GPU is no share that PyTorch would take.
    assert allocator_share(40 * GIB, GIB, 24 * GIB) == 1.0


@pytest.mark.parametrize("budget_bytes", [0, GIB // 4, GIB // 2])
def test_a_budget_that_the_context_eats_up_is_refused(budget_bytes: int) -> None:
    with pytest.raises(ResourceError, match=r"512\.0 MiB that CUDA takes") as info:
        allocator_share(budget_bytes, GIB // 2, 24 * GIB)
    assert "--vram-gb 1 " in info.value.hint
