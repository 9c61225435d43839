"""The decode loop: draft trees, verify them in one target pass, commit the accepted rows, emit, repeat.

While the pass waits for weights, planned draft steps look beyond the trees. The engine knows tensors, trees and one
drafter; it knows nothing of costs, files or consoles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from subspec_cli.decoding.constraint import Constraint
from subspec_cli.decoding.drafter import Draft, Drafter, Proposal, TreeOrder
from subspec_cli.decoding.logprobs import TokenLogprobs, token_logprobs
from subspec_cli.decoding.meter import OwnCounts, PromptMeter, RoundMeter
from subspec_cli.decoding.penalties import NO_PENALTIES, PathState, Penalties, begin_path
from subspec_cli.decoding.row_groups import prompt_groups, tree_group
from subspec_cli.decoding.sampler import Sampler, sample_token
from subspec_cli.decoding.text import StopRule
from subspec_cli.decoding.tree import TokenTree
from subspec_cli.decoding.verification import VerifyResult, host_row, verify
from subspec_cli.errors import UsageError
from subspec_cli.metrics import FinishReason, GenerationStats, OnPrefill
from subspec_cli.modeling.decoder import TargetDecoder
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.row_group import RowGroup
from subspec_cli.modeling.target_flow import SequenceRows
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
    logprobs: int | None = None
    """Likeliest tokens to tell beside each token, with its log-probability; None tells neither."""
    constraint: Constraint | None = None
    """State of a grammar before the answer's first token."""


@dataclass(frozen=True, slots=True)
class PassOutput:
    """What one target pass emitted."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    """Set on the last output only."""
    stats: GenerationStats
    """Totals of the answer so far."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token, if the request wants them."""


class Answer:
    """An answer in flight: `Engine.join` begins it, and `Engine.round` goes on with it.

    Once it has a token, the newest one is the root of the next tree and is not in the cache yet.
    """

    def __init__(self, request: Request, kv: KVCache, draft: Draft, meter: PromptMeter, reused: int) -> None:
        self.request = request
        self.kv = kv
        self.draft = draft
        self.prompt = request.prompt_ids + request.given_ids
        """The tokens to read before the first token of the answer."""
        self.reused = reused
        """Tokens of the prompt that were in the cache already."""
        self.meter = meter
        self.prompt_passes = 0
        self.output: PassOutput | None = None
        """The newest one; None while the prompt is read."""
        self.state: PathState | None = None
        """What penalties and a grammar know behind the newest token; None without them."""

    @property
    def is_reading(self) -> bool:
        """Whether rows of the prompt are still to be computed."""
        return self.output is None

    @property
    def has_ended(self) -> bool:
        """Whether the last token is there."""
        return self.output is not None and self.output.finish_reason is not None

    @property
    def chunks(self) -> Iterator[RowGroup]:
        """The chunks of the prompt that are still to be read."""
        return prompt_groups(self.prompt, self.kv.committed)

    def order(self) -> TreeOrder[Draft]:
        """Return what tree is wanted next."""
        assert self.output is not None
        wanted = self.request.max_new_tokens - self.output.stats.new_tokens
        return TreeOrder(self.draft, self.output.token_ids[-1], wanted, self.state)


class _Reading(NamedTuple):
    """Chunks of a prompt that are read in one pass."""

    answer: Answer
    groups: list[RowGroup]

    @property
    def end(self) -> int:
        """Position behind the last row."""
        return self.groups[-1].start + self.groups[-1].rows


class Engine:
    """Generates with one target and one drafter; every answer has a KV cache of its own.

    The unit of work is a round: the trees of all answers that have a token, and chunks of prompts that are still to
    be read, go through one pass of the target's weights. Answers join and leave between rounds. No row depends on the
    rows beside it, so an answer's tokens do not depend on its company.
    """

    def __init__(
        self,
        target: TargetDecoder,
        drafter: Drafter[Any],
        *,
        counters: Callable[[], StreamCounters],
        prompt_rows: int,
        company_rows: int = 0,
    ) -> None:
        """A pass has at least one chunk of a prompt, if there is one.

        Args:
            target: the exact model.
            drafter: drafts for all answers.
            counters: totals of the stream of weights.
            prompt_rows: most prompt rows of a pass without trees.
            company_rows: most prompt rows of a pass with trees.
        """
        self._target = target
        self._drafter = drafter
        self._counters = counters
        self._prompt_rows = prompt_rows
        self._company_rows = company_rows

    def generate(
        self, request: Request, kv: KVCache, on_prefill: OnPrefill | None = None
    ) -> Iterator[PassOutput]:
        """Answer one request alone, over a cache that may hold a prefix of its prompt.

        `on_prefill` receives how far the prompt is read. Afterwards, and also if the consumer leaves early, the cache
        holds prompt + emitted - 1 rows.
        """
        answer = self.join(request, kv, on_prefill)
        while not answer.has_ended:
            for _, output in self.round([answer]):
                yield output

    def join(self, request: Request, kv: KVCache, on_prefill: OnPrefill | None = None) -> Answer:
        """Begin an answer over a cache that no other answer in flight has; the next rounds read its prompt.

        Raises UsageError if the context has no room for the prompt and a token.
        """
        meter = PromptMeter(on_prefill)
        draft = self._drafter.begin(request.sampler, kv)
        prompt = request.prompt_ids + request.given_ids
        if len(prompt) + 1 > kv.context:
            raise UsageError(
                f"the prompt has {counted(len(prompt), 'token')}, the context holds {kv.context}",
                "shorten the prompt, or raise --context",
            )
        # Rotary positions and penalties tell a prompt from its answer, whoever computes the rows.
        turned_anew = self._target.begin_answer(kv, len(request.prompt_ids))
        reused = 0 if turned_anew else min(common_prefix(prompt, kv.token_ids), len(prompt) - 1)
        return Answer(request, kv, draft, meter, kv.rewind(reused))

    def round(
        self, answers: Sequence[Answer], on_layer: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[Answer, PassOutput]]:
        """Run one pass for some answers in flight; yield what it emitted, by answer.

        An answer that is still reading its prompt may emit nothing. If the round fails or is interrupted, answers
        stay as they were before it, but for those whose output was yielded. `on_layer` is called behind every layer
        of the pass; what it raises ends the round.
        """
        decoding = [answer for answer in answers if not answer.is_reading]
        meter = RoundMeter(self._counters)
        proposals: list[Proposal] = []
        if decoding:
            with meter.timed("draft"):
                proposals = self._drafter.grow([answer.order() for answer in decoding])
        readings = self._readings(answers, self._company_rows if decoding else self._prompt_rows)
        trees = [proposal.tree for proposal in proposals]
        with meter.timed("verify"):
            read_rows, tree_rows = self._target_pass(readings, decoding, trees, meter, on_layer)
        for reading, row in zip(readings, read_rows, strict=True):
            if (output := self._end_reading(reading, row)) is not None:
                yield reading.answer, output
        with meter.timed("verify"):
            results = [
                verify(
                    tree,
                    logits,
                    answer.request.sampler,
                    answer.kv.committed,
                    answer.state,
                    answer.request.logprobs,
                )
                for answer, tree, logits in zip(decoding, trees, tree_rows, strict=True)
            ]
        for answer, proposal, result in zip(decoding, proposals, results, strict=True):
            yield answer, self._end_tree(answer, proposal, result, meter)

    def _readings(self, answers: Sequence[Answer], most_rows: int) -> list[_Reading]:
        """Return what is read of prompts: whole chunks, in the order of the answers, at least one if there is any."""
        found: list[_Reading] = []
        rows = 0
        for answer in answers:
            groups: list[RowGroup] = []
            for group in answer.chunks if answer.is_reading else ():
                if (found or groups) and rows + group.rows > most_rows:
                    break
                groups.append(group)
                rows += group.rows
            if groups:
                found.append(_Reading(answer, groups))
            if rows >= most_rows and found:
                break
        return found

    def _target_pass(
        self,
        readings: Sequence[_Reading],
        decoding: Sequence[Answer],
        trees: Sequence[TokenTree],
        meter: RoundMeter,
        on_layer: Callable[[], None],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits: the last row `[V]` of what is read of each prompt, and `[N, V]` of each tree's nodes."""
        batches = [[SequenceRows(group, answer.kv)] for answer, groups in readings for group in groups]
        if trees:
            batches.append(
                [
                    SequenceRows(tree_group(tree, answer.kv.committed), answer.kv)
                    for answer, tree in zip(decoding, trees, strict=True)
                ]
            )
        for reading in readings:
            reading.answer.kv.want_snapshot(reading.groups[-1].start)
        flow = self._target.begin(batches)
        # Closed at once when a block fails or the user interrupts: the next pass starts at the first block.
        with closing(self._target.layers(flow)) as layers:
            for layer in layers:
                on_layer()
                for reading in readings:
                    self._report(reading, (layer + 1) / self._target.layer_count)
                if trees:
                    with meter.timed("shadow"):
                        self._drafter.work_in_shadow(layer)
        wanted, number = [], -1
        for reading in readings:
            number += len(reading.groups)
            wanted.append((number, slice(reading.groups[-1].rows - 1, reading.groups[-1].rows)))
        sizes = [len(tree) for tree in trees]
        if trees:
            wanted.append((len(batches) - 1, slice(sum(sizes))))
        logits = self._target.logits(flow, wanted)
        return list(logits[: len(readings)]), list(logits[len(readings) :].split(sizes)) if trees else []

    def _report(self, reading: _Reading, share: float) -> None:
        answer = reading.answer
        first, end = answer.kv.committed - answer.reused, reading.end - answer.reused
        answer.meter.report(first + share * (end - first), len(answer.prompt) - answer.reused)

    def _end_reading(self, reading: _Reading, row: Tensor) -> PassOutput | None:
        """Commit the rows that were read; at the prompt's end, emit the first token."""
        answer, kv = reading.answer, reading.answer.kv
        request, prompt = answer.request, answer.prompt
        last = reading.end == len(prompt)
        logits = host_row(row, len(prompt) - 1) if last else None
        rows = prompt[kv.committed : reading.end]
        kv.commit(range(len(rows)), rows)
        answer.prompt_passes += 1
        if logits is None:
            return None
        kv.keep_snapshot()
        state = begin_path(request.penalties, request.prompt_ids, len(logits), request.constraint)
        state = None if state is None else state.after(*request.given_ids)
        token = sample_token(request.sampler, logits, len(prompt), state)
        answer.state = None if state is None else state.after(token)
        stats = GenerationStats().after_prefill(
            prompt_tokens=len(prompt),
            prefilled_tokens=len(prompt) - answer.reused,
            prefill_passes=answer.prompt_passes,
            ttft_s=answer.meter.elapsed_s(),
        )
        told = () if request.logprobs is None else (token_logprobs(logits, token, request.logprobs),)
        answer.output = PassOutput((token,), request.stop.feed(token), stats, told)
        return answer.output

    def _end_tree(
        self, answer: Answer, proposal: Proposal, result: VerifyResult, meter: RoundMeter
    ) -> PassOutput:
        """Commit the accepted rows up to the token that ends the answer, and emit the tokens."""
        assert answer.output is not None
        tree, cached_rows, shadow_steps = proposal.tree, answer.kv.committed, answer.draft.shadow_steps
        token_ids, finish_reason = _clip(result.token_ids, answer.request.stop)
        kept = result.accepted_nodes[: len(token_ids)]
        answer.kv.commit(kept, [tree.token_ids[node] for node in kept])
        answer.state = None if answer.state is None else answer.state.after(*token_ids)
        answer.draft.learn(result, ends=finish_reason is not None)
        own = OwnCounts(len(token_ids), cached_rows, shadow_steps)
        stats = answer.output.stats.after_pass(meter.stats(proposal, result, own))
        answer.output = PassOutput(token_ids, finish_reason, stats, result.logprobs[: len(token_ids)])
        return answer.output


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
