"""Host memory that a GPU reads by itself, and how much of it there is: found by asking.

PyTorch's own pinned allocator rounds up to powers of two and keeps what it once had; here memory is mapped
first and registered with CUDA afterwards, so that a layer takes its own size and is given back when closed.
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
"""cudaHostRegisterPortable and -Mapped: for every context of the process, and read by kernels where it lies."""


class PinRefusedError(Exception):
    """The system gives no more memory, or does not let it be pinned."""


def pin(memory: Tensor, device: torch.device) -> Callable[[], None]:
    """Pin host memory where it lies, until what is returned is called; nobody may use it on the GPU by then.

    Raises PinRefusedError.
    """
    address, size_bytes = memory.data_ptr(), memory.numel() * memory.element_size()
    code = int(torch.cuda.cudart().cudaHostRegister(address, size_bytes, _PORTABLE_AND_MAPPED))
    if code:
        _forget_last_error(device)
        raise PinRefusedError(f"CUDA error {code}")

    def unpin() -> None:
        code = int(torch.cuda.cudart().cudaHostUnregister(address))
        if code:
            raise RuntimeError(f"pinned memory was not given back: CUDA error {code}")

    return unpin


class PinnedBuffer:
    """Page-aligned host memory that copies to a GPU leave from at full speed and without the host.

    Raises PinRefusedError when the system does not give it.
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
        """Unpin the memory and give it back; no copy may be under way."""
        self._unpin()
        self.view, self.tensor = memoryview(b""), torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class PinnedMemory:
    """What could be pinned for a number of streamed layers."""

    slabs: Mapping[int, PinnedBuffer]
    """By the layer's number among the streamed ones: layers that stay in pinned memory."""
    ring: tuple[PinnedBuffer, ...]
    """Through which the other layers come from disk; empty when there are none."""

    def release(self) -> None:
        """Give all of it back."""
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
    """Anonymous memory, in huge pages where the system has them: fewer entries for the GPU to walk."""
    if sys.platform == "win32":
        return allocate_buffer(size_bytes)
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _forget_last_error(device: torch.device) -> None:
    """Take back the error that a refusal leaves behind.

    CUDA keeps it for whoever asks next, and PyTorch asks after its next kernel: that one, which has nothing to
    do with it, would fail. So a kernel of no use is started to fail in its stead.
    """
    with suppress(RuntimeError):
        torch.full((1,), 1, device=device)
