"""The self-check at load: are the kernels batch-invariant on this machine, for this model's shapes?

Batch-invariant means that a row is bit-identical for any rows computed beside it. The check runs all blocks
of the first layer, as they are streamed, and the head, on rows of random states: alone, beside others, in other
places, at every row count that the session can use. It selects the smallest row block for which every row keeps
its bits; `attention_check` does the same for attention over the cache. If nothing holds, the session is `numeric` and
says why. Nothing claims `exact` unchecked.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Final, NamedTuple

import torch
from torch import Tensor

from subspec_cli.checkpoint.layer_tensors import LAYER_BLOCKS
from subspec_cli.errors import ResourceError
from subspec_cli.limits import ROW_SIZES
from subspec_cli.metrics import Exactness
from subspec_cli.modeling.attention_check import find_attention_rules
from subspec_cli.modeling.decoder import Block, BlockStream, Head, TargetDecoder
from subspec_cli.modeling.exact_attention import AttentionRules, ExactAttention
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.row_group import RowGroup
from subspec_cli.modeling.row_rules import CPU_CALL_ROWS, GPU_CALL_ROWS, ROW_BLOCKS, RowRules
from subspec_cli.modeling.target_flow import BatchFlow, SequenceRows

_REVERSED_COUNTS: Final = (2, 3, 5, 8, 17, 33, 64)
_SAMPLED_ELEMENTS: Final = 1 << 15
"""Results to compare at each row size: kernels that round differently differed in 1 of 4000 results."""
_MOST_SAMPLED_ROWS: Final = 192
_PRODUCT_ROWS: Final = 8
"""Rows of the product that is compared with float64."""
_PRODUCT_FEATURES: Final = 256
"""Features of the product that are compared at a time."""
_PRODUCT_TOLERANCE: Final = 2.0**-5
"""Largest difference from float64, as a share of the sum of magnitudes: far above rounding, far below junk."""


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """The outcome of the self-check."""

    exactness: Exactness
    reason: str
    rules: RowRules
    attention: AttentionRules
    threads: int


def candidate_rules(device: torch.device) -> Iterator[RowRules]:
    """The row rules to try, cheapest first."""
    if device.type != "cpu":
        yield RowRules(GPU_CALL_ROWS, fixed_rows=True)
        return
    for row_block in ROW_BLOCKS:
        yield RowRules(row_block)
        yield RowRules(row_block, tile_elementwise=True)
    for row_block in CPU_CALL_ROWS:
        yield RowRules(row_block, fixed_rows=True)
        yield RowRules(row_block, fixed_rows=True, tile_elementwise=True)


@torch.inference_mode()
def check_batch_invariance(
    decoder_for: Callable[[RowRules], TargetDecoder],
    attention_for: Callable[[AttentionRules], ExactAttention],
    head: Head,
    stream: BlockStream,
    kv: KVCache,
    *,
    most_nodes: int,
    prefill_rows: int,
) -> SelfCheck:
    """Find rules under which rows are batch-invariant.

    `decoder_for` and `attention_for` build the target and its attention under given rules; the check of rows does not
    use the decoder's own attention. The empty cache `kv` is work space. Raises ResourceError if a matrix product does
    not compute its whole result.
    """
    counts = row_counts(most_nodes, prefill_rows)
    dtype, device = head.weight.dtype, head.weight.device
    states = _random_states(head.weight.shape[1], max(counts), dtype, device)
    threads = torch.get_num_threads()
    parts = partial(_parts, cache(decoder_for), head, stream, counts, most_nodes, kv)
    rules, failure = _find_rules(list(candidate_rules(device)), parts, states)
    attention, attention_failure = find_attention_rules(attention_for, kv, most_nodes=most_nodes)
    failure = failure or attention_failure
    if failure:
        reason = f"{failure} lets a row's bits depend on its neighbours"
        return SelfCheck("numeric", reason, rules, attention, threads)
    reason = f"rows checked in blocks of {rules.row_block}, attention in rows of {attention.row_multiple}"
    return SelfCheck("exact", reason, rules, attention, threads)


def row_counts(most_nodes: int, prefill_rows: int) -> tuple[int, ...]:
    """The row counts to check: all small ones, then the sizes in use and their neighbours, up to the largest."""
    most = max(most_nodes, prefill_rows)
    sizes = (*ROW_SIZES, *range(2 * ROW_SIZES[-1], most, ROW_SIZES[-1]))
    counts = {*range(1, 18), 31, 33, 65, *sizes, most - 1, most, most_nodes}
    return tuple(sorted(n for n in counts if 1 <= n <= most))


class _Part(NamedTuple):
    """A part of the target that must be batch-invariant."""

    name: str
    run: Callable[[RowRules, Tensor], Tensor]
    """Computes rows under rules."""
    counts: Sequence[int]
    """The row counts that it gets."""


def _find_rules(
    candidates: Sequence[RowRules], parts: Callable[[], Generator[_Part, None, None]], states: Tensor
) -> tuple[RowRules, str]:
    """Return the first rules under which all parts are batch-invariant; else the last, and the part that is not.

    A part that fails is tried under the next rules at once, while its weights are there. Parts that came before it
    are then checked once more, under the rules that were found.
    """
    rules, *others = candidates
    while True:
        is_agreed = True
        with closing(parts()) as found:
            for number, part in enumerate(found):
                while not _rows_keep_bits(partial(part.run, rules), rules, states, part.counts):
                    if not others:
                        return rules, part.name
                    rules, *others = others
                    is_agreed = is_agreed and number == 0
        if is_agreed:
            return rules, ""


def _parts(
    decoder_for: Callable[[RowRules], TargetDecoder],
    head: Head,
    stream: BlockStream,
    counts: Sequence[int],
    most_nodes: int,
    kv: KVCache,
) -> Generator[_Part, None, None]:
    """Yield the blocks of the first layer of each kind as they are streamed, and the head."""
    any_decoder = decoder_for(next(iter(candidate_rules(head.weight.device))))
    kinds = any_decoder.math.geometry.representatives
    with closing(stream.blocks()) as blocks:
        for block in islice(blocks, (max(kinds) + 1) * len(LAYER_BLOCKS)):
            # Layers differ in what mixes their tokens; the feed-forward of the first stands for all.
            if block.layer not in kinds or (block.layer and block.kind != "attention"):
                continue
            if block.kind == "attention" and not block.layer:
                _check_product(block.matrices[any_decoder.output_name(block.layer)])
            name = (
                f"the {block.kind} block of layer {block.layer}" if block.layer else f"the {block.kind} block"
            )
            yield _Part(name, partial(_run_under, decoder_for, block, kv), counts)
    # Prefill needs the logits of the last row only, so the head never gets a whole chunk.
    few = [count for count in counts if count <= most_nodes]
    yield _Part("the head", lambda rules, rows: head.logits(rows, rules), few)


def _check_product(weight: Tensor) -> None:
    """Compare a product with float64; raise ResourceError if part of the result was not computed."""
    rows = _random_states(weight.shape[1], _PRODUCT_ROWS, weight.dtype, weight.device)[:_PRODUCT_ROWS]
    # What a kernel leaves unwritten holds what the memory held before: NaN, so that it shows.
    torch.full((_PRODUCT_ROWS, weight.shape[0]), torch.nan, dtype=weight.dtype, device=weight.device)
    found, wide, wrong = torch.nn.functional.linear(rows, weight), rows.double(), 0
    # A few features at a time: a whole matrix in float64 would take more than the plan has for a pass.
    for results, part in zip(found.split(_PRODUCT_FEATURES, 1), weight.split(_PRODUCT_FEATURES), strict=True):
        matrix = part.double()
        error = (results.double() - wide @ matrix.T).abs()
        scale = (wide.abs() @ matrix.abs_().T).clamp_min(1e-300)
        wrong += int((~(error / scale <= _PRODUCT_TOLERANCE)).sum())
    if wrong:
        raise _unwritten(wrong, found.numel())


def check_products() -> None:
    """Check in some microseconds that products on the CPU still write their whole result.

    OpenMP may begin to grant fewer threads while a session is open. Raises ResourceError if it does.
    """
    rows = torch.ones((_PRODUCT_ROWS, _PRODUCT_FEATURES), dtype=torch.bfloat16)
    weight = torch.ones((_PRODUCT_FEATURES, _PRODUCT_FEATURES), dtype=torch.bfloat16)
    torch.full((_PRODUCT_ROWS, _PRODUCT_FEATURES), torch.nan, dtype=torch.bfloat16)
    found = torch.nn.functional.linear(rows, weight)
    if wrong := int((found != _PRODUCT_FEATURES).sum()):
        raise _unwritten(wrong, found.numel())


def _unwritten(wrong: int, results: int) -> ResourceError:
    return ResourceError(
        f"matrix products are wrong on this machine: {wrong} of {results} results; OpenMP grants fewer "
        f"threads than the {torch.get_num_threads()} that PyTorch asks for",
        "OMP_DYNAMIC=false OMP_NUM_THREADS=1 subspec ..., or raise OMP_THREAD_LIMIT",
    )


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


def _run_under(
    decoder_for: Callable[[RowRules], TargetDecoder], block: Block, kv: KVCache, rules: RowRules, rows: Tensor
) -> Tensor:
    return _run_block(decoder_for(rules), block, kv, rows)


def _run_block(decoder: TargetDecoder, block: Block, kv: KVCache, rows: Tensor) -> Tensor:
    """Run one block on `[P, hidden]` rows, each at position 0; queries stand for what attention returns."""
    group = RowGroup(torch.zeros(len(rows), dtype=torch.long), torch.zeros(len(rows), dtype=torch.long), 0)
    # A small residual, since adding a large one would hide how the rest was rounded; norms rescale it.
    flow = decoder.begin_rows(rows / 256, [SequenceRows(group, kv)])
    flow.normed = rows
    flow.inner = _widened(rows, decoder.math.geometry.feed_forward)
    if block.kind == "attention" and block.layer in decoder.math.delta_layers:
        return _run_delta(decoder, block, flow)
    if block.kind == "attention":
        return _run_projections(decoder, block, flow)
    decoder.run_feed_forward(block, flow)
    return flow.hidden if block.kind == "down" else flow.inner


def _run_projections(decoder: TargetDecoder, block: Block, flow: BatchFlow) -> Tensor:
    heads = decoder.project_heads(block, flow)
    decoder.finish_attention(block, flow, heads.gated(heads.query.flatten(1)))
    return torch.cat(
        (flow.hidden, heads.keys.transpose(0, 1).flatten(1), heads.values.transpose(0, 1).flatten(1)), 1
    )


def _run_delta(decoder: TargetDecoder, block: Block, flow: BatchFlow) -> Tensor:
    """Run all of a recurrent layer but the rule, which takes row after row: values stand for what it returns."""
    delta, inputs = decoder.math.delta_layers[block.layer], decoder.project_delta(block, flow)
    before = delta.shape.kernel - 1
    known = torch.cat((inputs.qkv.new_zeros((before, delta.shape.conv_width)), inputs.qkv))
    own = torch.arange(len(inputs.qkv), device=known.device)[:, None] + before
    seen = torch.cat((torch.arange(before, device=known.device).expand(len(own), -1), own), 1)
    rows = delta.rows(delta.mixed(known, seen), inputs.gates)
    decoder.finish_attention(block, flow, delta.gated(rows.value, inputs.gate))
    found = (rows.query, rows.key, rows.decay, rows.beta)
    return torch.cat((flow.hidden, *(part.flatten(1).to(flow.hidden.dtype) for part in found)), 1)


def _random_states(hidden: int, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    padded = -(-rows // max(ROW_BLOCKS)) * max(ROW_BLOCKS)
    return torch.randn((padded, hidden), generator=generator).to(device, dtype)


def _widened(rows: Tensor, width: int) -> Tensor:
    """A copy of the rows, repeated along their width to `width` columns."""
    return rows.repeat(1, -(-width // rows.shape[1]))[:, :width].contiguous()
