"""Direct reads: the file's bytes at addresses congruent to their offsets, or an error that says where it failed."""

from __future__ import annotations

import ctypes
import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.errors import IntegrityError
from subspec_cli.files import direct_io
from subspec_cli.files.direct_io import PAGE_BYTES, DirectReader, allocate_buffer
from subspec_cli.streaming.layout import BlockLayout, layout_block

MIB = 1 << 20


def entry(path: Path, offset: int, size: int) -> TensorEntry:
    return TensorEntry(f"{path.name}@{offset}", "U8", (size,), path, offset, size)


def random_file(path: Path, size: int) -> bytes:
    content = os.urandom(size)
    path.write_bytes(content)
    return content


def read(layout: BlockLayout) -> memoryview:
    """The block in a fresh buffer filled with a pattern, so that unread bytes show."""
    buffer = memoryview(allocate_buffer(layout.buffer_bytes))
    buffer[:] = b"\xa5" * len(buffer)
    reader = DirectReader()
    try:
        reader.read_extents(layout.extents, buffer)
    finally:
        reader.close()
    return buffer


def assert_reads(layout: BlockLayout, contents: dict[Path, bytes]) -> None:
    buffer = read(layout)
    for item in layout.placements:
        start, size = item.entry.offset_bytes, item.entry.size_bytes
        found = bytes(buffer[item.buffer_offset : item.buffer_offset + size])
        assert found == contents[item.entry.path][start : start + size], item.entry.name


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without direct I/O, as tmpfs used to be."""
    plain_open = os.open

    def refusing(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return plain_open(path, flags)

    monkeypatch.setattr(os, "open", refusing)


def test_neighbours_in_a_file_are_one_extent() -> None:
    path = Path("weights")
    layout = layout_block([entry(path, 5000, 100), entry(path, 4200, 800), entry(path, 5100, 7)])
    assert [(e.first_byte, e.size_bytes, e.buffer_offset) for e in layout.extents] == [(4096, 1011, 0)]
    assert layout.tensor_bytes == 907
    assert layout.buffer_bytes == PAGE_BYTES


def test_gaps_and_other_files_start_extents_of_their_own() -> None:
    one, two = Path("one"), Path("two")
    layout = layout_block([entry(one, 10, 5000), entry(one, 6000, 10), entry(two, 6010, 20)])
    assert [(e.path, e.first_byte, e.buffer_offset) for e in layout.extents] == [
        (one, 0, 0),
        (one, 4096, 2 * PAGE_BYTES),
        (two, 4096, 3 * PAGE_BYTES),
    ]


def test_no_tensors_make_an_empty_layout() -> None:
    layout = layout_block([])
    assert (layout.extents, layout.placements, layout.buffer_bytes) == ((), (), 0)


RUNS = st.lists(
    st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 40_000), st.integers(1, 9000)),
    min_size=1,
    max_size=8,
)


def without_overlap(runs: list[tuple[str, int, int]]) -> list[TensorEntry]:
    """Tensors one after the other in their file, with gaps."""
    found, ends = [], dict.fromkeys("ab", 0)
    for name, gap, size in runs:
        start = ends[name] + (gap if gap % 3 else 0)
        found.append(entry(Path(name), start, size))
        ends[name] = start + size
    return found


@given(RUNS)
def test_addresses_are_congruent_to_file_offsets(runs: list[tuple[str, int, int]]) -> None:
    """Trap 14: kernels that look at pointer alignment must see the same one wherever the tensor is."""
    layout = layout_block(without_overlap(runs))
    for item in layout.placements:
        assert (item.buffer_offset - item.entry.offset_bytes) % PAGE_BYTES == 0
        assert 0 <= item.buffer_offset <= layout.buffer_bytes - item.entry.size_bytes
    for extent in layout.extents:
        assert extent.first_byte % PAGE_BYTES == extent.buffer_offset % PAGE_BYTES == 0


@given(RUNS)
def test_tensors_share_no_byte_of_the_buffer(runs: list[tuple[str, int, int]]) -> None:
    layout = layout_block(without_overlap(runs))
    spans = sorted((p.buffer_offset, p.buffer_offset + p.entry.size_bytes) for p in layout.placements)
    assert all(left[1] <= right[0] for left, right in pairwise(spans))
    assert len(layout.placements) == len(runs)


def test_buffers_are_page_aligned() -> None:
    for size in (1, PAGE_BYTES, PAGE_BYTES + 1):
        buffer = allocate_buffer(size)
        assert len(buffer) >= size
        assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % PAGE_BYTES == 0


@pytest.mark.parametrize("refused", [False, True])
def test_reads_equal_the_file_at_odd_offsets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    if refused:
        refuse_direct(monkeypatch)
    one, two = tmp_path / "one", tmp_path / "two"
    contents = {one: random_file(one, 3 * MIB + 77), two: random_file(two, 10_001)}
    tail = entry(one, 3 * MIB + 70, 7)
    layout = layout_block(
        [
            entry(one, 13, 2 * MIB + 500_000),
            entry(two, 4095, 2),
            entry(two, 9_000, 1_001),
            entry(one, 2 * MIB + 600_001, 4096),
            tail,
        ]
    )
    assert_reads(layout, contents)


def test_bytes_between_extents_are_left_alone(tmp_path: Path) -> None:
    """A block is read into its own pages only. Bytes after it in a longer slot stay."""
    path = tmp_path / "weights"
    random_file(path, 5 * PAGE_BYTES)
    layout = layout_block([entry(path, 100, 50)])
    buffer = memoryview(allocate_buffer(3 * PAGE_BYTES))
    buffer[:] = b"\xa5" * len(buffer)
    reader = DirectReader()
    reader.read_extents(layout.extents, buffer)
    reader.close()
    assert bytes(buffer[PAGE_BYTES:]) == b"\xa5" * (2 * PAGE_BYTES)


def test_files_are_read_past_the_page_cache_where_allowed(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    random_file(path, 5000)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no direct I/O")
    reader = DirectReader()
    reader.read_extents(layout_block([entry(path, 0, 5000)]).extents, memoryview(allocate_buffer(8192)))
    assert reader.is_direct
    reader.close()


def test_the_fallback_says_so_and_drops_what_it_read_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_direct(monkeypatch)
    advised: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _file, *rest: advised.append(rest))
    path = tmp_path / "weights"
    random_file(path, 20_000)
    reader = DirectReader()
    reader.read_extents(layout_block([entry(path, 5000, 9000)]).extents, memoryview(allocate_buffer(16_384)))
    assert not reader.is_direct
    assert advised == [(4096, 12_288, os.POSIX_FADV_DONTNEED)]
    reader.close()


@pytest.mark.parametrize("refused", [False, True])
def test_a_truncated_file_is_an_error_with_file_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    if refused:
        refuse_direct(monkeypatch)
    path = tmp_path / "weights"
    random_file(path, 10_000)
    with pytest.raises(
        IntegrityError, match=f"{path}: the file ends early at byte 10000, expected 12000 bytes"
    ):
        read(layout_block([entry(path, 5000, 7000)]))


@pytest.mark.parametrize("size", [0, 4096, 8192])
def test_a_file_cut_at_a_page_is_an_error_too(tmp_path: Path, size: int) -> None:
    path = tmp_path / "weights"
    random_file(path, size)
    with pytest.raises(IntegrityError, match=f"ends early at byte {max(size, 4096)}"):
        read(layout_block([entry(path, 5000, 7000)]))


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"cannot read .*gone: ENOENT \(No such file"):
        read(layout_block([entry(tmp_path / "gone", 0, 10)]))


def test_a_failing_disk_is_an_error_with_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    random_file(path, 10_000)
    plain_read = os.preadv

    def failing(file: int, buffers: list[memoryview], offset: int) -> int:
        if offset:
            raise OSError(5, "Input/output error")
        return plain_read(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(IntegrityError, match="Input/output error at byte 4096, expected 6000 bytes"):
        read(layout_block([entry(path, 5000, 1000)]))


def test_large_extents_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal is handled between two pieces."""
    monkeypatch.setattr(direct_io, "_REQUEST_BYTES", 2 * PAGE_BYTES)
    sizes: list[int] = []
    plain_read = os.preadv

    def watched(file: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(len(buffers[0]))
        return plain_read(file, buffers, offset)

    path = tmp_path / "weights"
    contents = {path: random_file(path, 50_000)}
    layout = layout_block([entry(path, 300, 40_000)])
    monkeypatch.setattr(os, "preadv", watched)
    assert_reads(layout, contents)
    assert max(sizes) <= 2 * PAGE_BYTES


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_close_gives_the_files_back(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    random_file(path, 5000)
    before = open_files()
    read(layout_block([entry(path, 0, 5000)]))
    assert open_files() == before


def test_a_refusal_at_the_first_read_leaves_no_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems take O_DIRECT when opening and refuse it when reading."""
    plain_open, plain_read = os.open, os.preadv
    opened_direct: dict[int, bool] = {}

    def watched_open(path: Path, flags: int) -> int:
        descriptor = plain_open(path, flags)
        opened_direct[descriptor] = bool(flags & os.O_DIRECT)
        return descriptor

    def refusing(file: int, buffers: list[memoryview], offset: int) -> int:
        if opened_direct[file]:
            raise OSError(22, "Invalid argument")
        return plain_read(file, buffers, offset)

    path = tmp_path / "weights"
    contents = {path: random_file(path, 5000)}
    before = open_files()
    monkeypatch.setattr(os, "open", watched_open)
    monkeypatch.setattr(os, "preadv", refusing)
    assert_reads(layout_block([entry(path, 0, 5000)]), contents)
    assert open_files() == before
