"""Draft steps on a GPU: a CUDA graph for each number of rows, the next one started before the last is read.

A step is some hundred kernels of microseconds each, which would take longer to launch than to run: mask, forward,
noise, ranking and the record of what was found are one graph. Its inputs stay in host memory, for a copy of them to
the GPU would stand in line behind the layer that is being streamed: kernels read those few kilobytes from pinned
memory where they lie, and write the few numbers that the host wants to where it reads them. A row may take its
token from what the step before has found, which never leaves the GPU: so the GPU does not wait for the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

from subspec_cli.decoding.sampler import GreedySampler, Sampler
from subspec_cli.drafting.draft_steps import DirectSteps, DraftSteps, Found
from subspec_cli.drafting.ranking import RANKED, Sampling, rank, sampling_rule
from subspec_cli.limits import NOISE_ROWS
from subspec_cli.modeling.decoder import DraftDecoder
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.layers import TokenBatch
from subspec_cli.streaming.mapped_memory import gpu_view

Run = Callable[[], object]
Kind = Literal["greedy", "sampled", "filtered"]
_COLUMNS: Final = 1024
"""Cache rows in view grow by so many at a time; those beyond the real ones are masked."""
_TURNS: Final = 2
"""Sets of inputs and results: one for the step under way, one for the step that the host fills or reads."""
_NOISE_PLACES: Final = 2 * NOISE_ROWS
"""Positions whose noise a GPU sees, in half as many bytes each."""


class Graphs(Protocol):
    """What turns work on a GPU into one launch."""

    def capture(self, run: Run, *, keep: Sequence[Tensor] = ()) -> Run:
        """What does as `run` did, on whatever its tensors hold by then.

        `run` is run once for it, all of whose effects last but those on `keep`.
        """
        ...

    def mark(self) -> Callable[[], None]:
        """What waits until all that was launched so far is done."""
        ...

    def forget(self) -> None:
        """What was captured so far is not run again."""
        ...


class CudaGraphs:
    """Graphs that share their memory, since one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Run, *, keep: Sequence[Tensor] = ()) -> Run:
        """Run it once, since kernels load and workspaces are made at first use, then capture it."""
        kept = [tensor.clone() for tensor in keep]
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        graph = torch.cuda.CUDAGraph()
        # Another thread reads layers from disk meanwhile, and may call CUDA.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        current.wait_stream(self._stream)
        for tensor, before in zip(keep, kept, strict=True):
            tensor.copy_(before)
        return graph.replay

    def mark(self) -> Callable[[], None]:
        """An event behind the last launch."""
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._device))
        return done.synchronize

    def forget(self) -> None:
        """Memory that no graph uses any more cannot be shared again: the next ones begin anew."""
        self._pool = torch.cuda.graph_pool_handle()


class CapturedSteps:
    """Steps that are captured, and captured anew when the cache rows in view outgrow them."""

    ahead = 1

    def __init__(
        self,
        draft: DraftDecoder,
        kv: KVCache,
        graphs: Graphs,
        *,
        most_rows: int,
        vocab: int,
        device: torch.device,
    ) -> None:
        self.draft = draft
        self._kv = kv
        self._graphs = graphs
        self._vocab = vocab
        self._device = device
        self._ranked = min(RANKED, vocab)
        self._captured: dict[tuple[int, Kind], Run] = {}
        self._columns = 0
        # Tokens, places of foreseen tokens in what was found, positions, cache rows and noise rows of a step.
        self._numbers = _Shared((_TURNS, 5, most_rows), torch.int32, device)
        self._allowed = _Shared((_TURNS, most_rows, kv.capacity), torch.uint8, device)
        self._key_positions = _Shared((_TURNS, kv.capacity), torch.int32, device)
        self._rule = _Shared((_TURNS, 3), torch.float32, device)
        self._noise: _Shared | None = None
        self._noise_of: Sampler | None = None
        self._noise_held: dict[int, int] = {}
        self._noise_read: list[int] = []
        self._ids = _Shared((_TURNS, most_rows, self._ranked), torch.int32, device)
        self._scores = _Shared((_TURNS, most_rows, self._ranked), torch.float32, device)
        # The GPU counts turns by itself: a graph finds its inputs though its numbers are frozen.
        self._turn = torch.zeros(1, dtype=torch.long, device=device)
        self._host_turn = 0
        self._last_found = torch.zeros(most_rows * self._ranked, dtype=torch.long, device=device)
        self._unread: deque[tuple[int, int, Callable[[], None]]] = deque()

    def start(self, batch: TokenBatch, feeds: Sequence[tuple[int, int] | None], sampler: Sampler) -> None:
        """Launch it, at once or behind the one under way."""
        assert len(self._unread) < _TURNS, "inputs are left alone until their step is done"
        end = batch.allowed.shape[1]
        columns = min(-(-end // _COLUMNS) * _COLUMNS, self._kv.capacity)
        if columns != self._columns:
            self._captured.clear()
            self._graphs.forget()
            self._columns = columns
        kind = self._fill(batch, feeds, sampler, end)
        step = self._captured.get((batch.rows, kind))
        if step is None:
            run = partial(self._run, batch.rows, columns, kind)
            step = self._graphs.capture(run, keep=(self._turn, self._last_found))
            self._captured[batch.rows, kind] = step
        step()
        self._unread.append((self._host_turn, batch.rows, self._graphs.mark()))
        self._host_turn = (self._host_turn + 1) % _TURNS

    def read(self) -> Found:
        """Wait for the oldest one."""
        turn, rows, wait = self._unread.popleft()
        wait()
        ids, scores = self._ids.host[turn, :rows], self._scores.host[turn, :rows]
        return Found(ids.long().numpy(), scores.double().numpy())

    def drop(self) -> None:
        """Wait for what is under way, and begin anew: a step may have been interrupted as it was started."""
        self._graphs.mark()()
        self._unread.clear()
        self._turn.zero_()
        self._host_turn = 0

    def _fill(
        self, batch: TokenBatch, feeds: Sequence[tuple[int, int] | None], sampler: Sampler, end: int
    ) -> Kind:
        """Inputs of the step whose turn it is, on the host; returns what kind of step they want."""
        turn, rows = self._host_turn, batch.rows
        places = [-1 if feed is None else feed[0] * self._ranked + feed[1] for feed in feeds]
        noise_rows = self._noise_rows(batch.positions[:rows].tolist(), sampler)
        numbers, allowed = self._numbers.host[turn, :, :rows], self._allowed.host[turn, :rows]
        numbers[0] = batch.token_ids
        numbers[1] = torch.tensor(places)
        numbers[2] = batch.positions
        numbers[3] = torch.arange(end - rows, end)
        allowed[:, :end] = batch.allowed
        allowed[:, end : self._columns] = 0
        self._key_positions.host[turn, :end] = batch.key_positions
        if noise_rows is None:
            return "greedy"
        numbers[4] = torch.tensor(noise_rows)
        self._rule.host[turn] = sampling_rule(sampler, self._vocab)
        return "filtered" if sampler.filters else "sampled"

    def _noise_rows(self, positions: Sequence[int], sampler: Sampler) -> list[int] | None:
        """Where the noise of the positions' children lies, put there if it is not yet; None without noise."""
        if sampler is not self._noise_of:
            self._noise_of = sampler
            self._noise_held.clear()
        held, rows = self._noise_held, []
        for position in (position + 1 for position in positions):
            row = position % _NOISE_PLACES
            if held.get(row) != position:
                if row in self._noise_read:
                    self._graphs.mark()()  # by a step under way, many levels away
                noise = sampler.noise(position, self._vocab)
                if noise is None:
                    return None
                if self._noise is None:
                    self._noise = _Shared((_NOISE_PLACES, self._vocab), torch.float32, self._device)
                self._noise.host[row] = torch.from_numpy(noise)
                held[row] = position
            rows.append(row)
        self._noise_read = rows
        return rows

    @torch.inference_mode()
    def _run(self, rows: int, columns: int, kind: Kind) -> None:
        """One step over whatever the inputs hold: its sizes are fixed, and nothing in it waits for the host."""
        turn = self._turn
        numbers = self._numbers.gpu[:, :, :rows].index_select(0, turn)[0].long()
        given, places, positions, cache_rows, noise_rows = numbers
        token_ids = torch.where(places >= 0, self._last_found[places.clamp_min(0)], given)
        batch = TokenBatch(
            token_ids,
            positions,
            rows,
            cache_rows,
            self._allowed.gpu[:, :rows, :columns].index_select(0, turn)[0] != 0,
            self._key_positions.gpu[:, :columns].index_select(0, turn)[0].long(),
        )
        found = self.draft.run(self.draft.embed(token_ids), batch, self._kv)
        ids, scores = rank(found, self._sampling(kind, turn, noise_rows))
        self._last_found[: ids.numel()] = ids.flatten()
        self._ids.gpu[:, :rows].index_copy_(0, turn, ids[None].int())
        self._scores.gpu[:, :rows].index_copy_(0, turn, scores[None])
        turn.add_(1).remainder_(_TURNS)

    def _sampling(self, kind: Kind, turn: Tensor, noise_rows: Tensor) -> Sampling | None:
        if kind == "greedy":
            return None
        assert self._noise is not None
        noise = self._noise.gpu.index_select(0, noise_rows)
        return Sampling(noise, self._rule.gpu.index_select(0, turn)[0], kind == "filtered")


def draft_steps(
    draft: DraftDecoder,
    kv: KVCache,
    *,
    most_rows: int,
    vocab: int,
    device: torch.device,
    notify: Callable[[str], None],
) -> DraftSteps:
    """The steps of a draft: on a GPU captured, after a first one has shown that this works.

    `notify` is told why where it does not; running out of memory is raised.
    """
    direct = DirectSteps(draft, kv)
    if device.type == "cpu":
        return direct
    try:
        steps = CapturedSteps(draft, kv, CudaGraphs(device), most_rows=most_rows, vocab=vocab, device=device)
        zero = torch.zeros(1, dtype=torch.long)
        first = TokenBatch(zero, zero, 1, 0, torch.ones((1, 1), dtype=torch.bool), zero)
        steps.start(first, [None], GreedySampler())
        steps.read()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        notify(f"draft steps are launched kernel by kernel, which is slower: {reason}")
        return direct
    return steps


class _Shared:
    """Host memory, and the GPU's view of it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.host: Tensor = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
        self.gpu = gpu_view(self.host, device)
