"""The self-check at load: are the kernels batch-invariant on this machine, for this model's shapes?

Batch-invariant means that a row is bit-identical for any rows computed beside it. The check runs all blocks
of the first layer, as they are streamed, and the head, on rows of random states: alone, beside others, in other
places, at every row count that the session can use. It selects the smallest row block for which every row keeps
its bits. If there is none, the session is `numeric` and says why. Nothing claims `exact` unchecked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Final

import torch
from torch import Tensor

from subspec_cli.checkpoint.layer_tensors import LAYER_BLOCKS
from subspec_cli.metrics import Exactness
from subspec_cli.modeling.decoder import Block, BlockStream, Head, TargetDecoder
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.row_rules import RowRules
from subspec_cli.modeling.token_batch import TokenBatch, causal_batch

_ROW_BLOCKS: Final = (2, 4, 8, 16, 32, 64)
_DEVICE_ROW_BLOCK: Final = 64
"""Fixed rows per linear call off the CPU, where kernels change with the shape."""
_REVERSED_COUNTS: Final = (2, 3, 5, 8, 17, 33, 64)
_CAUSAL_ROWS: Final = 24
_SAMPLED_ELEMENTS: Final = 1 << 15
"""Results to compare at each row size: kernels that round differently differed in 1 of 4000 results."""
_MOST_SAMPLED_ROWS: Final = 192


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """The outcome of the self-check."""

    exactness: Exactness
    reason: str
    rules: RowRules
    threads: int


def candidate_rules(device: torch.device) -> Iterator[RowRules]:
    """The row rules to try, cheapest first."""
    if device.type != "cpu":
        yield RowRules(_DEVICE_ROW_BLOCK, fixed_rows=True)
        return
    for row_block in _ROW_BLOCKS:
        yield RowRules(row_block)
        yield RowRules(row_block, tile_elementwise=True)


@torch.inference_mode()
def check_batch_invariance(
    decoder_for: Callable[[RowRules], TargetDecoder],
    head: Head,
    stream: BlockStream,
    *,
    most_nodes: int,
    prefill_rows: int,
) -> SelfCheck:
    """Find row rules under which rows are batch-invariant; `decoder_for` builds the target with given rules."""
    counts = row_counts(most_nodes, prefill_rows)
    dtype, device = head.weight.dtype, head.weight.device
    states = _random_states(head.weight.shape[1], max(counts), dtype, device)
    threads = torch.get_num_threads()
    failure = ""
    for rules in candidate_rules(device):
        failure = _first_failure(decoder_for(rules), head, stream, states, counts, most_nodes)
        if not failure and dtype in (torch.bfloat16, torch.float16):
            return SelfCheck("exact", f"rows checked in blocks of {rules.row_block}", rules, threads)
        if not failure:
            name = str(dtype).removeprefix("torch.")
            return SelfCheck("numeric", f"{name} sums can round by the order of keys", rules, threads)
    return SelfCheck("numeric", f"{failure} lets a row's bits depend on its neighbours", rules, threads)


def row_counts(most_nodes: int, prefill_rows: int) -> tuple[int, ...]:
    """The row counts to check: all small ones, then the sizes in use and their neighbours, up to the largest."""
    most = max(most_nodes, prefill_rows)
    counts = {*range(1, 18), 24, 31, 32, 33, 48, 49, *range(64, most, 64), 65, most - 1, most, most_nodes}
    return tuple(sorted(n for n in counts if 1 <= n <= most))


def _first_failure(
    decoder: TargetDecoder,
    head: Head,
    stream: BlockStream,
    states: Tensor,
    counts: Sequence[int],
    most_nodes: int,
) -> str:
    """The name of the first part that is not batch-invariant; empty if all are."""
    with closing(stream.blocks()) as blocks:
        for block in islice(blocks, len(LAYER_BLOCKS)):
            if not _rows_keep_bits(partial(_run_block, decoder, block), decoder.rules, states, counts):
                return f"the {block.kind} block"
            if block.kind == "attention" and not _decode_equals_prefill(decoder, block, states):
                return "attention over the cache"
    # Prefill needs the logits of the last row only, so the head never gets a whole chunk.
    few = [count for count in counts if count <= most_nodes]
    if not _rows_keep_bits(lambda rows: head.logits(rows, decoder.rules), decoder.rules, states, few):
        return "the head"
    return ""


def _rows_keep_bits(
    run: Callable[[Tensor], Tensor], rules: RowRules, states: Tensor, counts: Sequence[int]
) -> bool:
    """Whether each row's result is bit-identical at every count, beside other rows and in reversed order."""
    reference = run(states[: rules.padded(counts[-1])])
    for count in counts:
        padding = states[-1:].expand(rules.padded(count) - count, -1)
        if not torch.equal(run(torch.cat((states[:count], padding)))[:count], reference[:count]):
            return False
    for count in _REVERSED_COUNTS:
        padded = min(rules.padded(count), len(reference))
        if not _equal_flipped(run(states[:padded].flip(0)), reference[:padded]):
            return False
    sizes = sorted({rules.padded(count) for count in counts})
    return all(_windows_keep_bits(run, states, reference, size) for size in sizes)


def _equal_flipped(found: Tensor, reference: Tensor) -> bool:
    """Whether `found` is `reference` in reversed order; row by row, since a flipped copy of logits is large."""
    last = len(found) - 1
    return all(torch.equal(found[last - row], reference[row]) for row in range(len(found)))


def _windows_keep_bits(run: Callable[[Tensor], Tensor], states: Tensor, reference: Tensor, size: int) -> bool:
    """Whether calls of `size` rows give the reference's results, for enough rows to show a rare rounding."""
    rows = min(_MOST_SAMPLED_ROWS, _SAMPLED_ELEMENTS // reference.shape[1] + 1, len(reference) - size + 1)
    return all(
        torch.equal(run(states[start : start + size]), reference[start : start + size])
        for start in range(0, rows, size)
    )


def _run_block(decoder: TargetDecoder, block: Block, rows: Tensor) -> Tensor:
    """Run one block on `[P, hidden]` rows, each at position 0 and attending to itself only."""
    zeros = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    alone = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    batch = TokenBatch(zeros, zeros, len(rows), 0, alone, zeros)
    # A small residual, since adding a large one would hide how the rest was rounded; norms rescale it.
    flow = decoder.begin_rows(rows / 256, batch, _one_layer_cache(decoder, rows))
    flow.normed = rows
    flow.inner = _widened(rows, decoder.math.geometry.feed_forward)
    decoder.run_block(block, flow)
    return flow.hidden if block.kind in ("attention", "down") else flow.inner


def _decode_equals_prefill(decoder: TargetDecoder, block: Block, states: Tensor) -> bool:
    """Whether causal rows that are computed one by one over the cache equal the same rows in one batch."""
    rows = states[:_CAUSAL_ROWS]
    kv = _one_layer_cache(decoder, rows)

    def attend(start: int, count: int) -> Tensor:
        padded = decoder.rules.padded(count)
        padding = rows[-1:].expand(padded - count, -1)
        hidden = torch.cat((rows[start : start + count], padding))
        flow = decoder.begin_rows(hidden, causal_batch([0] * count, start, padded), kv)
        decoder.run_block(block, flow)
        return flow.hidden[:count]

    together = attend(0, len(rows))
    return all(torch.equal(attend(row, 1)[0], together[row]) for row in range(len(rows)))


def _one_layer_cache(decoder: TargetDecoder, rows: Tensor) -> KVCache:
    geometry = decoder.math.geometry
    return KVCache(
        layers=1,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        context=0,
        scratch=len(rows),
        dtype=rows.dtype,
        device=rows.device,
    )


def _random_states(hidden: int, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    padded = -(-rows // max(_ROW_BLOCKS)) * max(_ROW_BLOCKS)
    return torch.randn((padded, hidden), generator=generator).to(device, dtype)


def _widened(rows: Tensor, width: int) -> Tensor:
    """A copy of the rows, repeated along their width to `width` columns."""
    return rows.repeat(1, -(-width // rows.shape[1]))[:, :width].contiguous()
