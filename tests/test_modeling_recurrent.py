"""Recurrent layers: one rule for chains, trees, commits and replays, and a state that can go back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import AUTO, EOS_ID, VOCAB, Tiny, write_tiny_tokenizer
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5 import modeling_qwen3_5

from subspec_cli.limits import TREE_STATES
from subspec_cli.modeling import delta_kernel
from subspec_cli.modeling.decoder import DraftDecoder
from subspec_cli.modeling.delta_kernel import DeltaRows, Visits, chain_visits, run_rule, tree_visits
from subspec_cli.modeling.draft_rows import DraftRows
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.row_group import RowGroup
from subspec_cli.modeling.substitute import resident_layer
from subspec_cli.modeling.target_flow import SequenceRows
from subspec_cli.modeling.token_batch import TokenBatch

one_thread = tiny_models.one_thread
PARENTS = (-1, 0, 0, 1, 1, 3, 5, 2, 6, 8, 0, 10)


@pytest.fixture(scope="module", params=[(16, 24, 2, 4), (32, 8, 1, 3)], ids=["grouped", "one-key-head"])
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A float32 model of four recurrent layers and two with gated attention."""
    key_dim, value_dim, key_heads, value_heads = request.param
    config = Qwen3_5TextConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_key_head_dim=key_dim,
        linear_value_head_dim=value_dim,
        linear_num_key_heads=key_heads,
        linear_num_value_heads=value_heads,
        layer_types=["linear_attention", "full_attention", "linear_attention"] * 2,
        max_position_embeddings=512,
        eos_token_id=EOS_ID,
    )
    directory = tmp_path_factory.mktemp("hybrid")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AUTO.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn(parameter.shape)
            elif parameter.dim() == 2:
                parameter.data = torch.randn(parameter.shape) / parameter.shape[1] ** 0.5
    model.save_pretrained(directory)
    write_tiny_tokenizer(directory)
    return Tiny(directory)


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def path_mask(parents: Sequence[int]) -> torch.Tensor:
    path = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            path[node] |= path[parent]
    return path


def run_tree(model: Tiny, kv: KVCache, ids: Sequence[int], parents: Sequence[int]) -> torch.Tensor:
    """Logits of a tree's nodes behind what is committed."""
    decoder, path = model.target(rules=model.exact_rules), path_mask(parents)
    group = RowGroup(torch.tensor(list(ids)), path.sum(1) - 1 + kv.committed, kv.committed, path)
    return decoder.forward(group, kv)


def line_of(node: int, parents: Sequence[int]) -> list[int]:
    line = [node]
    while parents[line[0]] >= 0:
        line.insert(0, parents[line[0]])
    return line


def random_rows(
    rows: int, *, heads: int = 4, key_heads: int = 2, features: int = 5, width: int = 7
) -> DeltaRows:
    return DeltaRows(
        torch.randn(rows, key_heads, features),
        torch.randn(rows, key_heads, features) / features,
        torch.randn(rows, heads, width),
        torch.rand(rows, heads),
        torch.rand(rows, heads),
    )


def apply(rows: DeltaRows, visits: Visits, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    slots, output = torch.zeros((visits.slots, *base.shape)), torch.empty_like(rows.value)
    run_rule(rows, visits, base, slots, output)
    return output, slots


trees = st.lists(st.integers(0, 1 << 16), min_size=0, max_size=62).map(
    lambda drawn: [-1, *(value % (node + 1) for node, value in enumerate(drawn))]
)


@given(parents=trees, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_node_has_the_bits_of_its_path_alone(parents: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    rows, base = random_rows(len(parents)), torch.randn(4, 5, 7)
    visits = tree_visits(parents)
    assert visits.slots <= TREE_STATES
    output, _ = apply(rows, visits, base)
    for node in range(len(parents)):
        line = line_of(node, parents)
        alone, _ = apply(DeltaRows(*(part[line] for part in rows)), chain_visits(len(line)), base)
        assert torch.equal(alone[-1], output[node])


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("shape", [(4, 2, 5, 7), (3, 3, 8, 8), (6, 1, 16, 4)])
def test_the_compiled_rule_has_the_bits_of_the_one_in_torch(
    monkeypatch: pytest.MonkeyPatch, rows: int, shape: tuple[int, ...]
) -> None:
    if not delta_kernel.compile_rule():
        pytest.skip("numba is not installed")
    heads, key_heads, features, width = shape
    given_rows = random_rows(rows, heads=heads, key_heads=key_heads, features=features, width=width)
    base = torch.randn(heads, features, width)
    for visits in (chain_visits(rows), tree_visits([-1, *range(rows - 1)]), tree_visits([-1] * rows)):
        compiled = apply(given_rows, visits, base)
        with monkeypatch.context() as patch:
            patch.setattr(delta_kernel, "_compiled_rule", lambda: None)
            plain = apply(given_rows, visits, base)
        assert torch.equal(compiled[0], plain[0])
        assert torch.equal(compiled[1], plain[1])


class Doubled:
    """The torch of the library's module where it is to compute in float64 what it computes in float32."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, "float64" if name == "float32" else name)


def test_logits_are_those_of_the_library(hybrid: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its chunked rule, closer with its rule of one token after another, and as near to float64 as both."""
    ids, decoder, kv = tokens(150), hybrid.target(rules=hybrid.exact_rules), hybrid.kv()
    found = torch.cat(
        [hybrid.prefill(decoder, kv, ids[:140]), *(hybrid.prefill(decoder, kv, [t]) for t in ids[140:])]
    )

    def library(dtype: torch.dtype) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = hybrid.library_in(dtype)(torch.tensor([ids])).logits[0]
        return logits

    chunked = library(torch.float32)
    rule = modeling_qwen3_5.torch_recurrent_gated_delta_rule
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", rule)
    stepped = library(torch.float32)
    monkeypatch.setattr(modeling_qwen3_5, "torch", Doubled())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    truth = library(torch.float64)
    assert (found - chunked).abs().max() < 2e-4
    assert (found - stepped).abs().max() < 5e-5
    own, *theirs = ((logits.double() - truth).abs().mean() for logits in (found, chunked, stepped))
    assert own < 1.2 * min(theirs)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_trees_chunks_and_steps_have_the_same_bits(hybrid: Tiny, threads: int) -> None:
    """Each node against its path in one chunk, and in single steps of plain decoding."""
    torch.set_num_threads(threads)
    prompt, ids = tokens(70), tokens(len(PARENTS), 1)
    decoder, kv = hybrid.target(rules=hybrid.exact_rules), hybrid.kv()
    hybrid.prefill(decoder, kv, prompt)
    logits = run_tree(hybrid, kv, ids, PARENTS)
    for node in (4, 7, 9):
        line = line_of(node, PARENTS)
        chunked, stepped = hybrid.kv(), hybrid.kv()
        whole = hybrid.prefill(decoder, chunked, [*prompt, *(ids[n] for n in line)])
        hybrid.prefill(decoder, stepped, prompt)
        for at in line:
            single = run_tree(hybrid, stepped, [ids[at]], [-1])
            stepped.commit([0], [ids[at]])
        assert torch.equal(whole[-1], logits[node])
        assert torch.equal(single[0], logits[node])


@pytest.mark.parametrize("node", [0, 4, 9])
def test_a_committed_path_continues_as_its_prompt_would(hybrid: Tiny, node: int) -> None:
    prompt, ids, after = tokens(70), tokens(len(PARENTS), 1), tokens(5, 2)
    line = line_of(node, PARENTS)
    kv, whole = hybrid.kv(), hybrid.kv()
    hybrid.prefill(hybrid.target(rules=hybrid.exact_rules), kv, prompt)
    run_tree(hybrid, kv, ids, PARENTS)
    kv.commit(line, [ids[n] for n in line])
    expected = hybrid.prefill(
        hybrid.target(rules=hybrid.exact_rules), whole, [*prompt, *(ids[n] for n in line), *after]
    )[-5:]
    assert torch.equal(hybrid.prefill(hybrid.target(rules=hybrid.exact_rules), kv, after), expected)


def test_a_pass_that_is_not_committed_leaves_the_state(hybrid: Tiny) -> None:
    prompt, after = tokens(30), tokens(6, 3)
    kv, whole = hybrid.kv(), hybrid.kv()
    hybrid.prefill(hybrid.target(rules=hybrid.exact_rules), kv, prompt)
    expected = hybrid.prefill(hybrid.target(rules=hybrid.exact_rules), whole, [*prompt, *after])[-6:]
    decoder = hybrid.target(rules=hybrid.exact_rules)
    for parents in ((-1, 0, 0), None):
        path = None if parents is None else path_mask(parents)
        positions = torch.arange(30, 33) if path is None else path.sum(1) + 29
        flow = decoder.begin([[SequenceRows(RowGroup(torch.tensor(tokens(3, 4)), positions, 30, path), kv)]])
        layers = decoder.layers(flow)
        for _ in range(3):
            next(layers)
        layers.close()  # as an interrupt does
    assert torch.equal(hybrid.prefill(hybrid.target(rules=hybrid.exact_rules), kv, after), expected)


def test_a_commit_that_an_interrupt_divides_is_taken_back(hybrid: Tiny) -> None:
    """The state is ahead of the cache's tokens then; the next prompt goes back to where both are known."""
    prompt, after = tokens(30), tokens(6, 3)
    kv, whole, decoder = hybrid.kv(), hybrid.kv(), hybrid.target(rules=hybrid.exact_rules)
    hybrid.prefill(decoder, kv, prompt)
    kv.keep_snapshot()
    run_tree(hybrid, kv, tokens(3, 4), (-1, 0, 1))
    assert kv.recurrent is not None
    kv.recurrent.commit([0, 1])
    assert kv.rewind(30) == 30
    expected = hybrid.prefill(decoder, whole, [*prompt, *after])[-6:]
    assert torch.equal(hybrid.prefill(decoder, kv, after), expected)


@pytest.mark.parametrize(("wanted", "left"), [(120, 120), (119, 100), (100, 100), (99, 64), (63, 0)])
def test_a_state_goes_back_to_snapshots_only(hybrid: Tiny, wanted: int, left: int) -> None:
    whole, rest = [*tokens(100), *tokens(20, 5)], tokens(9, 6)
    kv, fresh, decoder = hybrid.kv(), hybrid.kv(), hybrid.target(rules=hybrid.exact_rules)
    hybrid.prefill(decoder, kv, whole[:64])
    kv.want_snapshot(64)
    hybrid.prefill(decoder, kv, whole[64:100])
    kv.keep_snapshot()
    hybrid.prefill(decoder, kv, whole[100:])
    assert kv.rewind(wanted) == left
    assert kv.committed == left
    expected = hybrid.prefill(decoder, fresh, whole[:left] + rest)[-9:]
    assert torch.equal(hybrid.prefill(decoder, kv, rest), expected)


def draft_of(model: Tiny) -> Iterator[Any]:
    source = model.source()
    layers = [
        resident_layer(model.math(), n, source.resident_matrices(n)) for n in range(model.geometry.layers)
    ]
    return DraftDecoder(model.math(), model.embed, model.head, layers)


def test_the_draft_of_the_target_s_own_weights_finds_its_logits(hybrid: Tiny) -> None:
    """Over several steps, one of them with a chain inside, and again behind a commit that moves rows."""
    prompt, ids = tokens(40), tokens(len(PARENTS), 1)
    kv, draft, path = hybrid.kv(), draft_of(hybrid), path_mask(PARENTS)
    hybrid.prefill(hybrid.target(rules=hybrid.exact_rules), kv, prompt)
    depths = path.sum(1) - 1

    def step(rows: Sequence[int]) -> torch.Tensor:
        end = rows[-1] + 1
        allowed = torch.cat(
            (torch.ones(len(rows), kv.committed, dtype=torch.bool), path[list(rows)][:, :end]), 1
        )
        places = torch.cat((torch.arange(kv.committed), depths[:end] + kv.committed))
        batch = TokenBatch(
            torch.tensor([ids[row] for row in rows]),
            depths[list(rows)] + kv.committed,
            kv.committed + rows[0],
            allowed,
            places,
        )
        return draft.forward([DraftRows(batch, kv)]).logits

    found = torch.cat([step(rows) for rows in ([0], [1, 2], [3, 4, 5, 6], [7], [8, 9], [10, 11])])
    wanted = run_tree(hybrid, kv, ids, PARENTS)
    assert (found - wanted).abs().max() < 1e-3
    # Nodes 5, 6, 8 and 9 lie below node 3: they become rows 0 to 3 of the next tree.
    line, below = line_of(3, PARENTS), [5, 6, 8, 9]
    kv.commit(line, [ids[node] for node in line])
    kv.move_scratch([node - len(line) for node in below])
    after = TokenBatch(
        torch.tensor([7]),
        torch.tensor([kv.committed + 4]),
        kv.committed + 4,
        torch.ones(1, kv.committed + 5, dtype=torch.bool),
        torch.arange(kv.committed + 5),
    )
    guessed = draft.forward([DraftRows(after, kv)]).logits
    target = run_tree(hybrid, kv, [*(ids[node] for node in below), 7], [-1, 0, 1, 2, 3])
    assert (guessed - target[-1:]).abs().max() < 1e-3
