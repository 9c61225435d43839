"""Draft steps on a GPU: one CUDA graph for each number of rows, started before the previous step is read.

A step consists of some hundred kernels of microseconds each, which would take longer to launch than to run. So mask,
forward, noise, ranking and the storing of results are one graph. Its inputs stay in host memory: a copy to the
GPU would queue behind the layer that is being streamed. Kernels read those few kilobytes from pinned memory in place,
and write the few numbers that the host wants to pinned memory too. A row may take its token from what the previous
step has found, which stays on the GPU, so the GPU does not wait for the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from subspec_cli.decoding.penalties import PathState
from subspec_cli.decoding.sampler import GreedySampler, Sampler
from subspec_cli.drafting.draft_steps import (
    RANKED,
    DirectSteps,
    DraftSteps,
    Feed,
    Found,
    Sampling,
    StepPart,
    penalty_numbers,
    rank,
    sampling_rule,
)
from subspec_cli.drafting.graph_capture import CudaGraphs, Graphs, Run
from subspec_cli.drafting.step_buffers import TURNS, MappedTensor, NoiseRing, StepBuffers
from subspec_cli.modeling.decoder import DraftDecoder
from subspec_cli.modeling.draft_rows import DraftRows
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.token_batch import TokenBatch
from subspec_cli.reporter import Reporter

Rule = Literal["greedy", "sampled", "filtered"]


class Kind(NamedTuple):
    """What a step computes beside its forward."""

    rule: Rule
    is_penalized: bool


_COLUMNS: Final = 1024
"""Cache rows in view grow by this many at a time; rows beyond the real ones are masked."""


class GraphCache:
    """Captured steps by row count and kind; all are captured again when the cache rows in view outgrow them."""

    def __init__(self, graphs: Graphs, capacity: int) -> None:
        self._graphs = graphs
        self._capacity = capacity
        self._captured: dict[tuple[int, Kind], Run] = {}
        self.columns = 0
        """Cache rows in view."""

    def reach(self, end: int) -> None:
        """Make at least `end` cache rows visible to the steps."""
        columns = min(-(-end // _COLUMNS) * _COLUMNS, self._capacity)
        if columns != self.columns:
            self._captured.clear()
            self._graphs.forget()
            self.columns = columns

    def step(self, rows: int, kind: Kind, run: Run, keep: Sequence[Tensor]) -> Run:
        """Return the launch function of a step, captured from `run` at its first use."""
        found = self._captured.get((rows, kind))
        if found is None:
            found = self._captured[rows, kind] = self._graphs.capture(run, keep=keep)
        return found

    def mark(self) -> Callable[[], None]:
        """Return a function that waits until all work launched so far is done."""
        return self._graphs.mark()


@dataclass(frozen=True, slots=True)
class StepSizes:
    """What bounds the memory of captured steps."""

    most_rows: int
    """Rows of one sequence in a step."""
    vocab: int


class CapturedSequence:
    """One sequence's steps as CUDA graphs over its own cache and buffers."""

    takes_masks = False
    """The host does not know the rows of a step behind the one in flight."""

    def __init__(
        self, draft: DraftDecoder, kv: KVCache, graphs: Graphs, sizes: StepSizes, device: torch.device
    ) -> None:
        self._draft = draft
        self._kv = kv
        self._vocab = sizes.vocab
        self._sampler: Sampler = GreedySampler()
        self._buffers = StepBuffers(sizes.most_rows, min(RANKED, sizes.vocab), kv.capacity, device)
        self._noise = NoiseRing(sizes.vocab, device)
        self._device = device
        self._penalty: MappedTensor | None = None
        """Of `penalty_numbers`; allocated when a state first has any."""
        self._is_penalized = False
        self._graphs = GraphCache(graphs, kv.capacity)
        self._unread: deque[tuple[int, int, Callable[[], None]]] = deque()
        """Turn, row count and wait function of each step in flight."""

    def penalize(self, state: PathState | None) -> None:
        """Write the state's numbers to where steps read them; a step in flight is done first."""
        self._is_penalized = state is not None
        if state is None:
            return
        if self._unread:
            self._graphs.mark()()
        if self._penalty is None:
            self._penalty = MappedTensor((3, self._vocab), torch.float32, self._device)
        self._penalty.host.copy_(penalty_numbers(state))

    def begin(self, sampler: Sampler) -> None:
        """Wait for the steps in flight, drop them, and start over; an interrupt may have stopped one at its start."""
        self._graphs.mark()()
        self._unread.clear()
        self._buffers.reset()
        if sampler is not self._sampler:
            self._noise.forget()
        self._sampler = sampler

    def start(self, batch: TokenBatch, feeds: Sequence[Feed | None]) -> None:
        """Launch a step, at once or behind the step in flight."""
        assert len(self._unread) < TURNS, "a set of inputs is reused only after its step is done"
        buffers, end = self._buffers, batch.allowed.shape[1]
        self._graphs.reach(end)
        buffers.fill(batch, feeds, end, self._graphs.columns)
        rule = self._fill_sampling(batch.positions[: batch.rows].tolist())
        kind = Kind(rule, self._is_penalized)
        run = partial(self._run, batch.rows, self._graphs.columns, kind)
        self._graphs.step(batch.rows, kind, run, (buffers.turn, buffers.last_found))()
        self._unread.append((buffers.end_host_turn(), batch.rows, self._graphs.mark()))

    def read(self) -> Found:
        """Wait for the oldest step in flight and return what it found."""
        turn, rows, wait = self._unread.popleft()
        wait()
        return self._buffers.found(turn, rows)

    def _fill_sampling(self, positions: Sequence[int]) -> Rule:
        """Write the sampler's inputs of the step; return the rule that its graph needs."""
        children = [position + 1 for position in positions]
        places = self._noise.places(children, self._sampler, lambda: self._graphs.mark()())
        if places is None:
            return "greedy"
        self._buffers.fill_sampling(places, sampling_rule(self._sampler, self._vocab))
        return "filtered" if self._sampler.filters else "sampled"

    @torch.inference_mode()
    def _run(self, rows: int, columns: int, kind: Kind) -> None:
        """Run one step over the present inputs. Its sizes are fixed, and nothing in it waits for the host."""
        buffers, turn = self._buffers, self._buffers.turn
        numbers = buffers.numbers.gpu[:, :, :rows].index_select(0, turn)[0].long()
        given_ids, feed_places, positions, cache_rows, noise_places = numbers
        token_ids = torch.where(feed_places >= 0, buffers.last_found[feed_places.clamp_min(0)], given_ids)
        batch = TokenBatch(
            token_ids,
            positions,
            cache_rows,
            buffers.allowed.gpu[:, :rows, :columns].index_select(0, turn)[0] != 0,
            buffers.key_positions.gpu[:, :columns].index_select(0, turn)[0].long(),
        )
        found = self._draft.run(self._draft.embed(token_ids), [DraftRows(batch, self._kv)])
        penalty = self._penalty.gpu if kind.is_penalized and self._penalty is not None else None
        ids, scores = rank(found, self._sampling(kind.rule, noise_places), penalty)
        buffers.last_found[: ids.numel()] = ids.flatten()
        buffers.ids.gpu[:, :rows].index_copy_(0, turn, ids[None].int())
        buffers.scores.gpu[:, :rows].index_copy_(0, turn, scores[None])
        turn.add_(1).remainder_(TURNS)

    def _sampling(self, rule: Rule, noise_places: Tensor) -> Sampling | None:
        if rule == "greedy":
            return None
        noise = self._noise.gpu.index_select(0, noise_places)
        numbers = self._buffers.rule.gpu.index_select(0, self._buffers.turn)[0]
        return Sampling(noise, numbers, rule == "filtered")


class CapturedSteps:
    """Launches draft steps as CUDA graphs, one for each sequence; one more may be started before the last is read."""

    ahead: Literal[0, 1] = 1

    def __init__(
        self, draft: DraftDecoder, graphs: Callable[[], Graphs], sizes: StepSizes, device: torch.device
    ) -> None:
        """`graphs` makes the captures of a sequence, which keep to its cache."""
        self.draft = draft
        self._new_graphs = graphs
        self._sizes = sizes
        self._device = device
        self._sequences: dict[KVCache, CapturedSequence] = {}
        self._unread: deque[list[CapturedSequence]] = deque()

    def begin(self, kv: KVCache, sampler: Sampler) -> CapturedSequence:
        """Return the cache's sequence, which starts over; no other sequence has steps in flight."""
        self._unread.clear()
        if kv not in self._sequences:
            self._sequences[kv] = CapturedSequence(
                self.draft, kv, self._new_graphs(), self._sizes, self._device
            )
        self._sequences[kv].begin(sampler)
        return self._sequences[kv]

    def start(self, parts: Sequence[StepPart]) -> None:
        """Launch the parts one after another, each behind the step in flight."""
        sequences = [part.sequence for part in parts if isinstance(part.sequence, CapturedSequence)]
        for sequence, part in zip(sequences, parts, strict=True):
            sequence.start(part.batch, part.feeds)
        self._unread.append(sequences)

    def read(self) -> list[Found]:
        """Wait for the oldest step in flight and return what it found, by its parts."""
        return [sequence.read() for sequence in self._unread.popleft()]


def make_draft_steps(
    draft: DraftDecoder,
    kv: KVCache,
    *,
    most_rows: int,
    vocab: int,
    device: torch.device,
    reporter: Reporter,
) -> DraftSteps:
    """Return the steps of a draft: captured on a GPU, if a first step shows that capturing works.

    If capturing fails, steps are launched directly and `reporter` gets a note with the reason. OutOfMemoryError is
    raised.
    """
    direct = DirectSteps(draft)
    if device.type == "cpu" or kv.recurrent is not None:
        return direct  # a step of recurrent layers reads where the committed state ends on the host
    try:
        steps = CapturedSteps(draft, partial(CudaGraphs, device), StepSizes(most_rows, vocab), device)
        zero = torch.zeros(1, dtype=torch.long)
        first = TokenBatch(zero, zero, 0, torch.ones((1, 1), dtype=torch.bool), zero)
        steps.start([StepPart(steps.begin(kv, GreedySampler()), first, [None])])
        steps.read()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        reporter.note(f"draft steps are launched kernel by kernel, which is slower: {reason}")
        return direct
    return steps
