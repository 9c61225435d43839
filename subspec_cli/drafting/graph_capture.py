"""Capturing work on a GPU as a CUDA graph, so that hundreds of short kernels cost one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Run = Callable[[], object]


class Graphs(Protocol):
    """Turns work on a GPU into one launch."""

    def capture(self, run: Run, *, keep: Sequence[Tensor] = ()) -> Run:
        """Capture `run` as a graph and return a function that replays it.

        The graph reads and writes the same tensors, with the values they hold at replay. Capturing executes `run`
        once; tensors in `keep` are restored afterwards.
        """
        ...

    def mark(self) -> Callable[[], None]:
        """Return a function that waits until all work launched so far is done."""
        ...

    def forget(self) -> None:
        """Drop the graphs captured so far; they must not be replayed again."""
        ...


class CudaGraphs:
    """CUDA graphs that share one memory pool, since only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Run, *, keep: Sequence[Tensor] = ()) -> Run:
        """Run `run` once, because kernels load and workspaces are made at first use, then capture it."""
        kept = [tensor.clone() for tensor in keep]
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        graph = torch.cuda.CUDAGraph()
        # Another thread reads layers from disk at the same time and may call CUDA.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        current.wait_stream(self._stream)
        for tensor, before in zip(keep, kept, strict=True):
            tensor.copy_(before)
        return graph.replay

    def mark(self) -> Callable[[], None]:
        """Record an event behind the last launch; its `synchronize` waits."""
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._device))
        return done.synchronize

    def forget(self) -> None:
        """Begin a new pool: memory of a pool without graphs cannot be shared again."""
        self._pool = torch.cuda.graph_pool_handle()
