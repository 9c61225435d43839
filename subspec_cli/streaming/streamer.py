"""Streaming target weights: blocks of layers, in the order of use, through a few slots.

A reader thread runs ahead of the consumer and wraps around at the end of a pass, so while the draft runs every
slot fills with the first blocks of the next pass. Streaming is an iterator: `for block in streamer.blocks()`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StreamCounters:
    """Totals since the start; subtract two to get an interval."""

    wait_time_s: float = 0.0
    """Time the consumer waited for weights."""
    streamed_bytes: int = 0
    """Tensor bytes handed over."""
    read_time_s: float = 0.0
    """Time the link was busy."""

    def __add__(self, other: StreamCounters) -> StreamCounters:
        """Sum of both."""
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
    """Whatever moves streamed blocks to the device."""

    @property
    def reads_files(self) -> bool:
        """Whether blocks are read from files in every pass, and not from host memory alone."""
        ...

    @property
    def is_direct(self) -> bool:
        """Whether files are read past the page cache."""
        ...

    def blocks(self) -> Generator[Mapping[str, Tensor], None, None]:
        """One pass: the tensors of each block by name, valid until the next one is asked for.

        Asking gives the last block's slot back at once; a block is waited for when a tensor of it is taken.
        """
        ...

    def counters(self) -> StreamCounters:
        """Totals so far."""
        ...

    def close(self) -> None:
        """Stop reading and give the memory back."""
        ...
