"""Stand-ins for decoding tests: a model that is a table of logits by prefix, read back from the real cache.

The fake target and draft write token ids and positions as keys into a real `KVCache` and work out what each row
sees from what they read there, so a wrong mask, position, scratch row or compaction gives wrong tokens or fails.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from subspec_cli.checkpoint.layer_description import AttentionShape
from subspec_cli.config import SamplingConfig
from subspec_cli.decoding.drafter import Drafter, Proposal, TreeOrder
from subspec_cli.decoding.engine import Engine, PassOutput, Request
from subspec_cli.decoding.penalties import PathState
from subspec_cli.decoding.sampler import GreedySampler, Row, Sampler, make_sampler, sample_token
from subspec_cli.decoding.tree import TokenTree
from subspec_cli.decoding.verification import VerifyResult
from subspec_cli.drafting.draft_steps import (
    DirectSequence,
    DirectSteps,
    DraftModel,
    DraftSteps,
    Feed,
    Found,
    SequenceSteps,
    StepPart,
)
from subspec_cli.drafting.policy import DraftPolicy, FixedShape, TreeLimits
from subspec_cli.metrics import OnPrefill
from subspec_cli.modeling.decoder import DraftLogits
from subspec_cli.modeling.draft_rows import DraftRows
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.row_group import RowGroup
from subspec_cli.modeling.row_rules import RowRules
from subspec_cli.modeling.target_flow import SequenceRows
from subspec_cli.modeling.token_batch import TokenBatch, causal_batch
from subspec_cli.planning.costs import PlanCosts, RowTimes
from subspec_cli.streaming.streamer import StreamCounters

CPU = torch.device("cpu")
VOCAB = 12
PASS_BYTES = 1000
"""What one pass of the fake target seems to stream."""
DRAFT_MADE, TARGET_MADE = 1.0, 2.0
Table = Callable[[tuple[int, ...]], Row]
"""Logits `[V]` of the token after a prefix."""


def random_table(seed: int, vocab: int = VOCAB, *, spread: float = 3.0) -> Table:
    """Logits that depend on the whole prefix, in coarse steps, so that ties are common."""

    def row(prefix: tuple[int, ...]) -> Row:
        digest = zlib.crc32(repr((seed, prefix)).encode())
        return np.round(np.random.default_rng(digest).normal(0, spread, vocab) * 2) / 2

    return row


def blended(table: Table, other: Table, share: float) -> Table:
    """Logits between two tables: a draft as wrong as `share` says."""
    return lambda prefix: (1 - share) * table(prefix) + share * other(prefix)


def scripted(script: Sequence[int], table: Table, *, prompt_tokens: int, vocab: int = VOCAB) -> Table:
    """A table whose greedy answer to any prompt of this length begins with `script`."""

    def row(prefix: tuple[int, ...]) -> Row:
        at = len(prefix) - prompt_tokens
        logits = table(prefix).copy()
        if 0 <= at < len(script):
            logits[script[at]] = logits.max() + 4
        return logits

    return row


@dataclass(frozen=True)
class Call:
    """One forward: its batch, and the tokens that each row saw."""

    batch: TokenBatch
    prefixes: list[tuple[int, ...]]


@dataclass
class FakeModel:
    """What fake target and draft share: write the rows, then read every row's prefix back."""

    table: Table
    calls: list[Call] = field(default_factory=list)

    def prefixes(self, batch: TokenBatch, kv: KVCache, maker: float) -> list[tuple[int, ...]]:
        """The tokens that each real row sees, itself last; fails if they are not one gapless path."""
        n, end = batch.rows, batch.start + batch.rows
        assert batch.allowed.shape == (n, end)
        assert len(batch.key_positions) == end
        tokens, positions = batch.token_ids[:n].double(), batch.positions[:n].double()
        made = torch.full((n,), maker, dtype=torch.float64)
        keys = torch.stack((tokens, positions), -1)[None]
        kv.write(0, batch.start, keys, torch.stack((made, made), -1)[None])
        found = [self._prefix(batch, kv, row, maker) for row in range(n)]
        self.calls.append(Call(batch, found))
        return found

    @staticmethod
    def _prefix(batch: TokenBatch, kv: KVCache, row: int, maker: float) -> tuple[int, ...]:
        keys, values = kv.read(0, batch.start + batch.rows)
        columns = torch.nonzero(batch.allowed[row]).flatten()
        seen = sorted((int(at), int(token)) for token, at in keys[0, columns].tolist())
        assert [at for at, _ in seen] == list(range(int(batch.positions[row]) + 1))
        assert batch.key_positions[columns].tolist() == keys[0, columns, 1].tolist()
        for column, found in zip(columns.tolist(), values[0, columns, 0].tolist(), strict=True):
            own = maker == TARGET_MADE or column < kv.committed
            assert found == TARGET_MADE if own else found in (DRAFT_MADE, TARGET_MADE), (
                "only the target's rows are committed"
            )
        return tuple(token for _, token in seen)

    def table_rows(self, prefixes: Sequence[tuple[int, ...]]) -> Tensor:
        return torch.from_numpy(np.stack([self.table(prefix) for prefix in prefixes]))


def as_batch(group: RowGroup) -> TokenBatch:
    """The rows of a group with a mask over the cache, as a draft step has them."""
    rows, start = group.rows, group.start
    if group.path is None:
        return causal_batch(group.token_ids[:rows].tolist(), start)
    allowed = F.pad(group.path, (start, 0), value=True)
    keys = torch.cat((torch.arange(start), group.positions))
    return TokenBatch(group.token_ids[:rows], group.positions, start, allowed, keys)


@dataclass
class FakeTarget(FakeModel):
    """The exact model, with row rules that ask for padding."""

    rules: RowRules = field(default_factory=lambda: RowRules(4))
    layer_count: int = 2
    fails_at: int | None = None
    """Number of the forward that writes half its work and raises."""

    def begin_answer(self, kv: KVCache, prompt_tokens: int) -> bool:
        kv.begin_answer(prompt_tokens)
        return False

    def begin(self, batches: Sequence[Sequence[SequenceRows]]) -> SimpleNamespace:
        assert all(len(batch) == 1 or all(rows.group.path is not None for rows in batch) for batch in batches)
        return SimpleNamespace(batches=batches, prefixes=[])

    def layers(self, flow: SimpleNamespace) -> Iterator[int]:
        """Two of them; the first does all the work."""
        for batch in flow.batches:
            found = [self.prefixes(as_batch(rows.group), rows.kv, TARGET_MADE) for rows in batch]
            flow.prefixes.append([prefix for part in found for prefix in part])
        if self.fails_at is not None and len(self.calls) > self.fails_at:
            raise OSError("the disk is gone")
        yield 0
        yield 1

    def logits(self, flow: SimpleNamespace, wanted: Sequence[tuple[int, slice]]) -> Tensor:
        return self.table_rows([prefix for number, rows in wanted for prefix in flow.prefixes[number][rows]])

    def forward(self, group: RowGroup, kv: KVCache, *, logits_from: int = 0) -> Tensor:
        flow = self.begin([[SequenceRows(group, kv)]])
        for _ in self.layers(flow):
            pass
        return self.logits(flow, [(0, slice(logits_from, group.rows))])

    def counters(self) -> StreamCounters:
        """Each forward moves the same bytes and waits a second for them."""
        return StreamCounters(wait_time_s=len(self.calls), streamed_bytes=PASS_BYTES * len(self.calls))


class FakeDraft(FakeModel):
    """The guess: rows are not padded."""

    def forward(self, rows: Sequence[DraftRows]) -> DraftLogits:
        found = [self.prefixes(part.batch, part.kv, DRAFT_MADE) for part in rows]
        return DraftLogits(self.table_rows([prefix for part in found for prefix in part]))


class LateSteps(DirectSteps):
    """Steps read one later, as on a GPU: a row may take the token that the step before has found."""

    ahead = 1

    def __init__(self, draft: DraftModel) -> None:
        super().__init__(draft)
        self.unread: list[list[Found]] = []
        self.fed = 0
        self.behind: list[int] = []
        """At each reading, how many steps were started after the one that is read."""
        self._sequences: list[SequenceSteps] = []
        """Of the step before."""

    def begin(self, kv: KVCache, sampler: Sampler) -> DirectSequence:
        self.unread.clear()
        return super().begin(kv, sampler)

    def start(self, parts: Sequence[StepPart]) -> None:
        assert len(self.unread) <= self.ahead
        super().start([self._fed(part) for part in parts])
        self._sequences = [part.sequence for part in parts]
        self.unread.append(super().read())

    def _fed(self, part: StepPart) -> StepPart:
        tokens = part.batch.token_ids.tolist()
        for row, feed in enumerate(part.feeds):
            if feed is not None:
                assert self.unread, "the step before was read, so no placeholder was needed"
                before = self._sequences.index(part.sequence)
                tokens[row] = int(self.unread[-1][before].token_ids[feed])
                self.fed += 1
        batch = replace(part.batch, token_ids=torch.tensor(tokens))
        return StepPart(part.sequence, batch, [None] * len(part.feeds))

    def read(self) -> list[Found]:
        self.behind.append(len(self.unread) - 1)
        return self.unread.pop(0)


def steps_of(draft: FakeDraft, ahead: int) -> DirectSteps:
    """Steps that are read at once, or one later."""
    return LateSteps(draft) if ahead else DirectSteps(draft)


class OneSequence:
    """Draft steps with rows of one sequence only."""

    def __init__(self, steps: DraftSteps, kv: KVCache) -> None:
        self.steps = steps
        self._kv = kv
        self.begin(GreedySampler())

    def begin(self, sampler: Sampler) -> None:
        self.sequence = self.steps.begin(self._kv, sampler)

    def penalize(self, state: PathState | None) -> None:
        self.sequence.penalize(state)

    def start(self, batch: TokenBatch, feeds: Sequence[Feed | None]) -> None:
        self.steps.start([StepPart(self.sequence, batch, feeds)])

    def read(self) -> Found:
        (found,) = self.steps.read()
        return found


def grow_tree(
    drafter: Drafter, kv: KVCache, root: int, wanted: int, sampler: Sampler | None = None
) -> Proposal:
    """The first tree of an answer."""
    draft = drafter.begin(sampler or GreedySampler(), kv)
    (proposal,) = drafter.grow([TreeOrder(draft, root, wanted)])
    return proposal


def fake_cache(context: int = 64, scratch: int = 64) -> KVCache:
    """A real cache of one layer whose keys hold (token, position)."""
    return KVCache(
        [AttentionShape(1, 1, 2)], context=context, scratch=scratch, dtype=torch.float64, device=CPU
    )


def plan_costs(
    step_s: float = 0.01,
    pass_s: float = 1.0,
    *,
    row_s: float = 0.001,
    compute_s: float = 0.1,
    pass_attention_s: float = 0.0,
    step_attention_s: float = 0.0,
    prefetch_s: float = 0.0,
) -> PlanCosts:
    """A draft step of one row, what each more row adds, a pass, and the part of it that computes.

    Then what 1,024 more cached rows add, and the link time of the slots.
    """
    step = RowTimes((1, 9), (step_s, step_s + 8 * row_s))
    attention = (RowTimes((1,), (seconds,)) for seconds in (pass_attention_s, step_attention_s))
    return PlanCosts(pass_s, RowTimes((1,), (compute_s,)), step, *attention, prefetch_s)


def policy(
    depth: int = 8,
    width: int = 3,
    nodes: int = 32,
    *,
    costs: PlanCosts | None = None,
    fixed_depth: bool = False,
    fixed_width: bool = False,
    shadow_rows: int = 0,
) -> DraftPolicy:
    """A policy over two layers."""
    return DraftPolicy(
        max_tree=TreeLimits(depth, width, nodes),
        costs=costs or plan_costs(),
        layers=2,
        fixed=FixedShape(depth if fixed_depth else None, width if fixed_width else None),
        shadow_rows=shadow_rows,
    )


def free_policy(depth: int = 8, width: int = 3, nodes: int = 32, **more: Any) -> DraftPolicy:
    """A policy as deep as its limits say, whatever it costs."""
    return policy(depth, width, nodes, fixed_depth=True, **more)


@dataclass
class ScriptedDrafter:
    """Proposes trees from a function of (root token, tokens wanted): the drafter is whatever a test wants."""

    propose: Callable[[int, int], TokenTree]
    wanted: list[int] = field(default_factory=list)
    shadow_steps: int = 0

    def begin(self, sampler: Sampler, kv: KVCache) -> ScriptedDrafter:
        return self

    def grow(self, orders: Sequence[TreeOrder]) -> list[Proposal]:
        self.wanted.extend(order.tokens_wanted for order in orders)
        return [Proposal(self.propose(order.root_token, order.tokens_wanted)) for order in orders]

    def work_in_shadow(self, layer: int) -> None:
        pass

    def learn(self, result: VerifyResult, *, ends: bool) -> None:
        pass


def tree_of(token_ids: Sequence[int], parents: Sequence[int]) -> TokenTree:
    """A tree from tokens and parents; each edge has probability one half."""
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    log_probs = tuple(depth * float(np.log(0.5)) for depth in depths)
    return TokenTree(tuple(token_ids), tuple(parents), tuple(depths), log_probs)


def chain_of(token_ids: Sequence[int]) -> TokenTree:
    """Each token below the one before."""
    return tree_of(token_ids, range(-1, len(token_ids) - 1))


def plain_answer(
    table: Table, prompt: Sequence[int], count: int, sampler: Sampler | None = None
) -> list[int]:
    """The oracle: one token at a time from the table, no cache and no tree."""
    sampler = sampler or GreedySampler()
    prefix = list(prompt)
    for _ in range(count):
        prefix.append(sample_token(sampler, table(tuple(prefix)), len(prefix)))
    return prefix[len(prompt) :]


def sampled(seed: int = 0, choice: int = 0, **settings: float) -> Sampler:
    """A sampling rule; temperature 1 unless given."""
    return make_sampler(SamplingConfig(**({"temperature": 1.0} | settings)), seed, choice)


class CountdownStop:
    """Ends at an EOS token or after some tokens; text plays no part."""

    def __init__(self, limit: int, eos_ids: Sequence[int] = ()) -> None:
        self._left = limit
        self._eos_ids = eos_ids

    def feed(self, token_id: int) -> str | None:
        self._left -= 1
        if token_id in self._eos_ids:
            return "stop"
        return "length" if self._left == 0 else None


@dataclass
class AloneEngine:
    """An engine whose answers have the same cache, one after another."""

    engine: Engine
    kv: KVCache

    def generate(self, request: Request, on_prefill: OnPrefill | None = None) -> Iterator[PassOutput]:
        return self.engine.generate(request, self.kv, on_prefill)


def fake_engine(target: FakeTarget, kv: KVCache, drafter: Drafter, prompt_rows: int = 1 << 20) -> AloneEngine:
    """The real loop over fakes."""
    engine = Engine(target, drafter, counters=target.counters, prompt_rows=prompt_rows)
    return AloneEngine(engine, kv)


def request_for(
    prompt: Sequence[int], limit: int, *, eos_ids: Sequence[int] = (), sampler: Sampler | None = None
) -> Request:
    """A request without text."""
    return Request(tuple(prompt), sampler or GreedySampler(), limit, CountdownStop(limit, eos_ids))


def emitted(outputs: Iterable[PassOutput]) -> list[int]:
    """All tokens of an answer."""
    return [token for output in outputs for token in output.token_ids]


def collect(outputs: Iterable[PassOutput], tokens: list[int]) -> None:
    """Add an answer's tokens to a list that outlives whatever breaks the answer off."""
    for output in outputs:
        tokens += output.token_ids


class ByteTokenizer:
    """Tokens are runs of bytes; ids beyond them are special and have no text."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = list(pieces)

    settling = "whole characters"

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        shown = (self.pieces[token] for token in token_ids if token < len(self.pieces))
        return b"".join(shown).decode("utf-8", errors="replace")

    def drops(self, token_id: int, *, special: bool) -> bool:
        return token_id >= len(self.pieces)

    def byte_of(self, token_id: int) -> None:
        return None
