"""Every family beside the library: the oracle of the table in `checkpoint.families`.

In float32 the logits are the library's within rounding. In bfloat16 they are the library's bit for bit if the library
runs our attention, so every norm, rotation, factor, cap, bias and residual is rounded where the library rounds it;
with its own attention the distance is the library's own from float32. `python tests/test_families.py` prints a table.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import CountdownStop, free_policy
from fakes_session import Shelf, answer_to, open_tiny
from family_cases import CASES, FamilyCase
from library_answers import first_gap
from test_modeling_decoder import (
    path_to,
    prefilled,
    random_tree,
    resident_draft,
    sequential_logits,
    tree_logits,
    unpadded_batch,
)
from tiny_models import EOS_ID, Tiny, make_tiny_model
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.utils import logging as library_logging

from subspec_cli.checkpoint.families import FAMILIES, WRAPPERS
from subspec_cli.checkpoint.layer_tensors import layer_prefix
from subspec_cli.config import SamplingConfig
from subspec_cli.decoding.drafter import Drafter, PlainDrafter
from subspec_cli.decoding.engine import Engine, Request
from subspec_cli.decoding.sampler import make_sampler
from subspec_cli.decoding.text import AnswerText
from subspec_cli.drafting.draft_steps import DirectSteps
from subspec_cli.drafting.tree_drafter import TreeDrafter
from subspec_cli.modeling.decoder import DraftDecoder
from subspec_cli.modeling.draft_rows import DraftRows
from subspec_cli.modeling.exact_attention import ChainRows
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.pretrained import ModelTokenizer
from subspec_cli.modeling.self_check import SelfCheck, check_batch_invariance
from subspec_cli.modeling.substitute import resident_layer
from subspec_cli.streaming.streamer import StreamCounters

FLOAT32_ATOL = 1e-4
"""Logits here reach 30; float32 sums in another order differ by some 1e-5."""
MEDIAN_FACTOR, LARGEST_FACTOR = 1.25, 2.5
"""Our bfloat16 may be so much farther from float32 than the library's: two roundings of the same size."""
CONTEXT, SCRATCH = 80, 24
PREFILLED, DECODED = 40, 8
SAMPLINGS = {"greedy": (0.0, "Rivers"), "T 1.0": (1.0, "Why is the sea blue?")}
"""Temperature and prompt, which goes through the chat template."""
SHAPES = {"chain": (5, 1, 6), "tree": (5, 3, 18)}
"""Depth, width and nodes: chains deeper than the shortest window, trees wider than it."""
NEW_TOKENS = 12
GENERATED = 8
"""Tokens of an answer that is compared with the library's `generate`."""
ANSWERS = 5
"""Prompts for each shape, so 10 or more for each family."""


def tokens_of(seed: int, count: int) -> list[int]:
    """Bytes at random."""
    chance = random.Random(seed)
    return [chance.randrange(250) for _ in range(count)]


@dataclass
class Oracle:
    """A case in both types, ours and the library's."""

    case: FamilyCase
    directory: Path

    @cached_property
    def wide(self) -> Tiny:
        """In float32."""
        return self._opened("float32", torch.float32)

    @cached_property
    def narrow(self) -> Tiny:
        """In bfloat16."""
        return self._opened("bfloat16", torch.bfloat16)

    @cached_property
    def tokenizer(self) -> ModelTokenizer:
        """It reads and writes tokens alone: a process for the chat template starts where a text is asked for."""
        return ModelTokenizer(self.narrow.directory, self.narrow.repository.tokenizer)

    @cached_property
    def prompts(self) -> dict[str, list[int]]:
        """The prompts of `SAMPLINGS` in the model's chat template, whose process ends here."""
        tokenizer = ModelTokenizer(self.narrow.directory, self.narrow.repository.tokenizer)
        texts = (text for _, text in SAMPLINGS.values())
        return {text: tokenizer.encode_prompt(text, system=None, raw=False) for text in texts}

    @cached_property
    def self_check(self) -> SelfCheck:
        """What the self-check finds for the bfloat16 model."""
        model, source = self.narrow, self.narrow.source()
        return check_batch_invariance(
            lambda rules: model.target(source, rules),
            model.attention,
            model.head,
            source,
            model.kv(),
            most_nodes=SCRATCH,
            prefill_rows=64,
        )

    def _opened(self, name: str, dtype: torch.dtype) -> Tiny:
        make_tiny_model(self.directory / name, dtype=dtype, **self.case.how)
        return Tiny(self.directory / name, context=CONTEXT, scratch=SCRATCH)


@pytest.fixture(scope="module", autouse=True)
def quiet_library() -> Iterator[None]:
    """Progress bars and warnings of hundreds of tiny models."""
    with quiet():
        yield


@contextmanager
def quiet() -> Iterator[None]:
    logging: Any = library_logging  # not annotated
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)
    if bars:
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[FamilyCase], Oracle]:
    """Cases that are opened, by name."""
    opened: dict[str, Oracle] = {}

    def oracle_of(case: FamilyCase) -> Oracle:
        if case.name not in opened:
            opened[case.name] = Oracle(case, tmp_path_factory.mktemp("case"))
        return opened[case.name]

    return oracle_of


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def oracle(request: pytest.FixtureRequest, oracles: Callable[[FamilyCase], Oracle]) -> Oracle:
    """Each case."""
    return oracles(request.param)


def test_every_family_and_wrapper_has_two_shapes() -> None:
    counts = {row: sum(case.family == row for case in CASES) for row in (*FAMILIES, *WRAPPERS)}
    assert {row: count for row, count in counts.items() if count < 2} == {}
    inside = {(case.family, case.settings["text"]) for case in CASES if case.family in WRAPPERS}
    assert inside == {(name, text) for name, row in WRAPPERS.items() for text in row.texts}


# --- the library's numbers -----------------------------------------------------------------------


def library_logits(library: Any, token_ids: list[int]) -> Tensor:
    """`[T, V]` of one plain forward."""
    with torch.inference_mode():
        logits: Tensor = library(torch.tensor([token_ids])).logits[0]
    return logits


def largest_difference(oracle: Oracle) -> float:
    """Of float32 logits from the library's: a prompt, then tokens one by one over the cache."""
    model, token_ids = oracle.wide, tokens_of(0, PREFILLED + DECODED)
    decoder, kv = model.target(), model.kv()
    decoder.begin_answer(kv, PREFILLED)
    rows = [model.prefill(decoder, kv, token_ids[:PREFILLED], chunk=16)]
    rows += [model.prefill(decoder, kv, [token]) for token in token_ids[PREFILLED:]]
    expected = library_logits(model.reference(), token_ids)
    assert expected.std() > 0.1
    return float((torch.cat(rows) - expected).abs().max())


def test_float32_logits_are_those_of_the_library(oracle: Oracle) -> None:
    assert largest_difference(oracle) < FLOAT32_ATOL


def test_bfloat16_logits_are_bit_for_bit_those_of_the_library_with_our_attention(oracle: Oracle) -> None:
    """Then everything but attention is the library's own code, and the rest of ours must round as it does."""
    if oracle.case.is_hybrid:
        pytest.skip("its recurrence is written otherwise than the library's")
    model, token_ids = oracle.narrow, tokens_of(1, 64)
    decoder, kv = model.target(), model.kv()
    decoder.begin_answer(kv, len(token_ids))
    found = model.prefill(decoder, kv, token_ids)
    with our_attention_in_the_library(model) as name:
        expected = library_logits(model.library_in(torch.bfloat16, name), token_ids)
    assert torch.equal(found, expected)
    reference = library_logits(model.library_in(torch.float32), token_ids)
    library = (library_logits(model.reference(), token_ids).float() - reference).abs()
    own = (found.float() - reference).abs()
    assert own.median() <= MEDIAN_FACTOR * library.median()
    assert own.max() <= LARGEST_FACTOR * library.max()


@contextmanager
def our_attention_in_the_library(model: Tiny) -> Iterator[str]:
    """Register our attention as one of the library's; it checks the scale, the window and the cap it is given."""
    attention, geometry, rows = model.attention(), model.geometry, model.kv().rows
    layers: list[int] = []

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **given: Any
    ) -> tuple[Tensor, None]:
        shape = geometry.attention[module.layer_idx]
        assert given["scaling"] == geometry.arithmetic.attention_scale
        assert given.get("sliding_window") == shape.window
        assert given.get("softcap") == geometry.arithmetic.score_cap
        layers.append(module.layer_idx)
        _, _, length, _ = query.shape
        cached = [torch.nn.functional.pad(part[0], (0, 0, 0, rows - length)) for part in (key, value)]
        folded = query[0].transpose(0, 1).contiguous()
        attended = attention.attend(folded, cached[0], cached[1], ChainRows(0), shape)
        return attended.view(1, length, shape.heads, -1), None

    AttentionInterface.register("ours", attend)
    AttentionMaskInterface.register("ours", eager_mask)
    yield "ours"
    assert layers == list(range(geometry.layers))


# --- trees and speculation -----------------------------------------------------------------------


def test_a_tree_has_the_bits_of_its_paths(oracle: Oracle) -> None:
    """Deeper and wider than the windows, across two blocks of keys; the self-check finds rules that hold."""
    model, check = oracle.narrow, oracle.self_check
    assert check.exactness == "exact", check.reason
    decoder = model.target(rules=check.rules, attention=model.attention(check.attention))
    prompt, tree = tokens_of(2, 60), random_tree(20, [2, 2, 2, 2, 1, 1, 1])
    kv = prefilled(model, decoder, prompt)
    found = tree_logits(decoder, kv, tree)
    if not oracle.case.is_hybrid:
        assert torch.equal(found, sequential_logits(decoder, kv, tree))
        return
    for leaf in set(range(len(tree))) - set(
        tree.parents
    ):  # a recurrent state does not go back by single tokens
        path = path_to(tree, leaf)
        alone = prefilled(model, decoder, prompt)
        for node in path:
            assert torch.equal(model.prefill(decoder, alone, [tree.token_ids[node]])[0], found[node])


def test_a_draft_over_the_targets_matrices_finds_its_logits(oracle: Oracle) -> None:
    """The draft has its own form of every norm, rotation and factor; in float32 only the formula shows."""
    model = oracle.wide
    decoder = model.target()
    tree = random_tree(8, [2, 3, 2, 2, 1, 1, 1])
    kv = prefilled(model, decoder, tokens_of(5, 30))
    found = resident_draft(model, model.source()).forward([DraftRows(unpadded_batch(tree, kv), kv)]).logits
    expected = tree_logits(decoder, kv, tree)
    torch.testing.assert_close(found, expected, atol=FLOAT32_ATOL, rtol=0)


def noisy_draft(model: Tiny) -> DraftDecoder:
    """The target's matrices with some noise: a draft that is right often, and often wrong."""
    math, generator = model.math(), torch.Generator().manual_seed(3)
    layers = []
    for layer in range(model.geometry.layers):
        prefix = layer_prefix(layer)
        matrices = {
            name: weight + 0.2 * weight.float().std() * torch.randn(weight.shape, generator=generator)
            for name in model.geometry.layer_matrices(layer)
            for weight in [model.weights[prefix + name]]
        }
        layers.append(
            resident_layer(math, layer, {name: value.to(model.dtype) for name, value in matrices.items()})
        )
    return DraftDecoder(math, model.embed, model.head, layers)


@dataclass
class Arm:
    """An engine over a case, with or without a draft; both arms have shells of their own."""

    oracle: Oracle
    shape: tuple[int, int, int] | None = None
    drafted: int = 0

    @cached_property
    def _engine(self) -> Engine:
        model, check = self.oracle.narrow, self.oracle.self_check
        target = model.target(rules=check.rules, attention=model.attention(check.attention))
        return Engine(target, self._drafter(), counters=StreamCounters, prompt_rows=CONTEXT)

    @cached_property
    def _kv(self) -> KVCache:
        return self.oracle.narrow.kv()

    def _drafter(self) -> Drafter[Any]:
        if self.shape is None:
            return PlainDrafter()
        steps = DirectSteps(noisy_draft(self.oracle.narrow))
        return TreeDrafter(steps, free_policy(*self.shape), eos_ids=())

    def answer(self, temperature: float, text: str) -> list[int]:
        """Tokens that the engine gives to a prompt in the model's chat template."""
        prompt = self.oracle.prompts[text]
        sampler = make_sampler(SamplingConfig(temperature=temperature), 1, 0)
        stop = AnswerText(self.oracle.tokenizer, eos_ids=(), stop=(), max_new_tokens=NEW_TOKENS)
        outputs = list(self._engine.generate(Request(tuple(prompt), sampler, NEW_TOKENS, stop), self._kv))
        self.drafted += outputs[-1].stats.drafted_tokens
        return [token for output in outputs for token in output.token_ids]


def same_tokens(oracle: Oracle, shape: str, sampling: str) -> bool:
    """Whether a draft of a shape gives the tokens of plain decoding."""
    arm = Arm(oracle, SHAPES[shape])
    is_same = arm.answer(*SAMPLINGS[sampling]) == Arm(oracle).answer(*SAMPLINGS[sampling])
    assert arm.drafted > 0
    return is_same


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_speculation_changes_no_token(oracle: Oracle, sampling: str) -> None:
    """One shape of a family has chains where the other one has trees."""
    shape = "tree" if (sampling == "greedy") == oracle.case.is_odd else "chain"
    assert same_tokens(oracle, shape, sampling)


def test_greedy_answers_are_those_of_the_library(oracle: Oracle) -> None:
    """In float32; where two logits are nearly equal, either may be taken."""
    model = oracle.wide
    prompts = [tokens_of(100 + number, 20) for number in range(ANSWERS)]
    with torch.inference_mode():
        library = model.reference().generate(
            torch.tensor(prompts),
            attention_mask=torch.ones(ANSWERS, 20, dtype=torch.long),
            do_sample=False,
            max_new_tokens=GENERATED,
            eos_token_id=EOS_ID,
            pad_token_id=0,
        )[:, 20:]
    decoder, kv = model.target(), model.kv()
    engine = Engine(decoder, PlainDrafter(), counters=StreamCounters, prompt_rows=CONTEXT)
    for prompt, row in zip(prompts, library.tolist(), strict=True):
        theirs = row[: row.index(EOS_ID) + 1] if EOS_ID in row else row
        sampler = make_sampler(SamplingConfig(temperature=0.0), 0, 0)
        stop = CountdownStop(GENERATED, (EOS_ID,))
        outputs = engine.generate(Request(tuple(prompt), sampler, GENERATED, stop), kv)
        ours = [token for output in outputs for token in output.token_ids]
        assert first_gap(model.reference(), prompt, ours, theirs) < 2 * FLOAT32_ATOL


# --- whole sessions ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma3 in gemma3", "glm4, odd", "stablelm, odd"])
def test_a_session_over_a_prepared_model_changes_no_token(shelf: Shelf, name: str) -> None:
    """Fused projections, renamed and biased norms, and a text part in a wrapper, from `prepare` to the answer."""
    case = next(case for case in CASES if case.name == name)
    how = case.how
    model = shelf.model(how.pop("family"), **how)
    with open_tiny(model, sampling={"temperature": 1.0, "seed": 6}) as session:
        assert (session.description.exactness, session.description.speculation) == ("exact", True)
        has_bias = session.loaded.head.output.norm_bias is not None
        assert has_bias == session.loaded.math.geometry.arithmetic.norm_bias
        speculative, plain = (
            answer_to(session, "Why is the sea blue?", 24, plain=plain, request_number=2)
            for plain in (False, True)
        )
    assert speculative.outcome == plain.outcome
    assert speculative.stats.drafted_tokens > 0


def write_table(directory: Path) -> None:
    """The table of families, as Markdown."""
    print("| Family | Class | Largest difference of logits | Identical tokens | Self-check |")  # noqa: T201
    print("|---|---|---|---|---|")  # noqa: T201
    for number, case in enumerate(CASES):
        oracle = Oracle(case, directory / str(number))
        row = (FAMILIES.get(case.family) or WRAPPERS[case.family]).architecture
        difference, check = largest_difference(oracle), oracle.self_check.exactness
        same = all(same_tokens(oracle, shape, sampling) for shape in SHAPES for sampling in SAMPLINGS)
        tokens = "yes" if same else "NO"
        print(f"| {case.name} | `{row}` | {difference:.1e} | {tokens} | {check} |")  # noqa: T201


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root, quiet():
        write_table(Path(root))
