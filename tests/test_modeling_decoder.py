"""The decoders against the library's own models, and the promise that a row's bits depend on nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import tiny_models
import torch
from fakes import as_batch
from tiny_models import VOCAB, Tiny
from torch import Tensor

from subspec_cli.decoding.row_groups import tree_group
from subspec_cli.decoding.tree import TokenTree
from subspec_cli.modeling.block_kernels import fused_cpu_kernel
from subspec_cli.modeling.decoder import DraftDecoder, TargetDecoder
from subspec_cli.modeling.draft_rows import DraftRows
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.row_group import chunk_group
from subspec_cli.modeling.row_rules import RowRules, serial
from subspec_cli.modeling.substitute import resident_layer
from subspec_cli.modeling.target_blocks import TargetBlocks
from subspec_cli.modeling.target_flow import SequenceRows
from subspec_cli.modeling.token_batch import TokenBatch

MakeTiny = Callable[..., Tiny]

WINDOWED = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama with biases": {"family": "llama", "attention_bias": True, "mlp_bias": True, "tied": False},
    "mistral": {"family": "mistral", "tied": False},
    "mistral windowed": {"family": "mistral", "sliding_window": 6},
    "qwen2": {"family": "qwen2"},
    "qwen2 windowed": {"family": "qwen2", "tied": False, **WINDOWED},
    "qwen3": {"family": "qwen3", "head_dim": 48},
    "qwen3 with biases and windows": {"family": "qwen3", "attention_bias": True, **WINDOWED},
    "llama yarn": {"family": "llama", "rope_parameters": YARN},
}
FLOAT32_ATOL = 1e-4
"""Logits here reach 10; float32 sums in another order differ by some 1e-5."""
PROMPT = [(7 * n + n // 5) % VOCAB for n in range(100)]


def path_to(tree: TokenTree, node: int) -> list[int]:
    """Nodes from the root to `node`, both included."""
    return [] if node < 0 else [*path_to(tree, tree.parents[node]), node]


@pytest.fixture(params=MODELS)
def float_model(request: pytest.FixtureRequest, tiny: MakeTiny) -> Tiny:
    """In float32, where a wrong formula shows far above the rounding."""
    return tiny(dtype=torch.float32, **MODELS[request.param])


@pytest.fixture(params=[*MODELS, "llama float16"])
def model(request: pytest.FixtureRequest, tiny: MakeTiny) -> Tiny:
    """In 16 bits, where rows promise to keep their bits."""
    if request.param == "llama float16":
        return tiny("llama", dtype=torch.float16)
    return tiny(**MODELS[request.param])


def library_logits(model: Tiny, token_ids: Sequence[int]) -> Tensor:
    """`[T, V]` of the library's model in one plain forward."""
    with torch.no_grad():
        return model.reference()(torch.tensor([token_ids])).logits[0]


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=FLOAT32_ATOL, rtol=0)


def random_tree(seed: int, widths: Sequence[int]) -> TokenTree:
    """A tree with so many nodes at each depth, hung at random on the level above."""
    chance = random.Random(seed)
    tokens, parents, depths = [chance.randrange(VOCAB)], [-1], [0]
    for depth, width in enumerate(widths, start=1):
        above = [node for node, at in enumerate(depths) if at == depth - 1]
        chosen = sorted(chance.choice(above) for _ in range(width))
        parents += chosen
        tokens += [chance.randrange(VOCAB) for _ in range(width)]
        depths += [depth] * width
    return TokenTree(tuple(tokens), tuple(parents), tuple(depths), (0.0,) * len(tokens))


def tree_logits(decoder: TargetDecoder, kv: KVCache, tree: TokenTree) -> Tensor:
    """`[N, V]` of one pass over the whole tree."""
    return decoder.forward(tree_group(tree, kv.committed), kv)


def sequential_logits(decoder: TargetDecoder, kv: KVCache, tree: TokenTree) -> Tensor:
    """`[N, V]` of plain decoding: every node alone, its path committed before it."""
    rows: dict[int, Tensor] = {}

    def decode(node: int) -> None:
        committed = kv.committed
        alone = TokenTree((tree.token_ids[node],), (-1,), (0,), (0.0,))
        rows[node] = tree_logits(decoder, kv, alone)[0]
        kv.commit([0], [tree.token_ids[node]])
        for child in tree.children()[node].values():
            decode(child)
        kv.rewind(committed)

    decode(0)
    assert len(rows) == len(tree), "two siblings share a token: choose another seed"
    return torch.stack([rows[node] for node in range(len(tree))])


def prefilled(model: Tiny, decoder: TargetDecoder, prompt: list[int], chunk: int = 64) -> KVCache:
    kv = model.kv()
    decoder.begin_answer(kv, len(prompt))
    if prompt:
        model.prefill(decoder, kv, prompt, chunk)
    return kv


# --- the library as the oracle -------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 17, 100])
def test_logits_are_those_of_the_library(float_model: Tiny, length: int) -> None:
    decoder = float_model.target()
    found = float_model.prefill(decoder, float_model.kv(), PROMPT[:length], chunk=128)
    assert_close(found, library_logits(float_model, PROMPT[:length]))


def test_chunked_prefill_and_decoding_are_those_of_the_library(float_model: Tiny) -> None:
    """Trap 11 too: chunks and single tokens shorter than the window see back over what is cached."""
    decoder, kv = float_model.target(), float_model.kv()
    found = [float_model.prefill(decoder, kv, PROMPT[:40], chunk=16)]
    found += [float_model.prefill(decoder, kv, [token], chunk=1) for token in PROMPT[40:50]]
    assert_close(torch.cat(found), library_logits(float_model, PROMPT[:50]))


def test_every_path_of_a_tree_is_what_the_library_computes_for_it_alone(float_model: Tiny) -> None:
    """Deeper than the window of 6, and wider: slots of siblings lie between a node and its ancestors."""
    decoder = float_model.target()
    kv = prefilled(float_model, decoder, PROMPT[:20])
    tree = random_tree(3, [3, 5, 4, 3, 2, 2, 1, 2, 1])
    found = tree_logits(decoder, kv, tree)
    leaves = set(range(len(tree))) - set(tree.parents)
    for leaf in leaves:
        path = path_to(tree, leaf)
        text = PROMPT[:20] + [tree.token_ids[node] for node in path]
        assert_close(found[path], library_logits(float_model, text)[20:])


def test_a_draft_of_resident_layers_is_the_same_model(float_model: Tiny) -> None:
    """The fast shell over the target's own matrices: windows, biases and norms as in the exact one."""
    decoder, draft = float_model.target(), resident_draft(float_model, float_model.source())
    tree = random_tree(5, [3, 4, 4, 3, 3, 2, 2, 1])
    kv = prefilled(float_model, decoder, PROMPT[:20])
    exact = tree_logits(decoder, kv, tree)
    fast = draft.forward([DraftRows(unpadded_batch(tree, kv), kv)]).logits
    assert_close(fast, exact)


def unpadded_batch(tree: TokenTree, kv: KVCache) -> TokenBatch:
    """A whole tree as one step of the draft."""
    return as_batch(tree_group(tree, kv.committed))


def resident_draft(model: Tiny, source: TargetBlocks) -> DraftDecoder:
    math = model.math()
    layers = [
        resident_layer(math, layer, source.resident_matrices(layer)) for layer in range(model.geometry.layers)
    ]
    return DraftDecoder(math, model.embed, model.head, layers)


# --- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_tree_rows_have_the_bits_of_plain_decoding(model: Tiny, seed: int) -> None:
    decoder = model.target(rules=model.exact_rules)
    kv = prefilled(model, decoder, PROMPT[: 9 + 20 * seed])
    tree = random_tree(seed + 20, [3, 4, 5, 4, 2, 2, 2, 1, 1][: 9 - 2 * seed])
    together = tree_logits(decoder, kv, tree)
    assert torch.equal(together, sequential_logits(decoder, kv, tree))


def test_a_tree_right_after_one_token_has_the_bits_of_plain_decoding(model: Tiny) -> None:
    """No committed row at all: the root sees only itself."""
    decoder = model.target(rules=model.exact_rules)
    tree = random_tree(31, [4, 4, 2])
    assert torch.equal(tree_logits(decoder, model.kv(), tree), sequential_logits(decoder, model.kv(), tree))


def test_accepted_rows_have_the_bits_of_plain_decoding(model: Tiny) -> None:
    """What a tree pass leaves in the cache for an accepted path, compacted, is what plain decoding leaves."""
    decoder = model.target(rules=model.exact_rules)
    tree = random_tree(41, [3, 4, 3, 2])
    path = path_to(tree, len(tree) - 1)
    tokens = [tree.token_ids[node] for node in path]
    by_tree = prefilled(model, decoder, PROMPT[:11])
    tree_logits(decoder, by_tree, tree)
    by_tree.commit(path, tokens)
    plain = prefilled(model, decoder, PROMPT[:11])
    for token in tokens:
        model.prefill(decoder, plain, [token])
    assert_same_cache(model, by_tree, plain)


def assert_same_cache(model: Tiny, left: KVCache, right: KVCache) -> None:
    assert left.token_ids == right.token_ids
    for layer in range(model.geometry.layers):
        for a, b in zip(left.read(layer, left.committed), right.read(layer, right.committed), strict=True):
            assert torch.equal(a, b), f"layer {layer}"


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_prefill_in_one_chunk_or_several_gives_the_same_bits(model: Tiny, chunk: int) -> None:
    """Trap 9: prefill rows equal decode rows, so a reused chat cache needs no second prefill."""
    decoder = model.target(rules=model.exact_rules)
    whole, parts = model.kv(), model.kv()
    expected = model.prefill(decoder, whole, PROMPT[:40], chunk=64)
    assert torch.equal(model.prefill(decoder, parts, PROMPT[:40], chunk=chunk), expected)
    assert_same_cache(model, whole, parts)


def test_only_the_wanted_rows_reach_the_head(model: Tiny) -> None:
    decoder = model.target(rules=model.exact_rules)
    batch = chunk_group(PROMPT[:13], 0)
    everything = decoder.forward(batch, model.kv())
    for first in (0, 5, 12):
        wanted = decoder.forward(batch, model.kv(), logits_from=first)
        assert torch.equal(wanted, everything[first:])


SPLITS = {
    "all streamed": [],
    "first resident": [0],
    "last resident": [2],
    "every other": [0, 2],
    "middle": [1],
}


@pytest.mark.parametrize("slots", [2, 3, 9])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_placement_never_changes_a_bit(tiny: MakeTiny, family: str, split: str, slots: int) -> None:
    """Trap 14; the model is in shards that cut through layers, so blocks are of several extents."""
    model = tiny(family, sharded=True)
    assert len(model.checkpoint.files) > 2
    resident = model.target(rules=model.exact_rules)
    tree = random_tree(2, [3, 3, 2])
    kv = prefilled(model, resident, PROMPT[:30])
    expected = tree_logits(resident, kv, tree)
    streamed_layers = [layer for layer in range(3) if layer not in SPLITS[split]]
    with closing(model.streamer(streamed_layers, slots)) as streamer:
        split_decoder = model.target(model.source(SPLITS[split], streamer), model.exact_rules)
        split_kv = prefilled(model, split_decoder, PROMPT[:30], chunk=16)
        assert torch.equal(tree_logits(split_decoder, split_kv, tree), expected)
        assert_same_cache(model, split_kv, kv)


# --- padding -------------------------------------------------------------------------------------


class WatchedRules(RowRules):
    """Row rules that see to it that every linear gets whole blocks of finite rows."""

    def linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert len(inputs) % self.row_block == 0
        assert inputs.is_contiguous()
        assert inputs.dim() == 2
        assert inputs.isfinite().all(), "a padding row is not finite"
        return super().linear(inputs, weight, bias)


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_padding_is_finite_and_never_reaches_the_cache(model: Tiny, rows: int) -> None:
    """Trap 4: masked rows of the cache are multiplied by zero, so nothing in it may ever be NaN."""
    decoder = model.target(rules=WatchedRules(16))
    kv = prefilled(model, decoder, PROMPT[:5])
    logits = decoder.forward(chunk_group(PROMPT[:rows], 5), kv)
    assert logits.shape == (rows, VOCAB)
    assert logits.isfinite().all()
    for layer in range(model.geometry.layers):
        keys, values = kv.read(layer, kv.capacity)
        assert keys[:, : 5 + rows].any(dim=2).all(), "a row that was computed is in the cache"
        assert not keys[:, 5 + rows :].any()
        assert not values[:, 5 + rows :].any()


def test_what_the_padding_holds_does_not_show(model: Tiny) -> None:
    decoder = model.target(rules=replace(model.exact_rules, row_block=8))
    batch, padded = chunk_group(PROMPT[:3], 0), []

    def other_ids(rows: Sequence[SequenceRows]) -> Tensor:
        ids = TargetDecoder._padded_ids(decoder, rows)
        ids[3:] = torch.tensor([5, 99, 250, 8, 1])
        padded.append(len(ids))
        return ids

    expected = decoder.forward(batch, model.kv())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "_padded_ids", other_ids)
        assert torch.equal(decoder.forward(batch, model.kv()), expected)
    assert padded == [8]


def test_fixed_rows_run_every_linear_in_blocks_of_one_size() -> None:
    """As on CUDA, where kernels change with the shape."""
    rules = RowRules(4, fixed_rows=True)
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(12, 8, generator=generator), torch.randn(6, 8, generator=generator)
    bias = torch.randn(6, generator=generator)
    sizes: list[int] = []
    linear = torch.nn.functional.linear

    def watched(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        sizes.append(len(rows))
        return linear(rows, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", watched)
        found = rules.linear(inputs, weight, bias)
    assert sizes == [4, 4, 4]
    torch.testing.assert_close(found, inputs @ weight.T + bias)


def test_every_linear_of_the_target_and_its_head_follow_the_row_rules(tiny: MakeTiny) -> None:
    model = tiny("llama", attention_bias=True, mlp_bias=True, tied=False)
    decoder = model.target(rules=RowRules(4, fixed_rows=True))
    batch = chunk_group(PROMPT[:13], 0)
    sizes: list[int] = []
    linear = torch.nn.functional.linear

    def watched(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        sizes.append(len(rows))
        return linear(rows, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", watched)
        decoder.forward(batch, model.kv())
    assert len(sizes) == 4 * (3 * 7 + 1)
    assert set(sizes) == {4}


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_in_a_tree_products_have_all_threads_and_the_small_work_between_them_has_one(tiny: MakeTiny) -> None:
    """Another thread is woken for a product, not for a norm: it may have to wait for a core."""
    model = tiny("llama")
    decoder, kv = model.target(), model.kv()
    threads: dict[str, set[int]] = {"linear": set(), "rsqrt": set(), "silu": set()}
    with pytest.MonkeyPatch.context() as patch:
        for name, found in threads.items():
            place = torch.nn.functional if name in ("linear", "silu") else torch
            function = getattr(place, name)

            def watched(*given: Any, of: Any = function, found: set[int] = found, **named: Any) -> Any:
                found.add(torch.get_num_threads())
                return of(*given, **named)

            patch.setattr(place, name, watched)
        flow = decoder.begin([[SequenceRows(chunk_group(PROMPT[:5], 0), kv)]])
        with closing(decoder.layers(flow)) as layers:
            assert [torch.get_num_threads() for _ in layers] == [2] * decoder.layer_count
    assert threads == {"linear": {2}, "rsqrt": {1}, "silu": {1}}


@pytest.mark.usefixtures("two_threads")
def test_large_work_keeps_all_threads_and_so_does_what_follows_an_error() -> None:
    with serial(1 << 30):
        assert torch.get_num_threads() == 2

    def fail() -> None:
        with serial(1):
            assert torch.get_num_threads() == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("row_block", [2, 4, 8, 16, 32, 64])
def test_padded_sizes_are_few_and_hold_whole_blocks(row_block: int) -> None:
    sizes = [RowRules(row_block).padded(rows) for rows in range(1, 257)]
    assert all(size >= rows and size % row_block == 0 for rows, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 12, "kernels keep code and memory for each size"


@pytest.mark.parametrize("width", [100, 20_000, 40_000])
def test_tiled_silu_keeps_values_and_stays_below_the_grain(width: int) -> None:
    """Trap 3: an elementwise kernel that is split among threads may round a row by its place."""
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(5, width, generator=generator).bfloat16() for _ in range(2))
    sizes: list[tuple[int, int]] = []
    silu = torch.nn.functional.silu

    def watched(rows: Tensor, inplace: bool) -> Tensor:
        sizes.append((len(rows), rows.numel()))
        return silu(rows, inplace=inplace)

    expected = RowRules(2).gated("silu", gate.clone(), up)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "silu", watched)
        found = RowRules(2, tile_elementwise=True).gated("silu", gate.clone(), up)
    torch.testing.assert_close(found, expected)
    assert all(rows == 1 or elements < 32_768 for rows, elements in sizes)
    assert sum(rows for rows, _ in sizes) == 5


# --- shells, errors ------------------------------------------------------------------------------


def test_two_shells_share_parameters_and_do_not_disturb_each_other(model: Tiny) -> None:
    """Trap 7: resident layers serve target and draft; no copy of a matrix, no state that one toggles."""
    source = model.source()
    decoder, draft = model.target(source, model.exact_rules), resident_draft(model, source)
    for layer, (shell, _) in enumerate(draft._layers):
        held = source.resident_matrices(layer)["self_attn.o_proj.weight"]
        assert shell.o_proj.weight.data_ptr() == held.data_ptr()
    tree = random_tree(7, [3, 3])
    kv = prefilled(model, decoder, PROMPT[:10])
    before = tree_logits(decoder, kv, tree)
    batch = unpadded_batch(tree, kv)
    drafted = draft.forward([DraftRows(batch, kv)]).logits
    assert torch.equal(tree_logits(decoder, kv, tree), before), "the target overwrites what the draft wrote"
    tree_logits(decoder, kv, tree)
    assert torch.equal(draft.forward([DraftRows(batch, kv)]).logits, drafted)


@dataclass
class Interrupted:
    """A kernel that fails once, at its n-th call."""

    left: int

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return fused_cpu_kernel(query, keys, values, mask, scale=query.shape[-1] ** -0.5)


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_after_an_interrupt_the_next_pass_starts_at_the_first_block(tiny: MakeTiny, calls: int) -> None:
    model = tiny("qwen2")
    batch = chunk_group(PROMPT[:6], 0)
    expected = model.target().forward(batch, model.kv())
    with closing(model.streamer(range(3), 2)) as streamer:
        attention = model.attention(kernel=Interrupted(calls))
        decoder = model.target(model.source([], streamer), attention=attention)
        with pytest.raises(KeyboardInterrupt):
            decoder.forward(batch, model.kv())
        assert torch.equal(decoder.forward(batch, model.kv()), expected)


@dataclass
class FakeStreamer:
    """Hands over the blocks of one layer, and knows how each pass ended."""

    blocks_of_layer: list[dict[str, Tensor]]
    passes: list[Generator[dict[str, Tensor], None, None]] = field(default_factory=list)
    completed: int = 0
    left: int = 0
    most_held: int = 1

    def blocks(self, parts: Sequence[int] = (1,)) -> Generator[dict[str, Tensor], None, None]:
        self.passes.append(self._pass())
        return self.passes[-1]

    def _pass(self) -> Generator[dict[str, Tensor], None, None]:
        try:
            yield from self.blocks_of_layer
            self.completed += 1
        finally:
            self.left += 1


@pytest.fixture
def streamed_source(tiny: MakeTiny) -> tuple[TargetBlocks, FakeStreamer]:
    """Layers 0 and 1 resident, layer 2 streamed."""
    held = tiny("llama").source().resident
    streamer: Any = FakeStreamer(list(held[2]))
    return TargetBlocks(3, {0: held[0], 1: held[1]}, streamer), streamer


def test_a_whole_pass_releases_the_last_slot_too(
    streamed_source: tuple[TargetBlocks, FakeStreamer],
) -> None:
    """Or every pass would count as left early, and what was read ahead for the next one be thrown away."""
    source, streamer = streamed_source
    with closing(source.blocks()) as blocks:
        assert len(list(blocks)) == 12
    assert (streamer.completed, streamer.left) == (1, 1)


def test_leaving_a_pass_leaves_the_stream_at_once(streamed_source: tuple[TargetBlocks, FakeStreamer]) -> None:
    source, streamer = streamed_source
    with closing(source.blocks()) as blocks:
        assert [next(blocks).layer for _ in range(10)][-1] == 2
    assert (streamer.completed, streamer.left) == (0, 1)


def test_a_failing_block_leaves_the_stream_at_once(
    tiny: MakeTiny, streamed_source: tuple[TargetBlocks, FakeStreamer]
) -> None:
    """Not when the traceback is dropped: the reader would wait with slots of an abandoned pass."""
    model = tiny("llama")
    source, streamer = streamed_source
    decoder = model.target(source, attention=model.attention(kernel=Interrupted(3)))
    with pytest.raises(KeyboardInterrupt) as caught:
        decoder.forward(chunk_group(PROMPT[:6], 0), model.kv())
    assert (streamer.completed, streamer.left) == (0, 1)
    assert caught.tb is not None


def test_blocks_come_in_the_order_of_use_and_resident_ones_are_not_copied(tiny: MakeTiny) -> None:
    source = tiny("llama").source()
    order = []
    for block in source.blocks():
        order.append((block.layer, block.kind))
        held = source.resident_matrices(block.layer)
        assert all(tensor.data_ptr() == held[name].data_ptr() for name, tensor in block.matrices.items())
    assert order == [(layer, kind) for layer in range(3) for kind in ("attention", "gate", "up", "down")]


@contextmanager
def unchanged(tensors: dict[str, Tensor]) -> Any:
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    yield
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


def test_a_forward_leaves_the_weights_as_they_are(model: Tiny) -> None:
    """Activations are updated in place; weights, norms and the embedding must not be."""
    source = model.source()
    held = {
        f"{layer}.{name}": tensor
        for layer in range(3)
        for name, tensor in source.resident_matrices(layer).items()
    }
    with unchanged(held | model.weights):
        decoder = model.target(source)
        kv = prefilled(model, decoder, PROMPT[:10])
        rows = DraftRows(unpadded_batch(random_tree(1, [2, 2]), kv), kv)
        resident_draft(model, source).forward([rows])


def test_the_last_positions_of_the_context_have_room_for_a_whole_tree(tiny: MakeTiny) -> None:
    model = replace(tiny("qwen2"), context=24, scratch=9)
    decoder = model.target()
    kv = prefilled(model, decoder, PROMPT[:24])
    deep = random_tree(1, [1] * 8)
    logits = tree_logits(decoder, kv, deep)
    wide = replace(model, context=100, scratch=9)
    expected = tree_logits(decoder, prefilled(wide, wide.target(), PROMPT[:24]), deep)
    assert torch.equal(logits, expected)


def test_trees_of_several_sequences_go_through_a_pass_as_they_do_alone(tiny: MakeTiny) -> None:
    """Chunks of a prompt are in the same pass; every row keeps its bits, and every sequence its own cache."""
    model = tiny("qwen2", dtype=torch.bfloat16)
    decoder = model.target(rules=model.exact_rules)
    prompts, trees = (
        [PROMPT[:13], PROMPT[3:8], PROMPT[1:20]],
        [random_tree(n, [2, 1, 3][: n + 1]) for n in range(3)],
    )
    caches = [prefilled(model, decoder, prompt) for prompt in prompts]
    alone = [tree_logits(decoder, kv, tree) for kv, tree in zip(caches, trees, strict=True)]
    fresh, chunk = model.kv(), chunk_group(PROMPT[:9], 0)
    read_alone = decoder.forward(chunk, model.kv())
    batch = [SequenceRows(tree_group(tree, kv.committed), kv) for tree, kv in zip(trees, caches, strict=True)]
    flow = decoder.begin([[SequenceRows(chunk, fresh)], batch])
    with closing(decoder.layers(flow)) as layers:
        for _ in layers:
            pass
    first = 0
    for tree, expected in zip(trees, alone, strict=True):
        found = decoder.logits(flow, [(1, slice(first, first + len(tree)))])
        assert torch.equal(found, expected)
        first += len(tree)
    together = decoder.logits(flow, [(0, slice(8, 9)), (1, slice(first))])
    assert torch.equal(together[:1], read_alone[8:])
    assert torch.equal(together[1:], torch.cat(alone))
