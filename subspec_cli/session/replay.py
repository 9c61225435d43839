"""Replays: the target's logits of an answer's rows, computed again from its tokens through the session's own code.

The weights are those of the session, as they are or widened to float32 block by block. In float32 the difference from
another program's float32 is rounding alone, so that a fault shows that the rounding of 16 bits would hide.
Shapes: `V` vocab.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec_cli.decoding.row_groups import prompt_groups, prompt_passes
from subspec_cli.modeling.decoder import Block, Head, TargetDecoder
from subspec_cli.modeling.embedding import scaled_embedding
from subspec_cli.modeling.exact_attention import ExactAttention
from subspec_cli.modeling.kv_cache import KVCache, cache_for
from subspec_cli.modeling.layers import LayerMath, OutputMath
from subspec_cli.modeling.row_group import RowGroup, chunk_group
from subspec_cli.modeling.target_blocks import TargetBlocks
from subspec_cli.modeling.target_flow import SequenceRows
from subspec_cli.session.load import LoadedModel
from subspec_cli.session.session import Session


class Replay:
    """A target and a KV cache that compute answers again."""

    def __init__(self, target: TargetDecoder, kv: KVCache, *, prompt_rows: int, most_rows: int) -> None:
        self._target = target
        self._kv = kv
        self._prompt_rows = prompt_rows
        self._most_rows = most_rows

    def logits(self, prompt: Sequence[int], answer: Sequence[int]) -> Iterator[Tensor]:
        """Yield the logits `[rows, V]` of the rows that gave the tokens of an answer, some rows at a time.

        The prompt is read as for an answer. The answer's tokens follow in passes of at most as many rows as a tree
        may have: the plan has memory for these, and the self-check has checked them.
        """
        kv = self._kv
        kv.rewind(0)
        self._target.begin_answer(kv, len(prompt))
        *read, newest = prompt
        for groups in prompt_passes(prompt_groups(read, 0), self._prompt_rows):
            first, end = groups[0].start, groups[-1].start + groups[-1].rows
            self._pass(groups, logits_from=groups[-1].rows - 1)
            kv.commit(range(end - first), read[first:end])
        rows = (newest, *answer[:-1])
        for first in range(0, len(rows), self._most_rows):
            part = rows[first : first + self._most_rows]
            yield self._pass([chunk_group(part, kv.committed)], logits_from=0)
            kv.commit(range(len(part)), part)

    def _pass(self, groups: Sequence[RowGroup], *, logits_from: int) -> Tensor:
        flow = self._target.begin([[SequenceRows(group, self._kv)] for group in groups])
        with closing(self._target.layers(flow)) as layers:
            for _ in layers:
                pass
        return self._target.logits(flow, [(len(groups) - 1, slice(logits_from, groups[-1].rows))])


def own_replay(session: Session) -> Replay:
    """Return the replay of a session's own target over its own cache: the bits that gave the answers."""
    loaded = session.loaded
    return Replay(
        loaded.target(loaded.blocks),
        loaded.kv,
        prompt_rows=loaded.prompt_rows,
        most_rows=session.plan.tree_nodes,
    )


def float32_replay(session: Session, most_tokens: int) -> Replay:
    """Return the replay of a session's code in float32, for up to `most_tokens` of prompt and answer.

    It takes memory beyond the session's: the head, one block of a layer and a cache in float32.
    """
    loaded = session.loaded
    target = _float32_target(loaded)
    kv = cache_for(
        target.math,
        context=most_tokens,
        scratch=session.plan.tree_nodes,
        dtype=torch.float32,
        device=loaded.head.weight.device,
    )
    return Replay(
        target,
        kv,
        prompt_rows=loaded.prompt_rows // 2,
        most_rows=session.plan.tree_nodes,
    )


def _float32_target(loaded: LoadedModel) -> TargetDecoder:
    geometry, head = loaded.math.geometry, loaded.head
    small = tuple({name: tensor.float() for name, tensor in layer.items()} for layer in loaded.math.small)
    attention = ExactAttention(
        geometry, loaded.attention.rules, dtype=torch.float32, device=head.weight.device
    )
    return TargetDecoder(
        LayerMath(geometry, small, loaded.rope_table(torch.float32)),
        attention,
        scaled_embedding(lambda token_ids: loaded.embedding_rows(token_ids).float(), geometry.arithmetic),
        Head(_widened(head.output), head.weight.float()),
        _Float32Blocks(loaded.blocks),
        loaded.self_check.rules,
    )


def _widened(output: OutputMath) -> OutputMath:
    bias = output.norm_bias
    return OutputMath(output.arithmetic, output.norm_weight.float(), None if bias is None else bias.float())


@dataclass(frozen=True, slots=True)
class _Float32Blocks:
    """The target's blocks, each widened to float32 while it is in use."""

    source: TargetBlocks

    @property
    def most_held(self) -> int:
        """One: no further block is read while a widened one is in use."""
        return 1

    def blocks(self, parts: Sequence[int] = (1,)) -> Generator[Block, None, None]:
        """One pass over all layers."""
        with closing(self.source.blocks(parts)) as blocks:
            for block in blocks:
                wide = {name: tensor.float() for name, tensor in block.matrices.items()}
                yield Block(block.layer, block.kind, wide)
