"""Pinned host memory for copies to a GPU. How much can be pinned is found by trying.

PyTorch's own pinned allocator rounds up to powers of two and never frees. Here memory is mapped first and then
registered with CUDA, so that a layer takes no more than its own size and closing frees it.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from subspec_cli.checkpoint.layer_tensors import spread
from subspec_cli.errors import ResourceError
from subspec_cli.files.direct_io import PAGE_BYTES, allocate_buffer
from subspec_cli.reporter import Reporter
from subspec_cli.units import format_bytes

_PORTABLE_AND_MAPPED: Final = 3
"""cudaHostRegisterPortable and -Mapped: pinned for all contexts of the process, and accessible to kernels."""


class PinRefusedError(Exception):
    """The system has no more memory, or refuses to pin it."""


def pin(memory: Tensor, device: torch.device) -> Callable[[], None]:
    """Pin host memory in place and return the function that unpins it.

    No kernel or copy may still use the memory when it is unpinned. Raises PinRefusedError.
    """
    address, size_bytes = memory.data_ptr(), memory.numel() * memory.element_size()
    code = int(torch.cuda.cudart().cudaHostRegister(address, size_bytes, _PORTABLE_AND_MAPPED))
    if code:
        _forget_last_error(device)
        raise PinRefusedError(f"CUDA error {code}")

    def unpin() -> None:
        code = int(torch.cuda.cudart().cudaHostUnregister(address))
        if code:
            raise RuntimeError(f"pinned memory was not released: CUDA error {code}")

    return unpin


class PinnedBuffer:
    """Page-aligned pinned host memory: copies from it run at full link speed and asynchronously.

    Raises PinRefusedError when the system refuses it.
    """

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        assert size_bytes % PAGE_BYTES == 0
        try:
            memory = _map(size_bytes)
        except (OSError, MemoryError) as error:
            raise PinRefusedError(str(error)) from error
        self.view = memoryview(memory)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8, count=size_bytes)
        """The memory as `[size_bytes]` of uint8."""
        self._unpin = pin(self.tensor, device)

    def release(self) -> None:
        """Unpin and free the memory; no copy may be in flight."""
        self._unpin()
        self.view, self.tensor = memoryview(b""), torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class PinnedMemory:
    """The memory that could be pinned for the streamed layers."""

    slabs: Mapping[int, PinnedBuffer]
    """Layers that stay in pinned memory, by their number among the streamed ones."""
    ring: tuple[PinnedBuffer, ...]
    """Buffers through which the other layers come from disk; empty when there are none."""

    def release(self) -> None:
        """Free all of it."""
        for buffer in (*self.slabs.values(), *self.ring):
            buffer.release()


def take_pinned(
    layers: int,
    layer_bytes: int,
    *,
    pinned_layers: int,
    ring_slots: int,
    most_bytes: int,
    device: torch.device,
    reporter: Reporter,
) -> PinnedMemory:
    """Pin memory for `pinned_layers` of `layers` streamed layers and a ring for the rest, buffer by buffer.

    When the system refuses more, or `most_bytes` are reached, the buffers that were obtained are kept: the first
    ones are the ring, the others hold layers, evenly spread among those that are read from disk; one note says
    so. Raises ResourceError if not even one layer's bytes can be pinned.
    """
    wanted = pinned_layers + (min(ring_slots, layers) if pinned_layers < layers else 0)
    buffers: list[PinnedBuffer] = []
    refusal = ""
    while len(buffers) < wanted and not refusal:
        if (len(buffers) + 1) * layer_bytes > most_bytes:
            refusal = f"the limit is {format_bytes(most_bytes)}"
            break
        try:
            buffers.append(PinnedBuffer(layer_bytes, device))
        except PinRefusedError as error:
            refusal = f"the system refused more: {error}"
    if not buffers:
        raise ResourceError(
            f"no host memory can be pinned for a layer of {format_bytes(layer_bytes)}: {refusal}",
            "close what holds memory; under WSL2 raise `memory` in .wslconfig (half of it can be pinned)",
        )
    if len(buffers) == layers:
        return PinnedMemory(dict(enumerate(buffers)), ())
    ring = buffers[:ring_slots]
    slabs = dict(zip(spread(len(buffers) - len(ring), layers), buffers[len(ring) :], strict=True))
    if refusal:
        reporter.note(
            f"pinned {format_bytes(len(buffers) * layer_bytes)} of {format_bytes(wanted * layer_bytes)} "
            f"({refusal}): {layers - len(slabs)} of {layers} streamed layers are read from disk in every pass"
        )
    return PinnedMemory(slabs, tuple(ring))


def _map(size_bytes: int) -> mmap.mmap:
    """Map anonymous memory, in huge pages where the system has them: the GPU has fewer pages to translate."""
    if sys.platform == "win32":
        return allocate_buffer(size_bytes)
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _forget_last_error(device: torch.device) -> None:
    """Clear the error that a refusal leaves behind.

    CUDA keeps the error for the next caller that asks, and PyTorch asks after its next kernel, which would then
    fail although it has nothing to do with it. A dummy kernel is launched here to take the failure.
    """
    with suppress(RuntimeError):
        torch.full((1,), 1, device=device)
