"""Streaming to a card, on a simulated one: what runs when is decided by events alone, in the worst order.

The fake queues every copy and kernel on its stream and runs them only when the host waits, in an order that an
adversary picks among those the events allow. A missing event then shows as wrong bytes.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import CPU
from torch import Tensor

from subspec_cli.placement import pinned
from subspec_cli.placement.pinned import PinnedStreamer
from subspec_cli.store.direct_io import BlockLayout, allocate_buffer, layout_block
from subspec_cli.store.safetensors_header import TensorEntry

BLOCKS = 5
SPOILED = 0xFF


@dataclass
class Event:
    """Done as often as recorded, once the streams get there."""

    machine: Machine
    recorded: int = 0
    reached: int = 0

    def record(self, stream: Stream) -> None:
        self.recorded += 1
        number = self.recorded
        stream.add(lambda: setattr(self, "reached", max(self.reached, number)))


@dataclass
class Stream:
    """Work in order; an entry without work waits for an event to be reached."""

    machine: Machine
    name: str
    queue: deque[tuple[Callable[[], Any], Callable[[], bool]]] = field(default_factory=deque)

    def add(self, work: Callable[[], Any], may_run: Callable[[], bool] = lambda: True) -> None:
        self.queue.append((work, may_run))

    def wait_event(self, event: Event) -> None:
        # As on the card: what is waited for is the latest record at the time of the call, if there is any.
        number = event.recorded
        self.add(lambda: None, lambda: event.reached >= number)

    def wait_stream(self, other: Stream) -> None:
        event = Event(self.machine)
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        self.machine.run_until(lambda: not self.queue)


class Machine:
    """A card with streams of pending work; `choose` picks the next stream among those that could go on."""

    def __init__(self, choose: Callable[[list[Stream]], Stream]) -> None:
        self.streams: list[Stream] = []
        self.choose = choose
        self.compute = self.current = self.new_stream("compute")
        self.copied_bytes = 0

    def new_stream(self, name: str) -> Stream:
        self.streams.append(Stream(self, name))
        return self.streams[-1]

    def run_until(self, done: Callable[[], bool]) -> None:
        while not done():
            ready = [stream for stream in self.streams if stream.queue and stream.queue[0][1]()]
            assert ready, "streams wait for each other for ever"
            work, _ = self.choose(ready).queue.popleft()
            work()

    def finish(self) -> None:
        self.run_until(lambda: not any(stream.queue for stream in self.streams))

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def empty(self, size: int, *, dtype: torch.dtype, device: Any = None, pin_memory: bool = False) -> Tensor:
        """Memory of the host, or of the card, where kernels of its last owner may still be pending."""
        memory = torch.frombuffer(allocate_buffer(size), dtype=dtype, count=size)
        if pin_memory:
            return memory
        self.current.add(lambda: memory.fill_(SPOILED))
        card = memory.as_subclass(CardTensor)
        card.machine = self
        return card

    def as_torch(self) -> SimpleNamespace:
        """What `pinned` uses of torch."""
        cuda = SimpleNamespace(
            Event=lambda: Event(self),
            Stream=lambda _device: self.new_stream("copy"),
            stream=self.use,
            current_stream=lambda _device: self.current,
        )
        return SimpleNamespace(cuda=cuda, empty=self.empty, uint8=torch.uint8, Tensor=Tensor)


class CardTensor(torch.Tensor):
    """Memory of the card: a copy into it is queued, not made."""

    machine: Machine

    def __getitem__(self, index: Any) -> CardTensor:
        part = super().__getitem__(index)
        part.machine = self.machine
        return part

    def copy_(self, source: Tensor, non_blocking: bool = False) -> CardTensor:
        assert non_blocking
        target = self.as_subclass(torch.Tensor)
        self.machine.copied_bytes += source.numel()
        self.machine.current.add(lambda: target.copy_(source))
        return self


def copies_first(ready: list[Stream]) -> Stream:
    return ready[-1]


def kernels_first(ready: list[Stream]) -> Stream:
    return ready[0]


ORDERS: dict[str, Callable[[], Callable[[list[Stream]], Stream]]] = {
    "copies first": lambda: copies_first,
    "kernels first": lambda: kernels_first,
    **{f"seed {seed}": lambda seed=seed: random.Random(seed).choice for seed in range(4)},
}


def make_layouts(directory: Path) -> tuple[list[BlockLayout], list[Tensor]]:
    """Blocks of a file and their true content."""
    path = directory / "weights"
    values = [torch.rand((3, 500 + 90 * n)).bfloat16() for n in range(BLOCKS)]
    content, layouts = b"\0" * 56, []
    for n, block in enumerate(values):
        entry = TensorEntry(f"block.{n}", "BF16", tuple(block.shape), path, len(content), block.numel() * 2)
        layouts.append(layout_block([entry]))
        content += block.view(torch.uint8).numpy().tobytes()
    path.write_bytes(content)
    return layouts, values


@dataclass
class Rig:
    """A streamer on a simulated card, and what its kernels saw."""

    machine: Machine
    layouts: list[BlockLayout]
    values: list[Tensor]
    seen: list[tuple[int, Tensor]] = field(default_factory=list)

    def stream(self, slots: int = 2) -> PinnedStreamer:
        return PinnedStreamer(self.layouts, slots, CPU)

    def use(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Queue a kernel that reads the block."""
        tensor = tensors[f"block.{number}"].as_subclass(torch.Tensor)
        self.machine.compute.add(lambda: self.seen.append((number, tensor.clone())))

    def one_pass(self, stream: PinnedStreamer, leave_after: int | None = None) -> None:
        with closing(stream.blocks()) as arriving:
            for number, tensors in enumerate(islice(arriving, leave_after)):
                self.use(number, tensors)

    def assert_kernels_saw(self, numbers: list[int]) -> None:
        self.machine.finish()
        assert [number for number, _ in self.seen] == numbers
        for at, (number, found) in enumerate(self.seen):
            assert torch.equal(found, self.values[number]), f"kernel {at}: content of block {number}"


@pytest.fixture(params=ORDERS)
def rig(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    machine = Machine(ORDERS[request.param]())
    layouts, values = make_layouts(tmp_path)
    monkeypatch.setattr(pinned, "torch", machine.as_torch())
    return Rig(machine, layouts, values)


@pytest.mark.parametrize("slots", [2, 3])
def test_kernels_see_their_own_block_whatever_runs_first(rig: Rig, slots: int) -> None:
    """A copy waits until the slot's last kernel is done, a kernel until its copy is; the host waits for neither."""
    stream = rig.stream(slots)
    for _ in range(3):
        rig.one_pass(stream)
    assert not rig.seen, "the host ran ahead of the card"
    rig.assert_kernels_saw([*range(BLOCKS)] * 3)


def test_more_slots_than_blocks_are_filled_too(rig: Rig) -> None:
    stream = rig.stream(BLOCKS + 2)
    rig.one_pass(stream)
    rig.one_pass(stream)
    rig.assert_kernels_saw([*range(BLOCKS)] * 2)


def test_a_kernel_before_the_next_pass_hides_the_first_copies(rig: Rig) -> None:
    """Between passes every slot is being filled with the next blocks: nothing is left to ask for."""
    stream = rig.stream(3)
    sizes = [layout.buffer_bytes for layout in rig.layouts]
    assert rig.machine.copied_bytes == sum(sizes[:3])
    rig.one_pass(stream)
    assert rig.machine.copied_bytes == sum(sizes) + sum(sizes[:3])


@pytest.mark.parametrize("left_after", range(1, BLOCKS))
def test_leaving_early_makes_the_next_pass_start_at_the_first_block(rig: Rig, left_after: int) -> None:
    stream = rig.stream()
    rig.one_pass(stream)
    rig.one_pass(stream, left_after)
    rig.one_pass(stream)
    rig.assert_kernels_saw([*range(BLOCKS), *range(left_after), *range(BLOCKS)])


def test_counters_count_tensor_bytes(rig: Rig) -> None:
    stream = rig.stream()
    rig.one_pass(stream)
    assert stream.counters().streamed_bytes == sum(layout.tensor_bytes for layout in rig.layouts)


def test_close_waits_for_copies_under_way(rig: Rig) -> None:
    stream = rig.stream()
    rig.one_pass(stream)
    stream.close()
    assert not any(other.queue for other in rig.machine.streams if other.name == "copy")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_real_card_every_pass_brings_the_files_content(tmp_path: Path) -> None:
    layouts, values = make_layouts(tmp_path)
    stream = PinnedStreamer(layouts, 2, torch.device("cuda"))
    for _ in range(50):
        found = [next(iter(tensors.values())).clone() for tensors in stream.blocks()]
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, values, strict=True))
    stream.close()
