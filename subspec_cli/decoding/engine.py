"""The decode loop: draft a tree, verify it in one target pass, commit the accepted rows, emit, repeat.

While the pass waits for weights, planned draft steps look beyond the tree. The engine knows tensors, trees and one
drafter; it knows nothing of costs, files or consoles.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from torch import Tensor

from subspec_cli.decoding.batches import prompt_batch, tree_batch
from subspec_cli.decoding.drafter import Draft, Drafter
from subspec_cli.decoding.meter import RoundMeter
from subspec_cli.decoding.sampler import Sampler, sample_token
from subspec_cli.decoding.text import StopRule
from subspec_cli.decoding.tree import TokenTree
from subspec_cli.decoding.verification import VerifyResult, host_row, verify
from subspec_cli.errors import UsageError
from subspec_cli.limits import PREFILL_CHUNK
from subspec_cli.metrics import FinishReason, GenerationStats
from subspec_cli.modeling.decoder import TargetDecoder
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.streaming.streamer import StreamCounters


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
    finish_reason: FinishReason | None
    """Set on the last output only."""
    stats: GenerationStats
    """Totals of the answer so far."""


@dataclass(slots=True)
class _Answer:
    """An answer in flight. Its newest token is the root of the next tree and is not in the cache yet."""

    request: Request
    draft: Draft
    output: PassOutput

    @property
    def tokens_wanted(self) -> int:
        return self.request.max_new_tokens - self.output.stats.new_tokens


class Engine:
    """Generates with one target, one KV cache and one drafter."""

    def __init__(
        self,
        target: TargetDecoder,
        kv: KVCache,
        drafter: Drafter,
        *,
        counters: Callable[[], StreamCounters],
    ) -> None:
        self._target = target
        self._kv = kv
        self._drafter = drafter
        self._counters = counters

    def generate(self, request: Request) -> Iterator[PassOutput]:
        """Prefill, then run rounds until the stop rule or the limit ends the answer.

        Afterwards, and also if the consumer leaves early, the cache holds prompt + emitted - 1 rows.
        """
        in_flight = [self._prefill(request)]
        yield in_flight[0].output
        while in_flight := [answer for answer in in_flight if answer.output.finish_reason is None]:
            meter = RoundMeter(self._counters, self._kv.committed)
            with meter.timed("draft"):
                proposals = [
                    answer.draft.grow(answer.output.token_ids[-1], answer.tokens_wanted)
                    for answer in in_flight
                ]
            with meter.timed("verify"):
                results = self._verify(in_flight, [proposal.tree for proposal in proposals], meter)
            for answer, proposal, result in zip(in_flight, proposals, results, strict=True):
                token_ids, finish_reason = self._commit(proposal.tree, result, answer.request.stop)
                answer.draft.learn(result, ends=finish_reason is not None)
                stats = answer.output.stats.after_pass(meter.stats(proposal, result, len(token_ids)))
                answer.output = PassOutput(token_ids, finish_reason, stats)
                yield answer.output

    def _verify(
        self, in_flight: Sequence[_Answer], trees: Sequence[TokenTree], meter: RoundMeter
    ) -> list[VerifyResult]:
        """Run one pass over the trees of all answers, and draft in its shadow."""
        (answer,), (tree,) = in_flight, trees  # the cache holds one sequence
        logits = self._target_pass(tree, answer.draft, meter)
        return [verify(tree, logits, answer.request.sampler, self._kv.committed)]

    def _target_pass(self, tree: TokenTree, draft: Draft, meter: RoundMeter) -> Tensor:
        """Return the target's logits `[N, V]` of a tree's `N` nodes."""
        flow = self._target.begin_tokens(tree_batch(tree, self._kv.committed, self._target.rules), self._kv)
        # Closed at once when a block fails or the user interrupts: the next pass starts at the first block.
        with closing(self._target.layers(flow)) as layers:
            for layer in layers:
                with meter.timed("shadow"):
                    meter.add_shadow_steps(draft.work_in_shadow(layer))
        return self._target.logits(flow)

    def _commit(
        self, tree: TokenTree, result: VerifyResult, stop: StopRule
    ) -> tuple[tuple[int, ...], FinishReason | None]:
        """Commit the accepted rows up to the token that ends the answer; return the tokens and the reason."""
        token_ids, finish_reason = _clip(result.token_ids, stop)
        kept = result.accepted_nodes[: len(token_ids)]
        self._kv.commit(kept, [tree.token_ids[node] for node in kept])
        return token_ids, finish_reason

    def _prefill(self, request: Request) -> _Answer:
        """Compute the prompt rows that the cache lacks; the last row's logits give the first token."""
        started = time.perf_counter()
        draft = self._drafter.begin(request.sampler)
        prompt = request.prompt_ids
        if len(prompt) + 1 > self._kv.context:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens, the context holds {self._kv.context}",
                "shorten the prompt, or raise --context",
            )
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
        return _Answer(request, draft, PassOutput((token,), request.stop.feed(token), stats))


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    return next(
        (n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


def _clip(token_ids: Sequence[int], stop: StopRule) -> tuple[tuple[int, ...], FinishReason | None]:
    """Cut the tokens after the one that ends the answer; the reason is None if none does."""
    for count, token_id in enumerate(token_ids, start=1):
        if reason := stop.feed(token_id):
            return tuple(token_ids[:count]), reason
    return tuple(token_ids), None
