"""The draft step on a card: a CUDA graph for each number of rows, whose inputs stay in host memory.

A step is some hundred kernels of microseconds each, which would take longer to launch than to run. And a copy of
its inputs to the card would stand in line behind the layer that is being streamed: so the kernels read those few
kilobytes from pinned memory, where they lie. Ranking what a step finds is left to whoever asked for it, and with
it the one wait per step: a few numbers that say which nodes to expand next.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

import torch
from torch import Tensor

from subspec_cli.modeling.decoder import DraftDecoder, DraftLogits, Embedding
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.layers import TokenBatch
from subspec_cli.placement.pinned import card_view

Step = Callable[[], DraftLogits]
_COLUMNS: Final = 1024
"""Cache rows in view grow by so many at a time; those beyond the real ones are masked."""


class Graphs(Protocol):
    """What turns a step into one launch."""

    def capture(self, run: Step) -> Step:
        """A step that does what `run` did, on whatever its tensors hold by then; its result is overwritten."""
        ...

    def wait(self) -> None:
        """Until the last captured step is done."""
        ...

    def forget(self) -> None:
        """The steps captured so far are not run again."""
        ...


class CudaGraphs:
    """Graphs that share their memory, since one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._done = torch.cuda.Event()

    def capture(self, run: Step) -> Step:
        """Run it once, since kernels load and workspaces are made at first use, then capture it."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        graph = torch.cuda.CUDAGraph()
        # Another thread reads layers from disk meanwhile, and may call CUDA.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            found = run()
        current.wait_stream(self._stream)

        def replay() -> DraftLogits:
            graph.replay()
            self._done.record(torch.cuda.current_stream(self._device))
            return found

        return replay

    def wait(self) -> None:
        """An event that was never recorded counts as done."""
        self._done.synchronize()

    def forget(self) -> None:
        """Memory that no graph uses any more cannot be shared again: the next ones begin anew."""
        self._pool = torch.cuda.graph_pool_handle()


class CapturedDraft:
    """A draft whose steps are captured, and captured anew when the cache rows in view outgrow them.

    What a step returns is overwritten by the next one.
    """

    def __init__(
        self,
        draft: DraftDecoder,
        kv: KVCache,
        graphs: Graphs,
        *,
        most_rows: int,
        device: torch.device,
        gather: Embedding | None,
    ) -> None:
        """`gather` gives embedding rows in host memory; None where the draft's own table is on the card."""
        self._draft = draft
        self._kv = kv
        self._graphs = graphs
        self._gather = gather
        self._steps: dict[int, Step] = {}
        self._columns = 0
        # Tokens, positions and cache rows of a step.
        self._numbers = _Shared((3, most_rows), torch.int32, device)
        self._allowed = _Shared((most_rows, kv.capacity), torch.uint8, device)
        self._key_positions = _Shared((kv.capacity,), torch.int32, device)
        row = gather(torch.tensor([0]))[0] if gather else None
        self._hidden = None if row is None else _Shared((most_rows, len(row)), row.dtype, device)

    @torch.inference_mode()
    def forward(self, batch: TokenBatch, kv: KVCache) -> DraftLogits:
        """Logits `[N, V]` of a batch on the host; writes draft-made keys and values to scratch rows."""
        assert kv is self._kv
        end = batch.allowed.shape[1]
        columns = min(-(-end // _COLUMNS) * _COLUMNS, kv.capacity)
        # A step that was interrupted may still be reading its inputs.
        self._graphs.wait()
        if columns != self._columns:
            self._steps.clear()
            self._graphs.forget()
            self._columns = columns
        self._fill(batch, end, columns)
        step = self._steps.get(batch.rows)
        if step is None:
            step = self._steps[batch.rows] = self._graphs.capture(partial(self._run, batch.rows, columns))
        return step()

    def _fill(self, batch: TokenBatch, end: int, columns: int) -> None:
        rows = batch.rows
        numbers, allowed = self._numbers.host, self._allowed.host
        numbers[0, :rows] = batch.token_ids
        numbers[1, :rows] = batch.positions
        numbers[2, :rows] = torch.arange(end - rows, end)
        allowed[:rows, :end] = batch.allowed
        allowed[:rows, end:columns] = 0
        self._key_positions.host[:end] = batch.key_positions
        if self._gather and self._hidden:
            self._hidden.host[:rows] = self._gather(batch.token_ids)

    @torch.inference_mode()
    def _run(self, rows: int, columns: int) -> DraftLogits:
        """One step over whatever the inputs hold: its sizes are fixed, and nothing in it waits for the card."""
        token_ids, positions, cache_rows = self._numbers.card[:, :rows].long()
        batch = TokenBatch(
            token_ids,
            positions,
            rows,
            cache_rows,
            self._allowed.card[:rows, :columns] != 0,
            self._key_positions.card[:columns].long(),
        )
        hidden = self._hidden.card[:rows].clone() if self._hidden else self._draft.embed(token_ids)
        return self._draft.run(hidden, batch, self._kv)


def launched(
    draft: DraftDecoder,
    kv: KVCache,
    *,
    most_rows: int,
    device: torch.device,
    gather: Embedding | None = None,
    notify: Callable[[str], None] = lambda _note: None,
) -> DraftDecoder | CapturedDraft:
    """The draft as its steps are started: on a card captured, after a first one has shown that this works.

    `notify` is told why where it does not; running out of memory is raised.
    """
    if device.type == "cpu":
        return draft
    try:
        captured = CapturedDraft(
            draft, kv, CudaGraphs(device), most_rows=most_rows, device=device, gather=gather
        )
        zero = torch.zeros(1, dtype=torch.long)
        captured.forward(TokenBatch(zero, zero, 1, 0, torch.ones((1, 1), dtype=torch.bool), zero), kv)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        notify(f"draft steps are launched kernel by kernel, which is slower: {reason}")
        return draft
    return captured


class _Shared:
    """Host memory, and the card's view of it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.host: Tensor = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
        self.card = card_view(self.host, device)
