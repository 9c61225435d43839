"""The self-check: exact where rows keep their bits, and the name of the part where something is planted."""

import itertools

import pytest
import torch
from tiny_models import CPU, FAMILIES, Tiny, make_tiny_model

from subspec_cli.errors import ResourceError
from subspec_cli.modeling import self_check as self_check_module
from subspec_cli.modeling.block_kernels import fused_cpu_kernel
from subspec_cli.modeling.decoder import Head, TargetDecoder
from subspec_cli.modeling.row_rules import RowRules, likely_rules
from subspec_cli.modeling.self_check import (
    candidate_rules,
    check_batch_invariance,
    check_products,
    row_counts,
)

NODES, PREFILL = 64, 128


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return Tiny(make_tiny_model(tmp_path_factory.mktemp("qwen"), "qwen2", layers=1))


def self_check(tiny, *, kernel=None, nodes=NODES, prefill=PREFILL):
    source = tiny.source()
    return check_batch_invariance(
        lambda rules: tiny.target(source, rules),
        lambda rules: tiny.attention(rules, kernel),
        tiny.head,
        source,
        tiny.kv(),
        most_nodes=nodes,
        prefill_rows=prefill,
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_of_any_type_is_exact(tmp_path, family, dtype):
    found = self_check(Tiny(make_tiny_model(tmp_path, family, dtype=dtype, layers=1, tied=False)))
    assert (found.exactness, found.threads) == ("exact", 1)
    assert str(found.rules.row_block) in found.reason


def planted(kind, change, monkeypatch):
    """Let `change` spoil the rows that the blocks of one kind give."""
    name = "finish_attention" if kind == "attention" else "run_feed_forward"
    place = "hidden" if kind in ("attention", "down") else "inner"
    original = getattr(TargetDecoder, name)

    def run(self, block, flow, *attended):
        original(self, block, flow, *attended)
        if block.kind == kind:
            setattr(flow, place, change(getattr(flow, place)))

    monkeypatch.setattr(TargetDecoder, name, run)


def by_count(rows):
    """A kernel whose rounding depends on how many rows there are."""
    return rows * (1 + len(rows) / 2**9)


def by_one_count(rows):
    """A kernel that is chosen for one of the sizes in use only, whatever the row block."""
    return rows * 1.02 if len(rows) == 128 else rows


def by_place(rows):
    """A kernel that treats the rows past the eighth in another loop."""
    return torch.cat((rows[:8], rows[8:] * 1.02))


def by_last_place(rows):
    """The scalar tail of a vector loop."""
    return torch.cat((rows[:-1], rows[-1:] * 1.02))


def by_parity(rows):
    """A kernel that takes rows in pairs and rounds the second otherwise."""
    return torch.where(torch.arange(len(rows))[:, None] % 2 == 1, rows * 1.02, rows)


def by_neighbours(rows):
    """A row that feels what its neighbours hold."""
    return rows + rows.abs().amax(0) / 64


PLANTED = [
    *itertools.product(["attention", "gate", "up", "down"], [by_count, by_place]),
    ("attention", by_neighbours),
    ("gate", by_one_count),
    ("up", by_last_place),
    ("down", by_parity),
]


@pytest.mark.parametrize(("kind", "change"), PLANTED)
def test_a_row_dependent_block_is_named(qwen, monkeypatch, kind, change):
    planted(kind, change, monkeypatch)
    found = self_check(qwen)
    assert found.exactness == "numeric"
    assert f"the {kind} block" in found.reason


@pytest.mark.parametrize("size", [2, 8, 48])
def test_a_rounding_that_shows_in_few_rows_is_found(qwen, monkeypatch, size):
    """Kernels that differ were seen to differ in one result of thousands: a handful of rows would not tell."""

    def rarely(rows):
        odd = (rows[:, :1] > 1.5 * rows[:, :1].std()) & (len(rows) == size)
        return torch.where(odd, rows * 1.02, rows)

    planted("gate", rarely, monkeypatch)
    found = self_check(qwen)
    assert found.exactness == "numeric" or size % found.rules.row_block


def test_a_real_kernel_that_rounds_a_lone_row_otherwise_is_found(tmp_path, monkeypatch):
    """The inverse, with nothing planted: without padding, single rows go to another kernel on many machines."""
    tiny = Tiny(make_tiny_model(tmp_path, "llama", hidden=256, intermediate_size=2816, layers=1))
    weight = tiny.weights["model.layers.0.mlp.down_proj.weight"]
    rows = torch.randn((256, 2816), generator=torch.Generator().manual_seed(1)).bfloat16()
    together, linear = torch.nn.functional.linear(rows, weight), torch.nn.functional.linear
    if all(linear(row[None], weight)[0].equal(right) for row, right in zip(rows, together, strict=True)):
        pytest.skip("a lone row rounds like many on this machine")
    monkeypatch.setattr(RowRules, "padded", lambda self, rows: rows)
    monkeypatch.setattr("subspec_cli.modeling.self_check.candidate_rules", lambda device: [RowRules(2)])
    assert self_check(tiny, prefill=256).exactness == "numeric"


def test_a_row_dependent_linear_is_found(qwen, monkeypatch):
    original = RowRules.linear
    monkeypatch.setattr(
        RowRules, "linear", lambda self, rows, weight, bias: by_count(original(self, rows, weight, bias))
    )
    found = self_check(qwen)
    assert found.exactness == "numeric"
    assert "the attention block" in found.reason


@pytest.mark.parametrize("change", [by_count, by_place])
def test_a_row_dependent_head_is_named(qwen, monkeypatch, change):
    original = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, rows, rules: change(original(self, rows, rules)))
    found = self_check(qwen, nodes=129)
    assert found.exactness == "numeric"
    assert "the head" in found.reason


def test_the_head_is_checked_up_to_the_largest_tree(qwen, monkeypatch):
    """Trap 13: a fixed shape may ask for the logits of far more than 64 nodes."""
    original = Head.logits

    def large_only(self, rows, rules):
        return original(self, rows, rules) * (1.02 if len(rows) > 100 else 1)

    monkeypatch.setattr(Head, "logits", large_only)
    assert self_check(qwen, nodes=64).exactness == "exact"
    found = self_check(qwen, nodes=129)
    assert found.exactness == "numeric"
    assert "the head" in found.reason


def test_attention_that_feels_its_company_is_named(qwen):
    """The library's kernel without padding: what other programs run, and call lossless."""

    def counting(query, keys, values, mask):
        output, log_sum = fused_cpu_kernel(query, keys, values, mask, scale=query.shape[-1] ** -0.5)
        return output * (1 + query.shape[2] / 2**9), log_sum

    found = self_check(qwen, kernel=counting)
    assert found.exactness == "numeric"
    assert "attention over the cache" in found.reason


def test_products_that_leave_results_unwritten_are_refused(qwen, monkeypatch):
    """Where OpenMP grants fewer threads than PyTorch asks for, the other threads' share keeps what memory held."""
    original = torch.nn.functional.linear

    def half(rows, weight, bias=None):
        found = original(rows, weight, bias)
        found[:, : found.shape[1] // 2] = torch.nan if len(rows) == 8 else 0.25
        return found

    monkeypatch.setattr(torch.nn.functional, "linear", half)
    with pytest.raises(ResourceError, match=r"512 of 1024 results.*OpenMP"):
        self_check(qwen)


def test_a_shortage_of_threads_that_begins_later_is_found(monkeypatch):
    check_products()
    original = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda rows, weight: original(rows, weight) * 0.25)
    with pytest.raises(ResourceError, match=r"2048 of 2048 results.*OpenMP"):
        check_products()


def test_the_smallest_row_block_that_holds_is_taken(qwen, monkeypatch):
    original = RowRules.linear

    def wants_eights(self, rows, weight, bias):
        return original(self, rows, weight, bias) * (1.02 if len(rows) % 8 else 1)

    monkeypatch.setattr(RowRules, "linear", wants_eights)
    found = self_check(qwen)
    assert found.exactness == "exact"
    assert found.rules.row_block == 8


def test_calls_of_one_size_are_taken_where_every_row_count_rounds_otherwise(qwen, monkeypatch):
    """As AMX tiles do. What held before such a part is then checked in such calls too."""
    tried = []

    def feels_the_count(rows, weight, bias=None):
        result = original(rows, weight, bias)
        return result * (1 + len(rows) / 64) if weight.shape[1] > weight.shape[0] else result

    original = torch.nn.functional.linear
    keeps = self_check_module._rows_keep_bits
    monkeypatch.setattr(self_check_module, "_check_product", lambda weight: None)
    monkeypatch.setattr(torch.nn.functional, "linear", feels_the_count)
    monkeypatch.setattr(
        self_check_module,
        "_rows_keep_bits",
        lambda run, rules, states, counts: tried.append(rules) or keeps(run, rules, states, counts),
    )
    found = self_check(qwen)
    assert (found.exactness, found.rules) == ("exact", RowRules(32, fixed_rows=True))
    assert tried[-5:] == [found.rules] * 5, "attention, gate, up, down, head"


@pytest.mark.parametrize("feels", [False, True])
def test_the_likely_rules_are_those_of_the_products(monkeypatch, feels):
    def product(rows, weight):
        return torch.ones(len(rows), len(weight)) * (len(rows) if feels else 1)

    monkeypatch.setattr(torch.nn.functional, "linear", product)
    found = likely_rules([(64, 32), (32, 64)], torch.bfloat16, CPU)
    assert found == (RowRules(32, fixed_rows=True) if feels else RowRules(2))
    assert likely_rules([], torch.bfloat16, torch.device("cuda")) == next(
        candidate_rules(torch.device("cuda"))
    )


def test_elementwise_tiles_are_taken_where_whole_rows_do_not_hold(qwen, monkeypatch):
    original = RowRules.gated

    def only_tiles_hold(self, activation, gate, up):
        given = original(self, activation, gate, up)
        return given if self.tile_elementwise else by_last_place(given)

    monkeypatch.setattr(RowRules, "gated", only_tiles_hold)
    found = self_check(qwen)
    assert found.exactness == "exact"
    assert found.rules.tile_elementwise


@pytest.mark.parametrize(
    ("nodes", "prefill"), [(64, 256), (2, 256), (65, 256), (129, 256), (513, 256), (513, 64)]
)
def test_every_row_size_in_use_is_checked(nodes, prefill):
    """Trap 13: whatever number of rows a tree or a prompt has, a checked count is padded to the same size."""
    counts = row_counts(nodes, prefill)
    assert counts == tuple(sorted(set(counts)))
    assert max(counts) == max(nodes, prefill)
    for rules in candidate_rules(CPU):
        used = {rules.padded(rows) for rows in range(1, max(nodes, prefill) + 1)}
        assert used == {rules.padded(count) for count in counts}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_are_padded_to_whole_blocks(device):
    rules_tried = list(candidate_rules(torch.device(device)))
    assert rules_tried
    for rules, rows in itertools.product(rules_tried, range(1, 300)):
        padded = rules.padded(rows)
        assert padded >= rows
        assert padded % rules.row_block == 0
    order = [(rules.fixed_rows, rules.row_block, rules.tile_elementwise) for rules in rules_tried]
    assert order == sorted(order), "cheapest first"


@pytest.mark.parametrize("width", [64, 256, 4096, 11008])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tiled_elementwise_equals_untiled(width, dtype):
    generator = torch.Generator().manual_seed(width)
    gate, up = (torch.randn((48, width), generator=generator).to(dtype) for _ in range(2))
    given = [RowRules(8, tile_elementwise=tiled).gated("silu", gate.clone(), up) for tiled in (False, True)]
    assert given[0].equal(given[1])
    wide = torch.nn.functional.silu(gate.double()) * up.double()
    assert torch.allclose(given[1].double(), wide, rtol=2e-2, atol=1e-3)


def test_fixed_rows_run_in_calls_of_one_size(monkeypatch):
    sizes, original = [], torch.nn.functional.linear

    def watched(rows, weight, bias=None):
        sizes.append(len(rows))
        return original(rows, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    rules, weight = RowRules(16, fixed_rows=True), torch.randn(24, 32)
    rows = torch.randn(rules.padded(40), 32)
    assert rules.linear(rows, weight, None).equal(
        torch.cat([original(part, weight) for part in rows.split(16)])
    )
    assert set(sizes) == {16}
