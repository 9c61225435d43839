"""Streaming target weights: blocks of layers in the order of use, through a few slots.

A reader thread runs ahead of the consumer and wraps around at the end of a pass. While the draft runs, every slot
fills with the first blocks of the next pass. Streaming is an iterator: `for block in streamer.blocks()`. A pass over
many rows may hold a few blocks at once, so that the rows go through them chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StreamCounters:
    """Totals since the start; `since` gives those of an interval."""

    wait_time_s: float = 0.0
    """Time that the consumer waited for weights."""
    streamed_bytes: int = 0
    """Tensor bytes that the consumer has received and released."""
    read_time_s: float = 0.0
    """Time that the link was busy."""

    def __add__(self, other: StreamCounters) -> StreamCounters:
        """Field by field."""
        return StreamCounters(
            self.wait_time_s + other.wait_time_s,
            self.streamed_bytes + other.streamed_bytes,
            self.read_time_s + other.read_time_s,
        )

    def since(self, earlier: StreamCounters) -> StreamCounters:
        """Difference to an earlier reading."""
        return StreamCounters(
            self.wait_time_s - earlier.wait_time_s,
            self.streamed_bytes - earlier.streamed_bytes,
            self.read_time_s - earlier.read_time_s,
        )


class Streamer(Protocol):
    """Brings streamed blocks to the device."""

    @property
    def reads_files(self) -> bool:
        """Whether blocks are read from files in every pass, and not from host memory alone."""
        ...

    @property
    def is_direct(self) -> bool:
        """Whether files are read past the page cache."""
        ...

    @property
    def most_held(self) -> int:
        """Most blocks that may be held at once while further blocks are read."""
        ...

    def blocks(self, parts: Sequence[int] = (1,)) -> Generator[Mapping[str, Tensor], None, None]:
        """One pass: the tensors of each block by name.

        `parts` are numbers of consecutive blocks, again and again: the blocks of a part are valid until the first
        block of the next part is asked for, which releases their slots. Asking does not wait for a block: the first
        access to a tensor does.
        """
        ...

    def counters(self) -> StreamCounters:
        """Totals so far."""
        ...

    def close(self) -> None:
        """Stop reading and free the memory."""
        ...
