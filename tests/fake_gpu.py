"""A simulated GPU: what runs when is decided by events alone, in the worst order that they allow.

Every copy and kernel is queued on its stream and runs only when the host waits, in an order that an adversary
picks among those the events leave open. A missing event then shows as wrong bytes. Time is simulated too, one
clock per stream, and does not depend on the order: a step begins when its stream and what it waits for are there.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.files.direct_io import PAGE_BYTES, allocate_buffer
from subspec_cli.streaming import disk_ring, gpu_clock, gpu_layers, gpu_streamer, pinned_memory
from subspec_cli.streaming.gpu_layers import LayerLayout, layout_layer

SPOILED = 0xFF
BLOCK_NAMES = (("q", "k"), ("gate",), ("up",), ("down",))
"""Tensors of the blocks of a layer."""
COPY_MS_PER_PAGE = 1.0
OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation."""


@dataclass
class Event:
    """Done as often as recorded, once the streams get there; keeps the time of each record."""

    machine: Machine
    enable_timing: bool = False
    recorded: int = 0
    reached: int = 0
    at_ms: dict[int, float] = field(default_factory=dict)

    def record(self, stream: Stream) -> None:
        with self.machine.lock:
            self.recorded += 1
            number = self.recorded

            def reach() -> None:
                self.reached = max(self.reached, number)
                self.at_ms[number] = stream.ms

            stream.add(reach)

    def query(self) -> bool:
        with self.machine.lock:
            return self.reached >= self.recorded

    def synchronize(self) -> None:
        number = self.recorded
        self.machine.run_until(lambda: self.reached >= number)

    def elapsed_time(self, end: Event) -> float:
        assert self.enable_timing
        assert end.enable_timing
        assert self.query()
        assert end.query()
        return end.at_ms[end.recorded] - self.at_ms[self.recorded]


@dataclass
class Step:
    """Something a stream does, and when it may."""

    work: Callable[[], Any]
    cost_ms: float
    waits_for: tuple[Event, int] | None

    def may_run(self) -> bool:
        return self.waits_for is None or self.waits_for[0].reached >= self.waits_for[1]


@dataclass
class Stream:
    """Steps in order, and the time at which the last one ended."""

    machine: Machine
    name: str
    queue: deque[Step] = field(default_factory=deque)
    ms: float = 0.0

    def add(self, work: Callable[[], Any], cost_ms: float = 0.0) -> None:
        with self.machine.lock:
            self.queue.append(Step(work, cost_ms, None))

    def wait_event(self, event: Event) -> None:
        with self.machine.lock:
            # As on the GPU: what is waited for is the latest record at the time of the call, if there is any.
            number = event.recorded
            if number:
                self.queue.append(Step(lambda: None, 0.0, (event, number)))
            if self.machine.host_waits:
                self.synchronize()

    def wait_stream(self, other: Stream) -> None:
        event = Event(self.machine)
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        self.machine.run_until(lambda: not self.queue)

    def run_next(self) -> None:
        step = self.queue.popleft()
        if step.waits_for is not None:
            event, number = step.waits_for
            # The adversary may be late: the event keeps the time at which it was reached.
            self.ms = max(self.ms, event.at_ms[number])
        self.ms += step.cost_ms
        step.work()


class Machine:
    """A GPU with streams of pending work; `choose` picks the next stream among those that could go on."""

    def __init__(
        self,
        choose: Callable[[list[Stream]], Stream],
        *,
        pinnable_bytes: int = 1 << 60,
        host_waits: bool = False,
    ) -> None:
        self.lock = threading.RLock()
        self.streams: list[Stream] = []
        self.choose = choose
        self.host_waits = host_waits
        """Whether the host itself waits for every event, so that kernels may as well run on the host."""
        self.compute = self.new_stream("compute")
        self.copies: list[int] = []
        """Bytes of each copy, in the order of queueing."""
        self.gpu_bytes = 0
        self.pinnable_bytes = pinnable_bytes
        self.pinned: dict[int, int] = {}
        """Bytes by address."""
        self.error_left_behind = False
        self.local = threading.local()

    def new_stream(self, name: str) -> Stream:
        self.streams.append(Stream(self, name))
        return self.streams[-1]

    def run_until(self, done: Callable[[], bool]) -> None:
        with self.lock:
            while not done():
                ready = [stream for stream in self.streams if stream.queue and stream.queue[0].may_run()]
                assert ready, "streams wait for each other for ever"
                self.choose(ready).run_next()

    def finish(self) -> None:
        self.run_until(lambda: not any(stream.queue for stream in self.streams))

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        # Which stream is current is a thread's own affair.
        self.local.stream = stream
        yield
        self.local.stream = None

    def current_stream(self) -> Stream:
        return getattr(self.local, "stream", None) or self.compute

    def empty(self, size: int, *, dtype: torch.dtype, device: Any = None) -> Tensor:
        """Memory of the host, or of the GPU, where kernels of its last owner may still be pending."""
        if device is None:
            return torch.empty(size, dtype=dtype)
        # As far off a page's start as the real allocator may put it.
        memory = torch.frombuffer(allocate_buffer(size + PAGE_BYTES), dtype=dtype, count=size, offset=512)
        self.current_stream().add(lambda: memory.fill_(SPOILED))
        self.gpu_bytes += size
        gpu = memory.as_subclass(GpuTensor)
        gpu.machine = self
        return gpu

    def host_register(self, address: int, size_bytes: int, flags: int) -> int:
        assert flags == 3
        assert address % PAGE_BYTES == 0
        assert address not in self.pinned
        if sum(self.pinned.values()) + size_bytes > self.pinnable_bytes:
            self.error_left_behind = True
            return OUT_OF_MEMORY
        self.pinned[address] = size_bytes
        return 0

    def host_unregister(self, address: int) -> int:
        assert not any(stream.queue for stream in self.streams if stream.name == "copy"), (
            "a copy is in flight"
        )
        return 0 if self.pinned.pop(address, None) else 1

    def full(self, shape: tuple[int, ...], value: float, *, device: Any) -> None:
        """A kernel of its own accord: it falls over an error that a call left behind."""
        if self.error_left_behind:
            self.error_left_behind = False
            raise RuntimeError("CUDA error: out of memory")

    def as_torch(self) -> SimpleNamespace:
        """What the streamer uses of torch."""
        cuda = SimpleNamespace(
            Event=lambda enable_timing=False, blocking=False: Event(self, enable_timing),
            Stream=lambda _device: self.new_stream("copy"),
            stream=self.use,
            current_stream=lambda _device: self.current_stream(),
            cudart=lambda: SimpleNamespace(
                cudaHostRegister=self.host_register, cudaHostUnregister=self.host_unregister
            ),
        )
        return SimpleNamespace(
            cuda=cuda,
            empty=self.empty,
            full=self.full,
            frombuffer=torch.frombuffer,
            uint8=torch.uint8,
            Tensor=Tensor,
        )

    def install(self, patch: pytest.MonkeyPatch) -> Machine:
        """Take the place of torch in everything that talks to a GPU."""
        for module in (gpu_clock, gpu_layers, disk_ring, gpu_streamer, pinned_memory):
            patch.setattr(module, "torch", self.as_torch())
        return self


class GpuTensor(torch.Tensor):
    """Memory of the GPU: a copy into it is queued, not made. What is computed from it are plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    machine: Machine

    def __getitem__(self, index: Any) -> GpuTensor:
        part = super().__getitem__(index).as_subclass(GpuTensor)
        part.machine = self.machine
        return part

    def copy_(self, source: Tensor, non_blocking: bool = False) -> GpuTensor:
        target, machine = self.as_subclass(torch.Tensor), self.machine
        assert target.shape == source.shape
        machine.copies.append(source.numel())
        cost_ms = source.numel() / PAGE_BYTES * COPY_MS_PER_PAGE
        stream = machine.current_stream()
        stream.add(lambda: target.copy_(source), cost_ms)
        if not non_blocking:
            stream.synchronize()
        return self


def make_layers(
    directory: Path, layers: int, seed: int = 0, *, most: int = 4000
) -> tuple[list[LayerLayout], dict[str, Tensor]]:
    """Layers in a file, their tensors in another order than that of use and with gaps, and the true content."""
    dice = random.Random(seed)
    path, content, values, made = directory / f"weights-{layers}-{seed}", bytearray(64), {}, []
    for layer in range(layers):
        names = [f"{layer}.{name}" for block in BLOCK_NAMES for name in block]
        entries = {}
        for name in dice.sample(names, len(names)):
            content += bytes(dice.choice((0, 24)))
            value = torch.rand(
                (2, dice.randint(1, most)), generator=torch.Generator().manual_seed(len(values))
            )
            values[name] = value.bfloat16()
            shape = tuple(value.shape)
            entries[name] = TensorEntry(name, "BF16", shape, path, len(content), value.numel() * 2)
            content += values[name].view(torch.uint8).numpy().tobytes()
        made.append(layout_layer([[entries[f"{layer}.{name}"] for name in block] for block in BLOCK_NAMES]))
    if not path.exists():  # written once: reading past the cache what was just written waits for the disk
        path.write_bytes(content)
    return made, values


def copies_first(ready: list[Stream]) -> Stream:
    return ready[-1]


def kernels_first(ready: list[Stream]) -> Stream:
    return ready[0]


ORDERS: dict[str, Callable[[], Callable[[list[Stream]], Stream]]] = {
    "copies first": lambda: copies_first,
    "kernels first": lambda: kernels_first,
    **{f"seed {seed}": lambda seed=seed: random.Random(seed).choice for seed in range(4)},
}
