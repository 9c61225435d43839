"""Attention of the target: near the written-out sum, and the same bits in every company."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, attention_of, random_case, random_tree_in, sizes_of
from tiny_models import CPU
from torch import Tensor

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.layer_description import AttentionShape
from subspec_cli.modeling import exact_attention
from subspec_cli.modeling.attention_check import find_attention_rules
from subspec_cli.modeling.block_kernels import KernelName
from subspec_cli.modeling.exact_attention import AttentionRules, ChainRows, ExactAttention
from subspec_cli.modeling.kv_cache import KVCache

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-18}
KERNELS: list[KernelName] = ["fused", "products"]


def shape_with(attention: ExactAttention, window: int | None) -> AttentionShape:
    return next(shape for shape in attention.checked if shape.window == window)


def chain(attention: ExactAttention, case: Case, first: int, end: int, window: int | None) -> Tensor:
    shape = shape_with(attention, window)
    return attention.attend(case.query[first:end], case.keys, case.values, ChainRows(first), shape)


def tree(
    attention: ExactAttention, case: Case, committed: int, nodes: int, depth: int, window: int | None
) -> Tensor:
    """The rows of the path, root first."""
    placed = random_tree_in(case, committed, nodes, depth, seed=nodes)
    rows = attention.tree_rows(placed.depths + committed, placed.path, committed)
    inner = placed.case
    shape = shape_with(attention, window)
    return attention.attend(inner.query, inner.keys, inner.values, rows, shape)[placed.on_path]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [None, 1, 40, 700])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_near_the_sum_in_float64(dtype: torch.dtype, window: int | None, kernel: KernelName) -> None:
    sizes = sizes_of(heads=6, kv_heads=2, windows=(window,))
    case, attention = random_case(sizes, 1300, dtype), attention_of(sizes, dtype, AttentionRules(kernel, 4))
    found = chain(attention, case, 0, 1300, window)
    for position in (0, 1, 39, 40, 63, 64, 200, 575, 576, 700, 1087, 1088, 1299):
        error = (found[position].double() - case.plain(position, window)).abs().max()
        assert float(error) <= TOLERANCE[dtype], f"row at {position}"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [None, 1, 30, 64, 100, 600, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_tree_have_the_bits_of_the_chain(
    dtype: torch.dtype, window: int | None, kernel: KernelName
) -> None:
    """Siblings, other cache rows, blocks that begin inside the tree: nothing of it shows."""
    sizes = sizes_of(windows=(window,))
    case, attention = (
        random_case(sizes, 1200, dtype, seed=1),
        attention_of(sizes, dtype, AttentionRules(kernel, 4)),
    )
    whole = chain(attention, case, 0, 1200, window)
    for committed in (0, 1, 50, 63, 64, 65, 127, 500, 540, 575, 576, 1060, 1088):
        for nodes, depth in ((1, 1), (2, 2), (7, 4), (40, 30)):
            found = tree(attention, case, committed, nodes, depth, window)
            assert torch.equal(found, whole[committed : committed + depth]), (
                f"{nodes} nodes after {committed}"
            )


def rules_here(sizes: ModelGeometry) -> AttentionRules:
    """The rules that the self-check finds here: some kernels feel their company where a head is no whole tile."""
    kv = KVCache(sizes.mixers, context=1900, scratch=64, dtype=torch.bfloat16, device=CPU)
    rules, failure = find_attention_rules(lambda found: attention_of(sizes, rules=found), kv, most_nodes=64)
    assert not failure
    return rules


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(4, 4, 16), (3, 1, 8), (7, 1, 64), (9, 3, 64), (4, 2, 80)]
)
def test_any_heads_give_the_same_bits_in_chains_and_trees(heads: int, kv_heads: int, dim: int) -> None:
    sizes = sizes_of(heads, kv_heads, dim)
    case, attention = random_case(sizes, 700, seed=2), attention_of(sizes, rules=rules_here(sizes))
    whole = chain(attention, case, 0, 700, None)
    assert torch.equal(chain(attention, case, 513, 514, None)[0], whole[513])
    assert torch.equal(tree(attention, case, 560, 21, 18, None), whole[560:578])


@pytest.mark.parametrize("window", [None, 90, 640])
def test_pieces_of_a_chain_have_the_bits_of_the_whole(window: int | None) -> None:
    sizes = sizes_of(windows=(window,))
    case, attention = random_case(sizes, 1200, seed=3), attention_of(sizes)
    whole = chain(attention, case, 0, 1200, window)
    for first, end in (
        (0, 1),
        (5, 9),
        (60, 70),
        (63, 130),
        (400, 577),
        (574, 580),
        (1000, 1200),
        (1199, 1200),
    ):
        assert torch.equal(chain(attention, case, first, end, window), whole[first:end]), f"[{first}, {end})"


@pytest.mark.parametrize("work_bytes", [1, 40_000, 200_000])
def test_the_bound_on_work_space_changes_no_bit(monkeypatch: pytest.MonkeyPatch, work_bytes: int) -> None:
    """Trap 5: temporaries are bounded by tiles over the rows."""
    sizes = sizes_of(windows=(None, 700))
    case, attention = random_case(sizes, 1200, seed=4), attention_of(sizes)
    for window in (None, 700):
        whole = chain(attention, case, 1000, 1200, window)
        node_rows = tree(attention, case, 1070, 33, 25, window)
        with monkeypatch.context() as patch:
            patch.setattr(exact_attention, "ATTENTION_WORK_BYTES", work_bytes)
            assert torch.equal(chain(attention, case, 1000, 1200, window), whole)
            assert torch.equal(tree(attention, case, 1070, 33, 25, window), node_rows)


def test_the_results_of_a_kernel_call_stay_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, bound, calls = sizes_of(), 1 << 18, []
    attention = attention_of(sizes)
    original = attention._kernel

    def watched(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(original(*arguments))
        return calls[-1]

    attention._kernel = watched
    monkeypatch.setattr(exact_attention, "ATTENTION_WORK_BYTES", bound)
    chain(attention, random_case(sizes, 4000), 3500, 4000, None)
    assert len(calls) > 10
    assert all(output.nbytes <= bound for output, _ in calls)


def test_unused_rows_of_the_cache_do_not_show() -> None:
    sizes = sizes_of()
    case, attention = random_case(sizes, 300, seed=5), attention_of(sizes)
    found = chain(attention, case, 200, 240, None)
    for cached in (case.keys, case.values):
        cached[:, 240:] = 1e4
    assert torch.equal(chain(attention, case, 200, 240, None), found)


def test_arguments_are_left_as_they_are() -> None:
    sizes = sizes_of()
    case, attention = random_case(sizes, 300, seed=6), attention_of(sizes)
    before = [tensor.clone() for tensor in (case.query, case.keys, case.values)]
    chain(attention, case, 100, 300, None)
    tree(attention, case, 100, 9, 5, None)
    for left, right in zip((case.query, case.keys, case.values), before, strict=True):
        assert torch.equal(left, right)
