"""Draft steps on a GPU: one CUDA graph for each number of rows, started before the previous step is read.

A step consists of some hundred kernels of microseconds each, which would take longer to launch than to run. So mask,
forward, noise, ranking and the record of what was found are one graph. Its inputs stay in host memory: a copy to the
GPU would queue behind the layer that is being streamed. Kernels read those few kilobytes from pinned memory in place,
and write the few numbers that the host wants to pinned memory too. A row may take its token from what the previous
step has found, which never leaves the GPU, so the GPU does not wait for the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Literal

import torch
from torch import Tensor

from subspec_cli.decoding.sampler import GreedySampler, Sampler
from subspec_cli.drafting.draft_steps import (
    RANKED,
    DirectSteps,
    DraftSteps,
    Feed,
    Found,
    Sampling,
    rank,
    sampling_rule,
)
from subspec_cli.drafting.graph_capture import CudaGraphs, Graphs, Run
from subspec_cli.limits import NOISE_ROWS
from subspec_cli.modeling.decoder import DraftDecoder
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.token_batch import TokenBatch
from subspec_cli.reporter import Reporter
from subspec_cli.streaming.mapped_memory import gpu_view

Kind = Literal["greedy", "sampled", "filtered"]
_COLUMNS: Final = 1024
"""Cache rows in view grow by this many at a time; rows beyond the real ones are masked."""
_TURNS: Final = 2
"""Sets of inputs and results: one for the step in flight, one for the step that the host fills or reads."""
_NOISE_PLACES: Final = 2 * NOISE_ROWS
"""Positions whose noise the GPU can read, in float32: twice as many as the sampler keeps in float64."""


class _Shared:
    """Host memory, and the GPU's view of it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.host: Tensor = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
        self.gpu = gpu_view(self.host, device)


class StepBuffers:
    """Inputs and results of steps, each in two sets that take turns.

    The GPU counts turns by itself: a graph's numbers are frozen, yet it finds the inputs of its turn.
    """

    def __init__(self, most_rows: int, ranked: int, capacity: int, device: torch.device) -> None:
        self.ranked = ranked
        self.numbers = _Shared((_TURNS, 5, most_rows), torch.int32, device)
        """Tokens, places of fed tokens in `last_found`, positions, cache rows and noise rows of a step."""
        self.allowed = _Shared((_TURNS, most_rows, capacity), torch.uint8, device)
        self.key_positions = _Shared((_TURNS, capacity), torch.int32, device)
        self.rule = _Shared((_TURNS, 3), torch.float32, device)
        self.ids = _Shared((_TURNS, most_rows, ranked), torch.int32, device)
        self.scores = _Shared((_TURNS, most_rows, ranked), torch.float32, device)
        self.turn = torch.zeros(1, dtype=torch.long, device=device)
        self.last_found = torch.zeros(most_rows * ranked, dtype=torch.long, device=device)
        """Token ids that the last step has found, row by row."""
        self.host_turn = 0

    def fill(self, batch: TokenBatch, feeds: Sequence[Feed | None], end: int, columns: int) -> None:
        """Write the inputs of the step whose turn it is; `end` cache rows are real, `columns` are in view."""
        turn, rows = self.host_turn, batch.rows
        places = [-1 if feed is None else feed.row * self.ranked + feed.rank for feed in feeds]
        numbers, allowed = self.numbers.host[turn, :, :rows], self.allowed.host[turn, :rows]
        numbers[0] = batch.token_ids
        numbers[1] = torch.tensor(places)
        numbers[2] = batch.positions
        numbers[3] = torch.arange(end - rows, end)
        allowed[:, :end] = batch.allowed
        allowed[:, end:columns] = 0
        self.key_positions.host[turn, :end] = batch.key_positions

    def fill_sampling(self, noise_rows: Sequence[int], rule: Tensor) -> None:
        """Write where the step's noise lies, and the `[3]` numbers of the sampler's rule."""
        self.numbers.host[self.host_turn, 4, : len(noise_rows)] = torch.tensor(noise_rows)
        self.rule.host[self.host_turn] = rule

    def end_host_turn(self) -> int:
        """Pass the turn on; return the turn that has just been filled."""
        turn, self.host_turn = self.host_turn, (self.host_turn + 1) % _TURNS
        return turn

    def reset(self) -> None:
        """Let host and GPU agree again that it is the first turn."""
        self.turn.zero_()
        self.host_turn = 0

    def found(self, turn: int, rows: int) -> Found:
        """Return the results of a finished turn."""
        ids, scores = self.ids.host[turn, :rows], self.scores.host[turn, :rows]
        return Found(ids.long().numpy(), scores.double().numpy())


class NoiseRing:
    """Sampling noise of recent positions, where the GPU reads it. It is allocated when a sampler first has noise."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        self._vocab = vocab
        self._device = device
        self._memory: _Shared | None = None
        self._position_of: dict[int, int] = {}
        self._in_use: list[int] = []

    @property
    def gpu(self) -> Tensor:
        """`[places, V]` float32."""
        assert self._memory is not None
        return self._memory.gpu

    def forget(self) -> None:
        """Drop the noise: another sampler begins."""
        self._position_of.clear()
        self._in_use = []

    def places(
        self, positions: Sequence[int], sampler: Sampler, wait: Callable[[], None]
    ) -> list[int] | None:
        """Return where the noise of these positions lies, and write what is missing; None if there is no noise.

        `wait` returns once no step in flight reads the ring.
        """
        places = []
        for position in positions:
            place = position % _NOISE_PLACES
            if self._position_of.get(place) != position:
                if place in self._in_use:
                    wait()  # the step in flight reads noise of a position many levels away
                noise = sampler.noise(position, self._vocab)
                if noise is None:
                    return None
                if self._memory is None:
                    self._memory = _Shared((_NOISE_PLACES, self._vocab), torch.float32, self._device)
                self._memory.host[place] = torch.from_numpy(noise)
                self._position_of[place] = position
            places.append(place)
        self._in_use = places
        return places


class GraphCache:
    """Captured steps by row count and kind; all are captured again when the cache rows in view outgrow them."""

    def __init__(self, graphs: Graphs, capacity: int) -> None:
        self._graphs = graphs
        self._capacity = capacity
        self._captured: dict[tuple[int, Kind], Run] = {}
        self.columns = 0
        """Cache rows in view."""

    def reach(self, end: int) -> None:
        """Bring `end` cache rows into view."""
        columns = min(-(-end // _COLUMNS) * _COLUMNS, self._capacity)
        if columns != self.columns:
            self._captured.clear()
            self._graphs.forget()
            self.columns = columns

    def step(self, rows: int, kind: Kind, run: Run, keep: Sequence[Tensor]) -> Run:
        """Return the launch of a step, captured from `run` at its first use."""
        found = self._captured.get((rows, kind))
        if found is None:
            found = self._captured[rows, kind] = self._graphs.capture(run, keep=keep)
        return found

    def mark(self) -> Callable[[], None]:
        """Return a function that waits until all work launched so far is done."""
        return self._graphs.mark()


class CapturedSteps:
    """Starts draft steps as graphs, one ahead of what is read."""

    ahead: Literal[0, 1] = 1

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
        self._vocab = vocab
        self._sampler: Sampler = GreedySampler()
        self._buffers = StepBuffers(most_rows, min(RANKED, vocab), kv.capacity, device)
        self._noise = NoiseRing(vocab, device)
        self._graphs = GraphCache(graphs, kv.capacity)
        self._unread: deque[tuple[int, int, Callable[[], None]]] = deque()
        """Turn, row count and wait function of each step in flight."""

    def begin(self, sampler: Sampler) -> None:
        """Wait for the steps in flight, drop them, and start over: one may have been interrupted at its start."""
        self._graphs.mark()()
        self._unread.clear()
        self._buffers.reset()
        if sampler is not self._sampler:
            self._noise.forget()
        self._sampler = sampler

    def start(self, batch: TokenBatch, feeds: Sequence[Feed | None]) -> None:
        """Launch a step, at once or behind the step in flight."""
        assert len(self._unread) < _TURNS, "inputs are left alone until their step is done"
        buffers, end = self._buffers, batch.allowed.shape[1]
        self._graphs.reach(end)
        buffers.fill(batch, feeds, end, self._graphs.columns)
        kind = self._fill_sampling(batch.positions[: batch.rows].tolist())
        run = partial(self._run, batch.rows, self._graphs.columns, kind)
        self._graphs.step(batch.rows, kind, run, (buffers.turn, buffers.last_found))()
        self._unread.append((buffers.end_host_turn(), batch.rows, self._graphs.mark()))

    def read(self) -> Found:
        """Wait for the oldest step in flight and return what it found."""
        turn, rows, wait = self._unread.popleft()
        wait()
        return self._buffers.found(turn, rows)

    def _fill_sampling(self, positions: Sequence[int]) -> Kind:
        """Write the sampler's inputs of the step; return the kind of graph that it wants."""
        children = [position + 1 for position in positions]
        places = self._noise.places(children, self._sampler, lambda: self._graphs.mark()())
        if places is None:
            return "greedy"
        self._buffers.fill_sampling(places, sampling_rule(self._sampler, self._vocab))
        return "filtered" if self._sampler.filters else "sampled"

    @torch.inference_mode()
    def _run(self, rows: int, columns: int, kind: Kind) -> None:
        """Run one step over whatever the inputs hold. Its sizes are fixed, and nothing in it waits for the host."""
        buffers, turn = self._buffers, self._buffers.turn
        numbers = buffers.numbers.gpu[:, :, :rows].index_select(0, turn)[0].long()
        given, places, positions, cache_rows, noise_places = numbers
        token_ids = torch.where(places >= 0, buffers.last_found[places.clamp_min(0)], given)
        batch = TokenBatch(
            token_ids,
            positions,
            rows,
            cache_rows,
            buffers.allowed.gpu[:, :rows, :columns].index_select(0, turn)[0] != 0,
            buffers.key_positions.gpu[:, :columns].index_select(0, turn)[0].long(),
        )
        found = self.draft.run(self.draft.embed(token_ids), batch, self._kv)
        ids, scores = rank(found, self._sampling(kind, noise_places))
        buffers.last_found[: ids.numel()] = ids.flatten()
        buffers.ids.gpu[:, :rows].index_copy_(0, turn, ids[None].int())
        buffers.scores.gpu[:, :rows].index_copy_(0, turn, scores[None])
        turn.add_(1).remainder_(_TURNS)

    def _sampling(self, kind: Kind, noise_places: Tensor) -> Sampling | None:
        if kind == "greedy":
            return None
        noise = self._noise.gpu.index_select(0, noise_places)
        rule = self._buffers.rule.gpu.index_select(0, self._buffers.turn)[0]
        return Sampling(noise, rule, kind == "filtered")


def draft_steps(
    draft: DraftDecoder,
    kv: KVCache,
    *,
    most_rows: int,
    vocab: int,
    device: torch.device,
    reporter: Reporter,
) -> DraftSteps:
    """Return the steps of a draft: captured on a GPU, after a first one has shown that capturing works.

    Where capturing fails, steps are launched directly and `reporter` gets a note with the reason. Running out of
    memory is raised.
    """
    direct = DirectSteps(draft, kv)
    if device.type == "cpu":
        return direct
    try:
        steps = CapturedSteps(draft, kv, CudaGraphs(device), most_rows=most_rows, vocab=vocab, device=device)
        zero = torch.zeros(1, dtype=torch.long)
        first = TokenBatch(zero, zero, 1, 0, torch.ones((1, 1), dtype=torch.bool), zero)
        steps.start(first, [None])
        steps.read()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        reporter.note(f"draft steps are launched kernel by kernel, which is slower: {reason}")
        return direct
    return steps
