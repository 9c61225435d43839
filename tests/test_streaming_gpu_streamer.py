"""Streaming to a GPU, on a simulated one: right bytes in whatever order the events allow, time, memory, failures."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pytest
import torch
from fake_gpu import (
    BLOCK_NAMES,
    COPY_MS_PER_PAGE,
    ORDERS,
    Machine,
    copies_first,
    kernels_first,
    make_layers,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import CPU, Tiny
from torch import Tensor

from subspec_cli.checkpoint.layer_tensors import block_entries
from subspec_cli.errors import IntegrityError, ResourceError
from subspec_cli.files.direct_io import PAGE_BYTES, DirectReader, Extent
from subspec_cli.reporter import Reporter
from subspec_cli.streaming.gpu_layers import LayerLayout, layout_layer, read_resident_layer
from subspec_cli.streaming.gpu_streamer import GpuStreamer, open_gpu_streamer

WAIT_S = 20


@dataclass
class Rig:
    """Layers, a simulated GPU, and what its kernels saw."""

    machine: Machine
    layers: list[LayerLayout]
    values: dict[str, Tensor]
    seen: list[tuple[str, Tensor]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    open: list[GpuStreamer] = field(default_factory=list)

    @property
    def layer_bytes(self) -> int:
        """Bytes of a slot or a pinned buffer."""
        return max(layer.whole.buffer_bytes for layer in self.layers)

    def stream(
        self, slots: int = 2, pinned: int | None = None, ring: int = 2, most_bytes: int = 1 << 60
    ) -> GpuStreamer:
        made = open_gpu_streamer(
            self.layers,
            pinned_layers=len(self.layers) if pinned is None else pinned,
            ring_slots=ring,
            slots=slots,
            most_bytes=most_bytes,
            device=CPU,
            reporter=Reporter(self.said.append, self.said.append),
        )
        self.open.append(made)
        return made

    def use(self, tensors: dict[str, Tensor], cost_ms: float = 0.0) -> None:
        """Queue a kernel that reads the block."""
        plain = {name: tensor.as_subclass(torch.Tensor) for name, tensor in tensors.items()}
        self.machine.compute.add(
            lambda: self.seen.extend((name, tensor.clone()) for name, tensor in plain.items()), cost_ms
        )

    def one_pass(
        self, stream: GpuStreamer, leave_after: int | None = None, cost_ms: Sequence[float] = (0.0,)
    ) -> None:
        """All blocks of all layers, or the first few; a kernel of layer n takes `cost_ms[n]` per block."""
        with closing(stream.blocks()) as arriving:
            for number, tensors in enumerate(islice(arriving, leave_after)):
                self.use(tensors, cost_ms[number // len(BLOCK_NAMES) % len(cost_ms)])
                self.check_ring(stream)
        self.check_ring(stream)

    @staticmethod
    def check_ring(stream: GpuStreamer) -> None:
        if stream._ring is not None:
            stream._ring.reader.check_integrity()

    def names(self, blocks: int | None = None) -> list[str]:
        """Tensors in the order of use, of the first blocks or of all."""
        layers = range(len(self.layers))
        all_blocks = [[f"{layer}.{name}" for name in block] for layer in layers for block in BLOCK_NAMES]
        return [name for block in all_blocks[:blocks] for name in block]

    def assert_kernels_saw(self, names: list[str]) -> None:
        self.machine.finish()
        assert [name for name, _ in self.seen] == names
        for at, (name, found) in enumerate(self.seen):
            assert torch.equal(found, self.values[name]), f"kernel {at}: content of {name}"

    def close(self) -> None:
        while self.open:
            self.open.pop().close()


@pytest.fixture(params=ORDERS)
def rig(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Five layers on a GPU that takes every order in turn."""
    made = Rig(Machine(ORDERS[request.param]()).install(monkeypatch), *make_layers(tmp_path, 5))
    yield made
    made.close()


@pytest.fixture
def plain_rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """As `rig`, where the order does not matter."""
    made = Rig(Machine(copies_first).install(monkeypatch), *make_layers(tmp_path, 5))
    yield made
    made.close()


def soon(condition: Callable[[], bool]) -> bool:
    """Whether it holds before long."""
    end = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


@pytest.mark.parametrize("slots", [2, 3, 7])
def test_kernels_see_their_own_layer_whatever_runs_first(rig: Rig, slots: int) -> None:
    """A copy waits until the slot's last kernel is done, a kernel until its copy is; the host waits for neither."""
    stream = rig.stream(slots)
    for _ in range(3):
        rig.one_pass(stream)
    assert not rig.seen, "the host waited for the GPU"
    rig.assert_kernels_saw(rig.names() * 3)


@pytest.mark.parametrize("pinned", [0, 1, 3])
@pytest.mark.parametrize("ring", [1, 2, 3])
def test_layers_from_disk_arrive_in_their_turn(rig: Rig, pinned: int, ring: int) -> None:
    """A buffer of the ring is read into only once the copy out of it is made."""
    if pinned + ring >= len(rig.layers):
        pinned = 1
    stream = rig.stream(2, pinned, ring)
    assert stream.reads_files
    for _ in range(3):
        rig.one_pass(stream)
    rig.assert_kernels_saw(rig.names() * 3)


def test_a_layer_is_one_copy(plain_rig: Rig) -> None:
    plain_rig.one_pass(plain_rig.stream(2))
    sizes = [layer.whole.buffer_bytes for layer in plain_rig.layers]
    assert plain_rig.machine.copies == sizes + sizes[:2]


@pytest.mark.parametrize("slots", [2, 4])
@pytest.mark.parametrize("pinned", [5, 2, 0])
def test_between_passes_every_slot_is_filled(plain_rig: Rig, slots: int, pinned: int) -> None:
    """Nobody asks, and still the next layers are on their way: copies of the pass and of the next one's start."""
    stream, layers = plain_rig.stream(slots, pinned), len(plain_rig.layers)
    assert soon(lambda: len(plain_rig.machine.copies) == slots)
    plain_rig.one_pass(stream)
    assert soon(lambda: len(plain_rig.machine.copies) == layers + slots)
    plain_rig.one_pass(stream)
    plain_rig.assert_kernels_saw(plain_rig.names() * 2)
    assert soon(lambda: len(plain_rig.machine.copies) == 2 * layers + slots)


@pytest.mark.parametrize("pinned", [5, 1])
@pytest.mark.parametrize("left_after", [1, 4, 6, 8, 19])
def test_leaving_early_makes_the_next_pass_start_at_the_first_layer(
    rig: Rig, left_after: int, pinned: int
) -> None:
    stream = rig.stream(2, pinned)
    rig.one_pass(stream)
    rig.one_pass(stream, left_after)
    rig.one_pass(stream)
    rig.one_pass(stream, left_after)
    rig.one_pass(stream)
    part = rig.names(left_after)
    rig.assert_kernels_saw([*rig.names(), *part, *rig.names(), *part, *rig.names()])


def test_leaving_during_a_read_drops_what_it_brings(plain_rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer being read when the pass is abandoned must not pass for the first layer of the next."""
    gate, begun = threading.Event(), []
    gate.set()
    read = DirectReader.read_extents

    def gated(self: DirectReader, extents: Sequence[Extent], buffer: memoryview) -> None:
        begun.append(extents)
        assert gate.wait(WAIT_S)
        read(self, extents, buffer)

    monkeypatch.setattr(DirectReader, "read_extents", gated)
    stream = plain_rig.stream(2, 0, 2)
    with closing(stream.blocks()) as arriving:
        plain_rig.use(next(arriving))
        assert soon(lambda: len(begun) == 4), "two in slots, two in the ring"
        gate.clear()
        for _ in range(4):
            plain_rig.use(next(arriving))
        assert soon(lambda: len(begun) == 5)
    gate.set()
    plain_rig.one_pass(stream)
    plain_rig.assert_kernels_saw([*plain_rig.names(5), *plain_rig.names()])


def expected_times(
    copies_ms: Sequence[float], kernels_ms: Sequence[float], slots: int
) -> tuple[float, float]:
    """Seconds in which the link was busy and in which kernels stood still, by the rules of two queues."""
    copied: list[float] = []
    computed: list[float] = []
    stalled = 0.0
    for n, kernel_ms in enumerate(kernels_ms):
        begin = max(copied[-1] if copied else 0.0, computed[n - slots] if n >= slots else 0.0)
        copied.append(begin + copies_ms[n])
        before = computed[-1] if computed else 0.0
        stalled += max(0.0, copied[n] - before)
        computed.append(max(before, copied[n]) + kernel_ms)
    return sum(copies_ms) / 1000, stalled / 1000


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("cost_ms", [(0.5,), (50.0,), (1.0, 30.0, 0.0, 6.0, 2.0)])
def test_time_is_the_gpu_own(rig: Rig, slots: int, cost_ms: tuple[float, ...]) -> None:
    """Busy link and standing kernels, by events: the host runs ahead and has nothing to tell."""
    stream, layers = rig.stream(slots), len(rig.layers)
    assert stream.counters().read_time_s == 0
    for _ in range(2):
        rig.one_pass(stream, cost_ms=cost_ms)
    rig.machine.finish()
    sizes = [layer.whole.buffer_bytes / PAGE_BYTES * COPY_MS_PER_PAGE for layer in rig.layers] * 2
    kernels = [len(BLOCK_NAMES) * cost_ms[n % len(cost_ms)] for n in range(layers)] * 2
    ahead = sum(sizes[:slots]) / 1000  # for the third pass
    busy_s, stalled_s = expected_times(sizes, kernels, slots)
    found = stream.counters()
    assert found.read_time_s == pytest.approx(busy_s + ahead)
    assert found.wait_time_s == pytest.approx(stalled_s)
    assert found.streamed_bytes == 2 * sum(layer.whole.tensor_bytes for layer in rig.layers)


def test_counting_never_waits_for_the_gpu(plain_rig: Rig) -> None:
    stream = plain_rig.stream()
    plain_rig.one_pass(stream)
    before = stream.counters()
    assert (before.read_time_s, before.wait_time_s) == (0, 0)
    assert before.streamed_bytes > 0
    assert not plain_rig.seen


def test_reading_from_disk_counts_where_it_takes_longer(
    plain_rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = DirectReader.read_extents

    def slow(self: DirectReader, extents: Sequence[Extent], buffer: memoryview) -> None:
        time.sleep(0.03)
        read(self, extents, buffer)

    monkeypatch.setattr(DirectReader, "read_extents", slow)
    stream = plain_rig.stream(2, 2, 2)
    plain_rig.one_pass(stream)
    plain_rig.machine.finish()
    assert stream.counters().read_time_s >= 3 * 0.03


@pytest.mark.parametrize("pinned", [5, 2])
def test_closing_waits_for_copies_and_releases_everything(plain_rig: Rig, pinned: int) -> None:
    threads = threading.active_count()
    stream = plain_rig.stream(2, pinned)
    plain_rig.one_pass(stream)
    assert len(plain_rig.machine.pinned) == {5: 5, 2: 4}[pinned]
    plain_rig.close()
    assert not plain_rig.machine.pinned
    assert not any(other.queue for other in plain_rig.machine.streams if other.name == "copy")
    assert threading.active_count() == threads


def test_memory_taken_is_what_is_documented(plain_rig: Rig) -> None:
    plain_rig.stream(3, 1, 2)
    assert plain_rig.machine.gpu_bytes == 3 * plain_rig.layer_bytes + PAGE_BYTES
    assert list(plain_rig.machine.pinned.values()) == [plain_rig.layer_bytes] * 3


def test_one_slot_is_refused(plain_rig: Rig) -> None:
    with pytest.raises(AssertionError):
        plain_rig.stream(1)
    assert not plain_rig.machine.pinned


@pytest.mark.parametrize("refused_by", ["system", "limit"])
@pytest.mark.parametrize("buffers", [1, 2, 3, 4])
def test_what_cannot_be_pinned_comes_from_disk_and_is_said_once(
    plain_rig: Rig, refused_by: str, buffers: int
) -> None:
    room = buffers * plain_rig.layer_bytes + PAGE_BYTES
    if refused_by == "system":
        plain_rig.machine.pinnable_bytes = room
    stream = plain_rig.stream(2, most_bytes=room if refused_by == "limit" else 1 << 60)
    from_disk = 5 - max(0, buffers - 2)
    (warning,) = [text for text in plain_rig.said if "pinned" in text and "disk" in text]
    assert f"{from_disk} of 5 streamed layers are read from disk" in warning
    assert ("the limit is" if refused_by == "limit" else "CUDA error 2") in warning
    assert not plain_rig.machine.error_left_behind, "the next kernel would have failed"
    assert len(plain_rig.machine.pinned) == buffers
    for _ in range(2):
        plain_rig.one_pass(stream)
    plain_rig.assert_kernels_saw(plain_rig.names() * 2)


def test_everything_pinned_is_worth_no_word(plain_rig: Rig) -> None:
    stream = plain_rig.stream(2, most_bytes=5 * plain_rig.layer_bytes)
    assert not stream.reads_files
    assert stream.is_direct
    assert not [text for text in plain_rig.said if "disk" in text]


def test_no_pinned_memory_at_all_names_figures_and_a_way_out(plain_rig: Rig) -> None:
    plain_rig.machine.pinnable_bytes = 0
    with pytest.raises(
        ResourceError, match=r"no host memory can be pinned for a layer of .*CUDA error 2"
    ) as info:
        plain_rig.stream(2)
    assert "WSL2" in info.value.hint
    plain_rig.machine.pinnable_bytes = 1 << 60
    with pytest.raises(ResourceError, match=r"the limit is 0 B"):
        plain_rig.stream(2, most_bytes=0)
    assert not plain_rig.machine.pinned


def test_memory_that_cannot_be_mapped_is_a_refusal(plain_rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("subspec_cli.streaming.pinned_memory.mmap.mmap", no_room)
    with pytest.raises(ResourceError, match="Cannot allocate memory"):
        plain_rig.stream(2)


@pytest.mark.parametrize("pinned", [5, 0])
def test_a_file_that_cannot_be_read_leaves_nothing_pinned(plain_rig: Rig, pinned: int) -> None:
    Path(plain_rig.layers[0].whole.extents[0].path).write_bytes(b"short")
    if pinned:
        with pytest.raises(IntegrityError):
            plain_rig.stream(2, pinned)
    else:
        with pytest.raises(IntegrityError):
            plain_rig.one_pass(plain_rig.stream(2, pinned))
        plain_rig.close()
    assert not plain_rig.machine.pinned


def test_a_failure_of_the_reader_reaches_the_consumer_again_and_again(
    plain_rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: DirectReader, extents: Sequence[Extent], buffer: memoryview) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(DirectReader, "read_extents", broken)
    stream = plain_rig.stream(2, 0)
    for _ in range(2):
        with pytest.raises(MemoryError, match="no room"):
            plain_rig.one_pass(stream)


def test_a_copy_that_the_reader_thread_cannot_queue_reaches_the_consumer(
    plain_rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread queues copies of what it has read; the consumer must not wait for one that never comes."""
    copy = GpuStreamer._queue_copy

    def failing(self: GpuStreamer, number: int, source: Tensor, slot: object) -> None:
        if threading.current_thread().name == "weight-reader":
            raise RuntimeError("no such stream")
        copy(self, number, source, slot)

    monkeypatch.setattr(GpuStreamer, "_queue_copy", failing)
    stream = plain_rig.stream(2, 0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such stream"):
            plain_rig.one_pass(stream)


def test_buffered_reading_is_reported_however_early_one_asks(
    plain_rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    slow_open = DirectReader._open

    def opened_late(self: DirectReader, path: Path) -> tuple[int, bool]:
        time.sleep(0.02)
        return slow_open(self, path)

    monkeypatch.setattr(DirectReader, "_open", opened_late)
    assert not plain_rig.stream(2, 0).is_direct


@pytest.mark.parametrize("pinned", [5, 1])
def test_resident_and_streamed_tensors_lie_alike_within_a_page(plain_rig: Rig, pinned: int) -> None:
    """Trap 14: kernels may choose their code by the pointer's alignment."""
    stream = plain_rig.stream(2, pinned)
    arriving = stream.blocks()
    for layer in plain_rig.layers:
        held = read_resident_layer(layer, CPU)
        for block, placements in zip(held, layer.blocks, strict=True):
            streamed = next(arriving)
            assert list(block) == list(streamed) == [item.entry.name for item in placements]
            for item in placements:
                offset = item.entry.offset_bytes % PAGE_BYTES
                name = item.entry.name
                assert block[name].data_ptr() % PAGE_BYTES == streamed[name].data_ptr() % PAGE_BYTES == offset
                assert torch.equal(block[name].as_subclass(torch.Tensor), plain_rig.values[name])
    arriving.close()


@pytest.mark.parametrize("pinned", [3, 0])
def test_a_model_computes_the_same_over_either_streamer(
    tiny: Callable[..., Tiny], monkeypatch: pytest.MonkeyPatch, pinned: int
) -> None:
    """The decoder gets the blocks it asks for, by their names and in its order, as from the disk streamer."""
    model = tiny("qwen2", sharded=True)
    prompt = list(range(20))
    with closing(model.streamer((0, 2))) as from_disk:
        expected = model.prefill(model.target(model.source((1,), from_disk)), model.kv(), prompt)
    # Kernels run on the host here, so the host waits for every layer.
    Machine(copies_first, host_waits=True).install(monkeypatch)
    over_gpu = open_gpu_streamer(
        [layout_layer(block_entries(model.checkpoint.tensors, layer)) for layer in (0, 2)],
        pinned_layers=pinned,
        ring_slots=1,
        slots=2,
        most_bytes=1 << 30,
        device=CPU,
        reporter=Reporter(),
    )
    with closing(over_gpu):
        found = model.prefill(model.target(model.source((1,), over_gpu)), model.kv(), prompt)
    assert torch.equal(found.as_subclass(torch.Tensor), expected)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bytes_are_right_in_every_layout_mix_and_order(tmp_path: Path, data: st.DataObject) -> None:
    """Random layers, memory limits, slots, rings, passes left early and orders of the GPU's work."""
    # All is drawn first: a draw may end an example, and an open stream would stay open.
    count, file = data.draw(st.integers(1, 7), "layers"), data.draw(st.integers(0, 5), "file")
    order = data.draw(st.sampled_from([copies_first, kernels_first, None]), "order")
    dice = random.Random(data.draw(st.integers(0, 999), "seed"))
    pinnable, pinned = data.draw(st.integers(1, 8), "pinnable"), data.draw(st.integers(0, count), "pinned")
    slots, ring = data.draw(st.integers(2, 4), "slots"), data.draw(st.integers(1, 3), "ring")
    passes = data.draw(st.lists(st.none() | st.integers(1, 4 * count), max_size=4), "passes")
    layers, values = make_layers(tmp_path, count, file)
    with pytest.MonkeyPatch.context() as patch:
        rig = Rig(Machine(order or dice.choice).install(patch), layers, values)
        rig.machine.pinnable_bytes = pinnable * rig.layer_bytes
        stream = rig.stream(slots, pinned, ring)
        try:
            for leave_after in passes:
                rig.one_pass(stream, leave_after)
            rig.assert_kernels_saw([name for leave_after in passes for name in rig.names(leave_after)])
        finally:
            rig.close()
        assert not rig.machine.pinned
