"""The decode loop: draft a tree, verify it in one target pass, commit the accepted rows, emit, repeat.

While the pass waits for weights, planned draft steps look beyond the tree. The engine knows tensors, trees and one
drafter; it knows nothing of costs, files or consoles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from torch import Tensor

from subspec_cli.decoding.drafter import Draft, Drafter
from subspec_cli.decoding.meter import PromptMeter, RoundMeter
from subspec_cli.decoding.penalties import NO_PENALTIES, PathState, Penalties, begin_path
from subspec_cli.decoding.row_groups import prompt_groups, prompt_passes, tree_group
from subspec_cli.decoding.sampler import Sampler, sample_token
from subspec_cli.decoding.text import StopRule
from subspec_cli.decoding.tree import TokenTree
from subspec_cli.decoding.verification import VerifyResult, host_row, verify
from subspec_cli.errors import UsageError
from subspec_cli.metrics import FinishReason, GenerationStats, OnPrefill
from subspec_cli.modeling.decoder import TargetDecoder
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.row_group import RowGroup
from subspec_cli.streaming.streamer import StreamCounters
from subspec_cli.units import counted


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to give."""

    prompt_ids: tuple[int, ...]
    sampler: Sampler
    max_new_tokens: int
    stop: StopRule
    penalties: Penalties = NO_PENALTIES
    given_ids: tuple[int, ...] = ()
    """The answer's beginning, if it was given before and goes on; `stop` has been fed with it."""


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
    state: PathState | None
    """What penalties know behind the newest token; None without penalties."""

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
        prompt_rows: int,
    ) -> None:
        """`prompt_rows` bounds the prompt rows of one pass; a pass has at least one chunk of a prompt."""
        self._prompt_rows = prompt_rows
        self._target = target
        self._kv = kv
        self._drafter = drafter
        self._counters = counters

    def generate(self, request: Request, on_prefill: OnPrefill | None = None) -> Iterator[PassOutput]:
        """Prefill, then run rounds until the stop rule or the limit ends the answer.

        `on_prefill` receives how far the prompt is read. Afterwards, and also if the consumer leaves early, the cache
        holds prompt + emitted - 1 rows.
        """
        in_flight = [self._prefill(request, on_prefill)]
        yield in_flight[0].output
        while in_flight := [answer for answer in in_flight if answer.output.finish_reason is None]:
            meter = RoundMeter(self._counters, self._kv.committed)
            with meter.timed("draft"):
                proposals = [
                    answer.draft.grow(answer.output.token_ids[-1], answer.tokens_wanted, answer.state)
                    for answer in in_flight
                ]
            with meter.timed("verify"):
                results = self._verify(in_flight, [proposal.tree for proposal in proposals], meter)
            for answer, proposal, result in zip(in_flight, proposals, results, strict=True):
                token_ids, finish_reason = self._commit(proposal.tree, result, answer.request.stop)
                answer.state = None if answer.state is None else answer.state.after(*token_ids)
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
        return [verify(tree, logits, answer.request.sampler, self._kv.committed, answer.state)]

    def _target_pass(self, tree: TokenTree, draft: Draft, meter: RoundMeter) -> Tensor:
        """Return the target's logits `[N, V]` of a tree's `N` nodes."""
        flow = self._target.begin([tree_group(tree, self._kv.committed, self._target.rules)], self._kv)
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

    def _prefill(self, request: Request, on_prefill: OnPrefill | None) -> _Answer:
        """Compute the rows of prompt and given tokens that the cache lacks; the last row gives the next token."""
        meter = PromptMeter(on_prefill)
        draft = self._drafter.begin(request.sampler)
        prompt = request.prompt_ids + request.given_ids
        if len(prompt) + 1 > self._kv.context:
            raise UsageError(
                f"the prompt has {counted(len(prompt), 'token')}, the context holds {self._kv.context}",
                "shorten the prompt, or raise --context",
            )
        # Rotary positions and penalties tell a prompt from its answer, whoever computes the rows.
        turned_anew = self._target.begin_answer(len(request.prompt_ids))
        reused = 0 if turned_anew else min(common_prefix(prompt, self._kv.token_ids), len(prompt) - 1)
        reused = self._kv.rewind(reused)
        passes = prompt_passes(prompt_groups(prompt, reused, self._target.rules), self._prompt_rows)
        for groups in passes:
            self._kv.want_snapshot(groups[-1].start)
            first, end = groups[0].start, groups[-1].start + groups[-1].rows
            logits = self._prompt_pass(
                groups, meter.pass_of(first - reused, end - reused, len(prompt) - reused)
            )
            self._kv.commit(range(end - first), prompt[first:end])
        self._kv.keep_snapshot()
        row = host_row(logits[0], len(prompt) - 1)
        state = begin_path(request.penalties, request.prompt_ids, len(row))
        state = None if state is None else state.after(*request.given_ids)
        token = sample_token(request.sampler, row, len(prompt), state)
        state = None if state is None else state.after(token)
        stats = GenerationStats().after_prefill(
            prompt_tokens=len(prompt),
            prefilled_tokens=len(prompt) - reused,
            prefill_passes=len(passes),
            ttft_s=meter.elapsed_s(),
        )
        return _Answer(request, draft, PassOutput((token,), request.stop.feed(token), stats), state)

    def _prompt_pass(self, groups: Sequence[RowGroup], on_layers: Callable[[float], None]) -> Tensor:
        """Run chunks of a prompt through all layers; return the logits `[1, V]` of the last row.

        `on_layers` receives the share of the layers that is done.
        """
        flow = self._target.begin(groups, self._kv)
        with closing(self._target.layers(flow)) as layers:
            for done, _ in enumerate(layers, start=1):
                on_layers(done / self._target.layer_count)
        return self._target.logits(flow, logits_from=groups[-1].rows - 1)


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
