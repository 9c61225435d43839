"""Streaming layers to a GPU: one copy per layer on a stream of its own, out of pinned memory.

Two events per slot keep copies and kernels apart: *ready* (the copy is done, kernels may read) and *free* (the
last kernel that read the slot is done, the next copy may overwrite it). A layer that host memory has no room
for comes from disk through a ring of pinned buffers; the order of use is the same.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from subspec_cli.files.direct_io import DirectReader
from subspec_cli.reporter import Reporter
from subspec_cli.streaming.gpu_clock import GpuClock
from subspec_cli.streaming.gpu_layers import LayerLayout, page_aligned_memory, tensors_in
from subspec_cli.streaming.gpu_ring import DiskRing
from subspec_cli.streaming.pinned_memory import PinnedMemory, take_pinned
from subspec_cli.streaming.streamer import StreamCounters


@dataclass(frozen=True, slots=True)
class _Slot:
    """Memory of the GPU for one layer."""

    memory: Tensor
    ready: torch.cuda.Event = field(default_factory=lambda: torch.cuda.Event())
    free: torch.cuda.Event = field(default_factory=lambda: torch.cuda.Event())


class GpuStreamer:
    """Streams layers through `slots` slots on the GPU; closing it gives the pinned memory back.

    The n-th layer ever queued goes to slot n modulo `slots`. `_queued` counts layers whose copy has been
    queued, `_used` those the consumer has let go of; `_queued - _used <= slots` always. Copies are queued by
    whoever makes the next one possible: the consumer by letting a slot go, the ring's thread by reading.
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
        # The slots' memory may have had another owner, whose last kernels are still on the current stream.
        self._copy_stream.wait_stream(torch.cuda.current_stream(device))
        on_disk = [layer.whole for number, layer in enumerate(layers) if number not in memory.slabs]
        self._ring = DiskRing(on_disk, memory.ring, self._on_ring_change) if on_disk else None
        with self._changed:
            self._fill()
        if self._ring is not None:
            self._ring.ahead.start()

    def blocks(self) -> Generator[dict[str, Tensor], None, None]:
        """One pass over all blocks of all layers, views of a slot that stay valid for the layer's last block.

        Leaving early makes the next pass start at the first layer again. Raises what ended the reading from disk.
        """
        finished = 0
        try:
            for layer in self._layers:
                memory = self._wait_for_layer()
                for block in layer.blocks:
                    yield tensors_in(memory, block)
                self._let_go(layer.whole.tensor_bytes)
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
        """Whether files are read past the page cache; true when none are."""
        return self._ring is None or self._ring.ahead.is_direct()

    def counters(self) -> StreamCounters:
        """Totals so far, of what the GPU got done.

        `wait_time_s` is how long the stream of kernels stood still for layers to arrive, `read_time_s` how long
        the busier of the two ways was busy: to the GPU, and from disk if layers are read from there.
        """
        with self._changed:
            disk_time_s = 0.0 if self._ring is None else self._ring.ahead.counters().read_time_s
            read_time_s = max(self._copies.total_s(), disk_time_s)
            return StreamCounters(self._stalls.total_s(), self._streamed_bytes, read_time_s)

    def close(self) -> None:
        """Stop reading, wait for copies under way and give the memory back."""
        if self._ring is not None:
            self._ring.ahead.close()
        self._copy_stream.synchronize()
        self._slots = []
        self._memory.release()

    def _wait_for_layer(self) -> Tensor:
        """Let the kernels that follow wait for the next layer; the host waits for a copy to be queued only."""
        stream = torch.cuda.current_stream(self._device)
        with self._changed:
            # Begun before the host waits, so that the time in which it waits for the disk counts as well.
            self._stalls.start(stream)
            self._changed.wait_for(lambda: self._queued > self._used or self._failure is not None)
            if self._failure is not None:
                raise self._failure
            slot = self._slots[self._used % len(self._slots)]
            stream.wait_event(slot.ready)
            self._stalls.stop(stream)
            return slot.memory

    def _let_go(self, tensor_bytes: int) -> None:
        with self._changed:
            slot = self._slots[self._used % len(self._slots)]
            slot.free.record(torch.cuda.current_stream(self._device))
            self._used += 1
            self._streamed_bytes += tensor_bytes
            self._fill()

    @property
    def _failure(self) -> BaseException | None:
        return None if self._ring is None else self._ring.ahead.failure

    def _on_ring_change(self) -> None:
        """Called by the reader thread: a layer has come in, for which a slot may be free, or reading has failed."""
        with self._changed:
            if self._failure is None:
                self._fill()
            self._changed.notify_all()

    def _fill(self) -> None:
        """Queue copies into every slot that is not in use, as far as their layers are in host memory."""
        while self._queued - self._used < len(self._slots):
            slot = self._slots[self._queued % len(self._slots)]
            number = self._queued % len(self._layers)
            if (slab := self._memory.slabs.get(number)) is not None:
                self._copy(number, slab.tensor, slot)
            elif self._ring is not None and (arrived := self._ring.poll()) is not None:
                self._copy(number, arrived, slot)
                self._ring.release(self._copy_stream)
            else:
                return
            self._queued += 1
            self._changed.notify_all()

    def _copy(self, number: int, source: Tensor, slot: _Slot) -> None:
        size_bytes = self._layers[number].whole.buffer_bytes
        with torch.cuda.stream(self._copy_stream):
            # An event never recorded counts as done, so the first round does not wait.
            self._copy_stream.wait_event(slot.free)
            self._copies.start(self._copy_stream)
            slot.memory[:size_bytes].copy_(source[:size_bytes], non_blocking=True)
            self._copies.stop(self._copy_stream)
            slot.ready.record(self._copy_stream)

    def _restart(self) -> None:
        with self._changed:
            # Kernels of the abandoned pass may still read any slot; its copies come first on their stream.
            for slot in self._slots:
                slot.free.record(torch.cuda.current_stream(self._device))
            if self._ring is not None:
                self._ring.ahead.restart()
            self._queued = self._used = 0
            self._fill()


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
    """Pin as much memory as can be had, read the layers that stay in it, and begin to stream.

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
