"""The check of attention: real kernels pass under few rules, and each planted fault is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from attention_cases import attention_of, sizes_of
from tiny_models import CPU
from torch import Tensor

from subspec_cli.checkpoint.layer_description import Arithmetic
from subspec_cli.modeling import exact_attention, key_blocks
from subspec_cli.modeling.attention_check import find_attention_rules
from subspec_cli.modeling.block_kernels import BlockKernel, fused_cpu_kernel, products_kernel
from subspec_cli.modeling.exact_attention import AttentionRules, ExactAttention
from subspec_cli.modeling.key_blocks import TreeSpan, tree_spans
from subspec_cli.modeling.kv_cache import KVCache

WINDOWS = (None, 100, 700)
SCALE = 16**-0.5


def cache(context: int = 1400, dtype: torch.dtype = torch.bfloat16, scratch: int = 64) -> KVCache:
    attention = sizes_of(windows=WINDOWS).attention
    return KVCache(attention, context=context, scratch=scratch, dtype=dtype, device=CPU)


def check(
    kernel: BlockKernel | None = None,
    *,
    kv: KVCache | None = None,
    dtype: torch.dtype = torch.bfloat16,
    windows: Sequence[int | None] = WINDOWS,
) -> tuple[AttentionRules, str]:
    sizes = sizes_of(windows=tuple(windows))

    def made(rules: AttentionRules) -> ExactAttention:
        return attention_of(sizes, dtype, rules, kernel)

    return find_attention_rules(made, kv or cache(dtype=dtype), most_nodes=64)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
def test_the_library_s_kernel_passes(dtype: torch.dtype) -> None:
    rules, failure = check(dtype=dtype)
    assert not failure
    assert rules.kernel == "fused"


@pytest.mark.parametrize("context", [1, 60, 500, 900])
def test_a_short_cache_is_checked_too(context: int) -> None:
    assert check(kv=cache(context)) == (AttentionRules("fused", 4), "")


def test_the_cache_is_zero_again() -> None:
    kv = cache()
    check(kv=kv)
    assert not any(memory.any() for memory in kv.read(0, kv.rows))


def test_the_smallest_multiple_of_rows_that_holds_is_taken() -> None:
    def wants_eights(
        query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        output, log_sum = fused_cpu_kernel(query, keys, values, mask, scale=SCALE)
        return output * (1.02 if query.shape[2] % 8 else 1), log_sum

    assert check(wants_eights) == (AttentionRules("fused", 8), "")


def spoiled(change: Callable[[Tensor, Tensor], Tensor]) -> BlockKernel:
    """A kernel whose outputs `change` spoils, given its query."""

    def kernel(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        output, log_sum = fused_cpu_kernel(query, keys, values, mask, scale=SCALE)
        return change(output, query), log_sum

    return kernel


KERNEL_FAULTS: dict[str, BlockKernel] = {
    "by the number of rows": spoiled(lambda output, query: output * (1 + query.shape[2] / 2**9)),
    "by the batch": spoiled(lambda output, query: output * (1 + len(query) / 2**9)),
    "by place": spoiled(lambda output, query: torch.cat((output[:, :8], output[:, 8:] * 1.02), 1)),
    "by the last row": spoiled(lambda output, query: torch.cat((output[:, :-1], output[:, -1:] * 1.02), 1)),
    "by neighbours": spoiled(lambda output, query: output + output.abs().amax(1, keepdim=True) / 64),
    "rarely": spoiled(
        lambda output, query: torch.where(
            (output[..., :1] > 0.6) & (query.shape[2] > 200), output * 1.02, output
        )
    ),
    "not finite": spoiled(lambda output, query: output * torch.nan),
}


@pytest.mark.parametrize("fault", KERNEL_FAULTS)
def test_a_kernel_that_feels_its_company_is_found(fault: str) -> None:
    assert check(KERNEL_FAULTS[fault])[1] == "attention over the cache"


def test_a_log_sum_that_feels_its_company_is_found() -> None:
    def kernel(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        output, log_sum = fused_cpu_kernel(query, keys, values, mask, scale=SCALE)
        return output, log_sum + (1e-3 if query.shape[2] > 100 else 0)

    assert check(kernel)[1]


def test_products_are_the_second_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused kernel that fails is replaced, and the run stays exact if the products hold."""

    def failing(name: str, arithmetic: Arithmetic, device: torch.device) -> BlockKernel:
        faulty = KERNEL_FAULTS["by the number of rows"]
        return partial(products_kernel, scale=arithmetic.attention_scale) if name == "products" else faulty

    monkeypatch.setattr(exact_attention, "block_kernel", failing)
    rules, failure = check()
    assert not failure
    assert rules.kernel == "products"


def plant_tree_spans(monkeypatch: pytest.MonkeyPatch, change: Callable[[TreeSpan, int], TreeSpan]) -> None:
    def planted(positions: Tensor, path: Tensor, committed: int) -> tuple[TreeSpan, ...]:
        return tuple(change(span, committed) for span in tree_spans(positions, path, committed))

    monkeypatch.setattr(exact_attention, "tree_spans", planted)


def test_blocks_in_the_order_of_slots_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tree mask over the cache gives: the right keys, in the order in which they lie there."""

    def by_slot(span: TreeSpan, committed: int) -> TreeSpan:
        slots, masks = span.slots.clone(), span.positions
        first = span.gathered.start * key_blocks.SMALL_BLOCK
        for row, position in enumerate(masks.tolist()):
            own = slots[row, committed - first : position + 1 - first]
            slots[row, committed - first : position + 1 - first] = own.flip(0)
        return replace(span, slots=slots)

    plant_tree_spans(monkeypatch, by_slot)
    assert check()[1]


@pytest.mark.slow
def test_a_border_that_moves_with_the_tree_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large blocks as far as the cache is committed, in place of a border by position."""
    monkeypatch.setattr(exact_attention, "tree_spans", moved_border)
    assert check()[1]


def moved_border(positions: Tensor, path: Tensor, committed: int) -> tuple[TreeSpan, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_blocks, "GUARD", 0)
        return tree_spans(positions, path, committed)


def test_a_tree_that_misses_a_key_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(span: TreeSpan, committed: int) -> TreeSpan:
        return replace(span, slots=span.slots.clamp_max(max(0, committed - 1)))

    plant_tree_spans(monkeypatch, late)
    assert check()[1]
