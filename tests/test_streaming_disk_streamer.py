"""Streaming from disk: blocks in order, slots never touched while in use, early leaving, failures, closing."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from subspec_cli.checkpoint.dtypes import WEIGHT_DTYPES, torch_dtype
from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.errors import IntegrityError
from subspec_cli.files.direct_io import PAGE_BYTES, DirectReader, Extent, page_ceil
from subspec_cli.streaming import disk_streamer, read_ahead
from subspec_cli.streaming.disk_streamer import DiskStreamer, read_resident
from subspec_cli.streaming.layout import BlockLayout, layout_block
from subspec_cli.streaming.streamer import StreamCounters

POISON = b"\xff" * 64
BLOCKS = 5
WAIT_S = 20


class WatchedReader(DirectReader):
    """Spoils a slot before it reads into it, and reads only while its gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[int] = []
        """First byte of each block's extent, in the order of reading."""
        self.done = 0
        self.gate = threading.Event()
        self.gate.set()
        self.closed = False

    def read_extents(self, extents: Sequence[Extent], buffer: memoryview) -> None:
        (extent,) = extents
        self.begun.append(extent.first_byte)
        for start in range(0, page_ceil(extent.size_bytes), len(POISON)):
            buffer[start : start + len(POISON)] = POISON
        assert self.gate.wait(WAIT_S)
        super().read_extents(extents, buffer)
        self.done += 1

    def close(self) -> None:
        super().close()
        self.closed = True


class Rig:
    """A file of blocks, its true content, and streamers over it that are closed at the end."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = directory / "weights"
        self.open: list[DiskStreamer] = []
        self.readers: list[WatchedReader] = []
        self._layouts: list[BlockLayout] = []
        generator = torch.Generator().manual_seed(0)
        # Values below 1 in size never look like the spoiled slot.
        self.values = [torch.rand((3, 700 + 50 * n), generator=generator).bfloat16() for n in range(BLOCKS)]
        content = b"\0" * 56
        for n, values in enumerate(self.values):
            shape = tuple(values.shape)
            size = values.numel() * 2
            entry = TensorEntry(f"block.{n}", "BF16", shape, self.path, len(content), size)
            self._layouts.append(layout_block([entry]))
            content += values.view(torch.uint8).numpy().tobytes()
        self.path.write_bytes(content)
        for module in (read_ahead, disk_streamer):
            monkeypatch.setattr(module, "DirectReader", self._make_reader)

    def _make_reader(self) -> WatchedReader:
        self.readers.append(WatchedReader())
        return self.readers[-1]

    @property
    def reader(self) -> WatchedReader:
        return self.readers[-1]

    def layouts(self, count: int = BLOCKS) -> list[BlockLayout]:
        return self._layouts[:count]

    def stream(self, slots: int = 2, blocks: int = BLOCKS) -> DiskStreamer:
        made = DiskStreamer(self._layouts[:blocks], slots)
        self.open.append(made)
        return made

    def assert_block(self, number: int, tensors: dict[str, Tensor]) -> None:
        for stream in self.open:
            stream._ahead.check_integrity()
        assert list(tensors) == [f"block.{number}"]
        assert torch.equal(tensors[f"block.{number}"], self.values[number]), f"content of block {number}"


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = Rig(tmp_path, monkeypatch)
    yield made
    for reader in made.readers:
        reader.gate.set()
    for stream in made.open:
        stream.close()


def soon(condition: Callable[[], bool]) -> bool:
    """Whether it comes true before long."""
    deadline = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


def one_pass(rig: Rig, stream: DiskStreamer, blocks: int = BLOCKS) -> None:
    with closing(stream.blocks()) as arriving:
        count = 0
        for number, tensors in enumerate(arriving):
            rig.assert_block(number, tensors)
            count += 1
    stream._ahead.check_integrity()
    assert count == blocks


@pytest.mark.parametrize("slots", [2, 3, 8])
@pytest.mark.parametrize("blocks", [1, 2, 3, BLOCKS])
def test_every_pass_hands_over_all_blocks_in_order(rig: Rig, slots: int, blocks: int) -> None:
    stream = rig.stream(slots, blocks)
    assert stream.reads_files
    for _ in range(4):
        one_pass(rig, stream, blocks)


@pytest.mark.parametrize("slots", [2, 3, 8])
def test_slots_fill_with_the_next_pass_while_nobody_consumes(rig: Rig, slots: int) -> None:
    """While the draft runs, reads wrap around; they stop when every slot is full."""
    stream = rig.stream(slots)
    assert soon(lambda: rig.reader.done == slots)
    one_pass(rig, stream)
    assert soon(lambda: rig.reader.done == BLOCKS + slots)
    time.sleep(0.02)
    assert rig.reader.done == BLOCKS + slots
    firsts = [layout.extents[0].first_byte for layout in rig.layouts()]
    assert rig.reader.begun == [firsts[n % BLOCKS] for n in range(BLOCKS + slots)]


@pytest.mark.parametrize("slots", [2, 3])
def test_a_block_in_use_is_never_overwritten(rig: Rig, slots: int) -> None:
    """The reader spoils a slot before it reads: it must not do so before the consumer asks for the next block."""
    stream = rig.stream(slots)
    for turn in range(3):
        for number, tensors in enumerate(stream.blocks()):
            ahead = turn * BLOCKS + number + slots
            assert soon(lambda ahead=ahead: rig.reader.done == ahead), "every other slot fills meanwhile"
            time.sleep(0.002)
            rig.assert_block(number, tensors)


def test_the_consumer_waits_for_a_read_in_flight(rig: Rig) -> None:
    """A slot that is being read into is not handed over."""
    stream = rig.stream(2)
    assert soon(lambda: rig.reader.done == 2)
    arriving = stream.blocks()
    next(arriving)
    rig.reader.gate.clear()
    second = next(arriving)  # releases slot 0: the third block is being read into it
    assert soon(lambda: len(rig.reader.begun) == 3)
    rig.assert_block(1, second)
    third: list[Any] = []

    def consume() -> None:
        block = next(arriving)
        block["block.2"].sum()  # waits for what is read
        third.append(block)

    consumer = threading.Thread(target=consume)
    consumer.start()
    consumer.join(0.2)
    assert not third
    rig.reader.gate.set()
    consumer.join()
    rig.assert_block(2, third[0])
    assert stream.counters().wait_time_s > 0
    arriving.close()


@pytest.mark.parametrize("left_after", range(BLOCKS))
def test_leaving_early_makes_the_next_pass_start_at_the_first_block(rig: Rig, left_after: int) -> None:
    stream = rig.stream(3)
    one_pass(rig, stream)
    with closing(stream.blocks()) as arriving:
        taken = list(islice(arriving, left_after + 1))
    assert len(taken) == left_after + 1
    one_pass(rig, stream)
    one_pass(rig, stream)


def test_a_read_in_flight_when_the_pass_is_left_is_dropped(rig: Rig) -> None:
    """Its block belongs to the abandoned pass; counted, it would pose as the first one of the next."""
    stream, reader = rig.stream(2), rig.reader
    second = rig.layouts()[1].extents[0].first_byte
    for _ in range(3):
        with closing(stream.blocks()) as arriving:
            rig.assert_block(0, next(arriving))
            assert soon(lambda: reader.begun[-1] == second and reader.done == len(reader.begun))
            rig.reader.gate.clear()
            rig.assert_block(1, next(arriving))
            begun = len(rig.reader.begun)
            assert soon(lambda begun=begun: rig.reader.done < len(rig.reader.begun))
        rig.reader.gate.set()
        one_pass(rig, stream)


def test_leaving_at_any_moment_never_shows_a_wrong_block(rig: Rig) -> None:
    chance = random.Random(0)
    stream = rig.stream(3)
    for _ in range(150):
        leave = chance.randrange(BLOCKS + 1)
        with closing(stream.blocks()) as arriving:
            for number, tensors in enumerate(arriving):
                rig.assert_block(number, tensors)
                if chance.random() < 0.2:
                    time.sleep(0.0005)
                if number == leave:
                    break
        stream._ahead.check_integrity()
    one_pass(rig, stream)


def test_an_error_in_the_consumer_restarts_the_pass(rig: Rig) -> None:
    stream = rig.stream(2)

    def fail_midway() -> None:
        with closing(stream.blocks()) as arriving:
            for number, _ in enumerate(arriving):
                if number == 2:
                    raise ValueError("the block failed")

    with pytest.raises(ValueError, match="the block failed"):
        fail_midway()
    stream._ahead.check_integrity()
    one_pass(rig, stream)


def test_a_failing_read_surfaces_in_the_consumer_and_stays(rig: Rig) -> None:
    with rig.path.open("r+b") as file:
        file.truncate(rig.layouts()[3].placements[0].entry.offset_bytes + 10)
    stream = rig.stream(2)
    for _ in range(2):
        with pytest.raises(IntegrityError, match=r"weights: the file ends early at byte \d+"):
            one_pass(rig, stream)
        stream._ahead.check_integrity()
    assert soon(lambda: rig.reader.closed)


def test_whatever_the_reader_raises_surfaces(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_self: DirectReader, _extents: Sequence[Extent], _buffer: memoryview) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(WatchedReader, "read_extents", broken)
    with pytest.raises(MemoryError, match="no room"):
        one_pass(rig, rig.stream(2))


def weight_readers() -> int:
    return sum(thread.name == "weight-reader" for thread in threading.enumerate())


def test_close_joins_the_thread_and_closes_the_files(rig: Rig) -> None:
    before = weight_readers()
    stream = rig.stream(2)
    assert weight_readers() == before + 1
    one_pass(rig, stream)
    stream.close()
    assert weight_readers() == before
    assert rig.reader.closed


def test_close_waits_for_a_read_in_flight(rig: Rig) -> None:
    before = weight_readers()
    stream = rig.stream(2)
    assert soon(lambda: rig.reader.done == 2)
    rig.reader.gate.clear()
    arriving = stream.blocks()
    next(arriving)
    next(arriving)
    assert soon(lambda: len(rig.reader.begun) == 3)
    threading.Timer(0.02, rig.reader.gate.set).start()
    arriving.close()
    stream.close()
    assert weight_readers() == before


def test_close_after_a_failure_returns(rig: Rig) -> None:
    rig.path.unlink()
    stream = rig.stream(2)
    with pytest.raises(IntegrityError):
        one_pass(rig, stream)
    stream.close()
    assert rig.reader.closed


def test_counters_count_what_was_handed_over(rig: Rig) -> None:
    stream = rig.stream(3)
    pass_bytes = sum(layout.tensor_bytes for layout in rig.layouts())
    one_pass(rig, stream)
    after_one = stream.counters()
    assert after_one.streamed_bytes == pass_bytes
    assert after_one.read_time_s > 0
    one_pass(rig, stream)
    with closing(stream.blocks()) as arriving:
        next(arriving)
        next(arriving)
    since = stream.counters().since(after_one)
    assert since.streamed_bytes == pass_bytes + rig.layouts()[0].tensor_bytes


def test_counters_subtract() -> None:
    found = StreamCounters(5.0, 70, 3.0).since(StreamCounters(1.0, 20, 2.5))
    assert found == StreamCounters(4.0, 50, 0.5)


def test_buffered_reading_is_reported_however_early_one_asks(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first file is open nothing is known: the answer waits for it."""
    monkeypatch.delattr(os, "O_DIRECT")
    slow_open = DirectReader._open

    def opened_late(self: DirectReader, path: Path) -> tuple[int, bool]:
        time.sleep(0.02)
        return slow_open(self, path)

    monkeypatch.setattr(DirectReader, "_open", opened_late)
    assert not rig.stream(2).is_direct


def test_resident_blocks_have_the_bits_and_the_alignment_of_streamed_ones(rig: Rig) -> None:
    """Trap 14: kernels may choose their code by the pointer's alignment."""
    held = read_resident(rig.layouts())
    stream = rig.stream(2)
    for number, tensors in enumerate(stream.blocks()):
        rig.assert_block(number, held[number])
        (mine,), (theirs,) = held[number].values(), tensors.values()
        offset = rig.layouts()[number].placements[0].entry.offset_bytes
        assert mine.data_ptr() % PAGE_BYTES == theirs.data_ptr() % PAGE_BYTES == offset % PAGE_BYTES


def test_resident_blocks_have_memory_of_their_own_and_leave_no_file_open(rig: Rig) -> None:
    held = read_resident(rig.layouts())
    held[0]["block.0"].zero_()
    rig.assert_block(1, held[1])
    rig.assert_block(0, read_resident(rig.layouts(1))[0])
    assert all(reader.closed for reader in rig.readers)


def test_a_failed_resident_read_leaves_no_file_open(rig: Rig) -> None:
    rig.path.write_bytes(b"short")
    with pytest.raises(IntegrityError):
        read_resident(rig.layouts())
    assert rig.reader.closed


@pytest.mark.parametrize("name", WEIGHT_DTYPES)
def test_tensors_have_their_dtype_and_shape(tmp_path: Path, name: str) -> None:
    path, dtype = tmp_path / "weights", torch_dtype(name)
    values = torch.randn(4, 6).to(dtype)
    path.write_bytes(b"\0" * 8 + values.view(torch.uint8).numpy().tobytes())
    entry = TensorEntry("w", name, (4, 6), path, 8, values.numel() * dtype.itemsize)
    (block,) = read_resident([layout_block([entry])])
    assert torch.equal(block["w"], values)


def test_asking_for_the_next_block_releases_a_slot_and_does_not_wait(rig: Rig) -> None:
    """So that what is done between two layers never holds up the link."""
    stream = rig.stream(slots=2)
    with closing(stream.blocks()) as arriving:
        first = next(arriving)
        rig.assert_block(0, dict(first))
        assert soon(lambda: rig.reader.done == 2)
        rig.reader.gate.clear()
        second = next(arriving)
        assert soon(lambda: len(rig.reader.begun) == 3), "the first slot is read into again"
        rig.assert_block(1, dict(second))
        third = next(arriving)
        assert rig.reader.done == 2, "the third block is not there, and nobody waited"
        rig.reader.gate.set()
        rig.assert_block(2, dict(third))


def test_a_block_that_is_never_looked_at_is_waited_for_before_the_next(rig: Rig) -> None:
    stream = rig.stream(slots=2)
    with closing(stream.blocks()) as arriving:
        seen = [dict(block) if number % 2 else None for number, block in enumerate(arriving)]
    assert [block is not None for block in seen] == [False, True, False, True, False]
    one_pass(rig, stream)
