"""The decode loop: draft a tree, verify it in one target pass, keep the accepted rows, repeat.

While the pass waits for weights, planned draft steps look beyond the tree.

Knows tensors, trees and clocks; nothing of files or consoles.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from torch import Tensor

from subspec_cli.decoding.batches import prompt_batch, tree_batch
from subspec_cli.decoding.drafter import TreeGrower
from subspec_cli.decoding.sampler import Sampler, sample_token
from subspec_cli.decoding.text import StopRule
from subspec_cli.decoding.tree import TokenTree
from subspec_cli.decoding.verification import host_row, verify
from subspec_cli.errors import UsageError
from subspec_cli.limits import PREFILL_CHUNK
from subspec_cli.metrics import GenerationStats, PassStats
from subspec_cli.modeling.decoder import TargetDecoder
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.streaming.streamer import StreamCounters

__all__ = ["PREFILL_CHUNK", "Engine", "PassOutput", "Request", "common_prefix"]


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to give."""

    prompt_ids: tuple[int, ...]
    sampler: Sampler
    max_new_tokens: int
    stop: StopRule


@dataclass(frozen=True, slots=True)
class PassOutput:
    """What one target pass emitted."""

    token_ids: tuple[int, ...]
    finish_reason: str | None
    """`stop` or `length` on the last one."""
    stats: GenerationStats
    """Totals of the answer so far."""


@dataclass(frozen=True, slots=True)
class _Shadow:
    """Drafting during one pass."""

    steps: int
    time_s: float


class Engine:
    """Generates with one target, one cache and one way to grow trees."""

    def __init__(
        self,
        target: TargetDecoder,
        kv: KVCache,
        grower: TreeGrower,
        *,
        counters: Callable[[], StreamCounters],
    ) -> None:
        self._target = target
        self._kv = kv
        self._grower = grower
        self._counters = counters

    def generate(self, request: Request) -> Iterator[PassOutput]:
        """Prefill, then decode until the stop rule or the limit ends the answer.

        Afterwards, and also if the consumer leaves early, the cache holds prompt + emitted - 1 rows.
        """
        self._grower.forget()
        stats, token = self._prefill(request)
        finish = request.stop.feed(token)
        yield PassOutput((token,), finish, stats)
        while finish is None:
            started, link = time.perf_counter(), self._counters()
            proposal = self._grower.grow(token, request.sampler, request.max_new_tokens - stats.new_tokens)
            tree = proposal.tree
            drafted_at = time.perf_counter()
            logits, shadow = self._verify_pass(tree)
            result = verify(tree, logits, request.sampler, self._kv.committed)
            verified_at = time.perf_counter()
            token_ids, finish = _clip(result.token_ids, request.stop)
            kept = result.accepted_nodes[: len(token_ids)]
            self._kv.commit(kept, [tree.token_ids[node] for node in kept])
            self._grower.learn(result, ends=finish is not None)
            token = token_ids[-1]
            moved = self._counters().since(link)
            step = PassStats(
                drafted=len(tree) - 1,
                accepted=result.accepted,
                emitted=len(token_ids),
                depth=tree.depth,
                draft_steps=proposal.draft_steps,
                ready_nodes=proposal.ready_nodes,
                shadow_steps=shadow.steps,
                draft_cost_s=proposal.cost_s,
                draft_time_s=drafted_at - started,
                verify_time_s=verified_at - drafted_at,
                shadow_time_s=shadow.time_s,
                wait_time_s=moved.wait_time_s,
                link_time_s=moved.read_time_s,
                streamed_bytes=moved.streamed_bytes,
            )
            stats = stats.after_pass(step, decode_time_s=stats.decode_time_s + time.perf_counter() - started)
            yield PassOutput(token_ids, finish, stats)

    def _verify_pass(self, tree: TokenTree) -> tuple[Tensor, _Shadow]:
        """The target's logits `[N, V]` of a tree's nodes, and what was drafted meanwhile."""
        batch = tree_batch(tree, self._kv.committed, self._target.rules)
        flow, steps, shadow_s = self._target.begin_tokens(batch, self._kv), 0, 0.0
        # Closed at once when a block fails or the user interrupts: the next pass starts at the first block.
        with closing(self._target.layers(flow)) as layers:
            for layer in layers:
                started = time.perf_counter()
                steps += self._grower.work_in_shadow(layer)
                shadow_s += time.perf_counter() - started
        return self._target.logits(flow), _Shadow(steps, shadow_s)

    def _prefill(self, request: Request) -> tuple[GenerationStats, int]:
        """Compute the prompt rows that the cache lacks; returns the first token, chosen from the last row."""
        started = time.perf_counter()
        prompt = request.prompt_ids
        if len(prompt) + 1 > self._kv.context:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens, the context holds {self._kv.context}",
                "shorten the prompt, or raise --context",
            )
        # The last prompt row is always computed: its logits give the first token.
        reused = min(common_prefix(prompt, self._kv.token_ids), len(prompt) - 1)
        self._kv.rewind(reused)
        position = reused
        while position < len(prompt):
            end = min(len(prompt), (position // PREFILL_CHUNK + 1) * PREFILL_CHUNK)
            chunk = prompt[position:end]
            batch = prompt_batch(chunk, position, self._target.rules)
            logits = self._target.forward(batch, self._kv, logits_from=len(chunk) - 1)
            self._kv.commit(range(len(chunk)), chunk)
            position = end
        token = sample_token(request.sampler, host_row(logits[0], len(prompt) - 1), len(prompt))
        stats = GenerationStats().after_prefill(
            prompt_tokens=len(prompt),
            prefilled_tokens=len(prompt) - reused,
            ttft_s=time.perf_counter() - started,
        )
        return stats, token


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    return next(
        (n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


def _clip(token_ids: Sequence[int], stop: StopRule) -> tuple[tuple[int, ...], str | None]:
    """Tokens up to and including the one that ends the answer, and the finish reason if one does."""
    for count, token_id in enumerate(token_ids, start=1):
        if reason := stop.feed(token_id):
            return tuple(token_ids[:count]), reason
    return tuple(token_ids), None
