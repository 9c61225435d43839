"""Streaming layers to a GPU: one copy per layer out of pinned memory, on a separate copy stream.

Two events per slot order copies and kernels: *ready* (the copy is done, kernels may read) and *free* (the last
kernel that read the slot is done, the next copy may overwrite it). Layers that do not fit in host memory come
from disk through a ring of pinned buffers; the order of use is the same.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from subspec_cli.files.direct_io import DirectReader
from subspec_cli.reporter import Reporter
from subspec_cli.streaming.disk_ring import DiskRing
from subspec_cli.streaming.gpu_clock import GpuClock
from subspec_cli.streaming.gpu_layers import LayerLayout, page_aligned_memory, tensors_in
from subspec_cli.streaming.pinned_memory import PinnedMemory, take_pinned
from subspec_cli.streaming.streamer import StreamCounters


@dataclass(frozen=True, slots=True)
class _Slot:
    """GPU memory for one layer, with the events that order its copies and kernels."""

    memory: Tensor
    ready: torch.cuda.Event = field(default_factory=lambda: torch.cuda.Event())
    free: torch.cuda.Event = field(default_factory=lambda: torch.cuda.Event())


class GpuStreamer:
    """Streams layers through `slots` slots on the GPU; closing it releases the pinned memory.

    The n-th layer that is queued goes to slot n modulo `slots`. `_queued` counts layers whose copy has been
    queued, `_used` layers that the consumer has released; `_queued - _used <= slots` always. A copy is queued
    by the thread that makes it possible: the consumer when it releases a slot, the reader when it has read.
    Every access to this state holds `_changed`. The ring's lock may be taken inside it, never the other way round.
    """

    def __init__(
        self, layers: Sequence[LayerLayout], memory: PinnedMemory, *, slots: int, device: torch.device
    ) -> None:
        assert slots >= 2
        assert layers
        self._layers = tuple(layers)
        self._memory = memory
        self._device = device
        self._changed = threading.Condition()
        self._queued = 0
        self._used = 0
        self._streamed_bytes = 0
        self._copies = GpuClock()
        self._stalls = GpuClock()
        size_bytes = max(layer.whole.buffer_bytes for layer in layers)
        self._slots = [_Slot(piece) for piece in page_aligned_memory(slots, size_bytes, device)]
        self._copy_stream = torch.cuda.Stream(device)
        # Kernels of the memory's previous owner may still be queued on the current stream.
        self._copy_stream.wait_stream(torch.cuda.current_stream(device))
        on_disk = [layer.whole for number, layer in enumerate(layers) if number not in memory.slabs]
        self._ring = DiskRing(on_disk, memory.ring, self._on_ring_change) if on_disk else None
        with self._changed:
            self._queue_copies()
        if self._ring is not None:
            self._ring.reader.start()

    @property
    def most_held(self) -> int:
        """A slot holds a whole layer."""
        return min(len(layer.blocks) for layer in self._layers)

    def blocks(self, parts: Sequence[int] = (1,)) -> Generator[dict[str, Tensor], None, None]:
        """One pass over all blocks of all layers; the tensors are views of a slot, valid until the next layer.

        So a layer's blocks may be held together, whatever `parts` are. Leaving early makes the next pass start at
        the first layer again. Raises the reader thread's error.
        """
        assert max(parts) <= self.most_held
        finished = 0
        try:
            for layer in self._layers:
                memory = self._wait_for_layer()
                for block in layer.blocks:
                    yield tensors_in(memory, block)
                self._release(layer.whole.tensor_bytes)
                finished += 1
        finally:
            if finished < len(self._layers):
                self._restart()

    @property
    def reads_files(self) -> bool:
        """Whether layers are read from files in every pass."""
        return self._ring is not None

    @property
    def is_direct(self) -> bool:
        """Whether files are read past the page cache; true when no files are read."""
        return self._ring is None or self._ring.reader.is_direct()

    def counters(self) -> StreamCounters:
        """Totals of the work that the GPU has finished.

        `wait_time_s` is the time that the kernel stream was stalled waiting for layers. `read_time_s` is the
        busy time of the busier link: host to GPU, or disk to host if layers are read from disk.
        """
        with self._changed:
            disk_time_s = 0.0 if self._ring is None else self._ring.reader.counters().read_time_s
            read_time_s = max(self._copies.total_s(), disk_time_s)
            return StreamCounters(self._stalls.total_s(), self._streamed_bytes, read_time_s)

    def close(self) -> None:
        """Stop reading, wait for copies in flight and release the memory."""
        if self._ring is not None:
            self._ring.reader.close()
        self._copy_stream.synchronize()
        self._slots = []
        self._memory.release()

    def _wait_for_layer(self) -> Tensor:
        """Make the kernels that follow wait for the next layer; the host waits only until its copy is queued."""
        stream = torch.cuda.current_stream(self._device)
        with self._changed:
            # Started before the host waits, so that time spent waiting for the disk counts too.
            self._stalls.start(stream)
            self._changed.wait_for(lambda: self._queued > self._used or self._failure is not None)
            if self._failure is not None:
                raise self._failure
            slot = self._slots[self._used % len(self._slots)]
            stream.wait_event(slot.ready)
            self._stalls.stop(stream)
            return slot.memory

    def _release(self, tensor_bytes: int) -> None:
        with self._changed:
            slot = self._slots[self._used % len(self._slots)]
            slot.free.record(torch.cuda.current_stream(self._device))
            self._used += 1
            self._streamed_bytes += tensor_bytes
            self._queue_copies()

    @property
    def _failure(self) -> BaseException | None:
        return None if self._ring is None else self._ring.reader.failure

    def _on_ring_change(self) -> None:
        """Queue the copy of the layer that was read, or wake the consumer after a failure; the reader calls it."""
        with self._changed:
            if self._failure is None:
                self._queue_copies()
            self._changed.notify_all()

    def _queue_copies(self) -> None:
        """Queue copies into all free slots; stop at a layer that is not in host memory yet."""
        while self._queued - self._used < len(self._slots):
            slot = self._slots[self._queued % len(self._slots)]
            number = self._queued % len(self._layers)
            if (slab := self._memory.slabs.get(number)) is not None:
                self._queue_copy(number, slab.tensor, slot)
            elif self._ring is not None and (arrived := self._ring.poll()) is not None:
                self._queue_copy(number, arrived, slot)
                self._ring.release(self._copy_stream)
            else:
                return
            self._queued += 1
            self._changed.notify_all()

    def _queue_copy(self, number: int, source: Tensor, slot: _Slot) -> None:
        size_bytes = self._layers[number].whole.buffer_bytes
        with torch.cuda.stream(self._copy_stream):
            # An event that was never recorded counts as done, so the first copies do not wait.
            self._copy_stream.wait_event(slot.free)
            self._copies.start(self._copy_stream)
            slot.memory[:size_bytes].copy_(source[:size_bytes], non_blocking=True)
            self._copies.stop(self._copy_stream)
            slot.ready.record(self._copy_stream)

    def _restart(self) -> None:
        with self._changed:
            # Kernels of the abandoned pass may still read any slot; its queued copies run before new ones.
            for slot in self._slots:
                slot.free.record(torch.cuda.current_stream(self._device))
            if self._ring is not None:
                self._ring.reader.restart()
            self._queued = self._used = 0
            self._queue_copies()


def open_gpu_streamer(
    layers: Sequence[LayerLayout],
    *,
    pinned_layers: int,
    ring_slots: int,
    slots: int,
    most_bytes: int,
    device: torch.device,
    reporter: Reporter,
) -> GpuStreamer:
    """Pin as much of the wanted memory as the system grants, read the layers that stay in it, and begin to stream.

    At most `most_bytes` of host memory are pinned; a note says if that is less than was wanted. Raises
    ResourceError if nothing can be pinned, IntegrityError if a file cannot be read; nothing stays pinned then.
    """
    size_bytes = max(layer.whole.buffer_bytes for layer in layers)
    memory = take_pinned(
        len(layers),
        size_bytes,
        pinned_layers=pinned_layers,
        ring_slots=ring_slots,
        most_bytes=most_bytes,
        device=device,
        reporter=reporter,
    )
    reader = DirectReader()
    try:
        for done, (number, slab) in enumerate(memory.slabs.items(), start=1):
            reporter.progress(f"copying streamed layers to pinned memory {done}/{len(memory.slabs)}")
            reader.read_extents(layers[number].whole.extents, slab.view)
        return GpuStreamer(layers, memory, slots=slots, device=device)
    except BaseException:
        memory.release()
        raise
    finally:
        reader.close()
