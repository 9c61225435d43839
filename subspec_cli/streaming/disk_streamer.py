"""Streaming from disk to RAM: a reader thread fills slots ahead of the decoder."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, islice

import torch
from torch import Tensor

from subspec_cli.checkpoint.dtypes import torch_dtype
from subspec_cli.files.direct_io import DirectReader, allocate_buffer
from subspec_cli.streaming.layout import BlockLayout
from subspec_cli.streaming.read_ahead import ReadAhead
from subspec_cli.streaming.streamer import StreamCounters


def block_tensors(layout: BlockLayout, buffer: memoryview) -> dict[str, Tensor]:
    """The tensors of a block by name, as views of the buffer that holds it."""
    return {
        item.entry.name: torch.frombuffer(
            buffer,
            dtype=torch_dtype(item.entry.dtype),
            count=item.entry.size_bytes // torch_dtype(item.entry.dtype).itemsize,
            offset=item.buffer_offset,
        ).view(item.entry.shape)
        for item in layout.placements
    }


def read_resident(layouts: Sequence[BlockLayout]) -> list[dict[str, Tensor]]:
    """Read blocks that stay resident, each into its own memory, by the path that streamed blocks take."""
    reader = DirectReader()
    try:
        held = []
        for layout in layouts:
            buffer = memoryview(allocate_buffer(layout.buffer_bytes))
            reader.read_extents(layout.extents, buffer)
            held.append(block_tensors(layout, buffer))
        return held
    finally:
        reader.close()


class _ArrivingBlock(Mapping[str, Tensor]):
    """The tensors of a block by name; the first access waits for the block."""

    def __init__(self, layout: BlockLayout, wait: Callable[[], memoryview]) -> None:
        self._layout = layout
        self._wait = wait
        self._tensors: dict[str, Tensor] | None = None

    def wait(self) -> dict[str, Tensor]:
        """Wait for the block and return its tensors."""
        if self._tensors is None:
            self._tensors = block_tensors(self._layout, self._wait())
        return self._tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.wait()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.wait())

    def __len__(self) -> int:
        return len(self._layout.placements)


class DiskStreamer:
    """Streams blocks from the checkpoint's files into `slots` buffers of host memory.

    A block keeps its buffer until the consumer asks for the first block of the next part.
    """

    def __init__(self, layouts: Sequence[BlockLayout], slots: int) -> None:
        assert slots >= 2
        assert layouts
        self._layouts = tuple(layouts)
        size_bytes = max(layout.buffer_bytes for layout in layouts)
        self._buffers = [memoryview(allocate_buffer(size_bytes)) for _ in range(slots)]
        self._ahead = ReadAhead(layouts, slots, self._buffers.__getitem__)
        self._ahead.start()

    @property
    def most_held(self) -> int:
        """One buffer is left to the reader."""
        return len(self._buffers) - 1

    def blocks(self, parts: Sequence[int] = (1,)) -> Generator[Mapping[str, Tensor], None, None]:
        """One pass over all blocks; leaving early makes the next pass start at the first block again."""
        assert max(parts) <= self.most_held
        remaining = iter(self._layouts)
        is_whole = False
        try:
            for size in cycle(parts):
                part = [
                    _ArrivingBlock(layout, partial(self._take, place))
                    for place, layout in enumerate(islice(remaining, size))
                ]
                if not part:
                    is_whole = True
                    return
                yield from part
                for block in part:
                    block.wait()
                    self._ahead.release()
        finally:
            if not is_whole:
                self._ahead.restart()

    def counters(self) -> StreamCounters:
        """Totals so far."""
        return self._ahead.counters()

    @property
    def reads_files(self) -> bool:
        """Always true: every block is read from a file in every pass."""
        return True

    @property
    def is_direct(self) -> bool:
        """Whether files are read past the page cache; waits for the first block, which shows it."""
        return self._ahead.is_direct()

    def close(self) -> None:
        """Stop the reader and free the buffers."""
        self._ahead.close()
        self._buffers.clear()

    def _take(self, place: int) -> memoryview:
        return self._buffers[self._ahead.take(place)]
