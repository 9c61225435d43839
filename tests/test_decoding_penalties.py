"""Penalties and min-p: the library's on the same logits, and the same tokens with and without speculation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes_session import answer_to, open_tiny
from tiny_models import FAMILIES
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from subspec_cli.checkpoint.layer_description import Arithmetic
from subspec_cli.decoding.penalties import NO_PENALTIES, Penalties, begin_path
from subspec_cli.decoding.sampler import Filters, allowed_tokens
from subspec_cli.drafting.draft_steps import penalized, penalty_numbers, rank
from subspec_cli.modeling.decoder import DraftLogits, Head
from subspec_cli.modeling.layers import OutputMath

VOCAB = 61
PROMPT = [3, 9, 3, 60, 0]


def logits_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 4, VOCAB)


def library(processor, ids: list[int], row: np.ndarray) -> np.ndarray:
    return processor(torch.tensor([ids]), torch.tensor(row)[None])[0].numpy()


@pytest.mark.parametrize("penalty", [1.1, 1.7, 0.5])
@pytest.mark.parametrize("answer", [[], [4], [9, 9, 17, 60]])
def test_the_repetition_penalty_is_the_librarys_over_prompt_and_answer(penalty, answer):
    state = begin_path(Penalties(repetition=penalty), PROMPT, VOCAB).after(*answer)
    for seed in range(5):
        row = logits_of(seed)
        wanted = library(RepetitionPenaltyLogitsProcessor(penalty), [*PROMPT, *answer], row)
        np.testing.assert_array_equal(state.adjust(row), wanted)


def test_presence_and_frequency_follow_the_formula_of_the_api():
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, over the answer alone."""
    state = begin_path(Penalties(presence=0.75, frequency=0.25), PROMPT, VOCAB).after(4, 9, 4, 4)
    row = logits_of(1)
    wanted = row.copy()
    wanted[4] -= 3 * 0.25 + 0.75
    wanted[9] -= 0.25 + 0.75
    np.testing.assert_allclose(state.adjust(row), wanted, rtol=0, atol=1e-12)


def test_a_bias_is_the_librarys_and_comes_before_the_penalties():
    biases = ((5, 2.5), (9, -30.0))
    state = begin_path(Penalties(bias=biases), PROMPT, VOCAB)
    row = logits_of(2)
    wanted = library(SequenceBiasLogitsProcessor({(token,): bias for token, bias in biases}), PROMPT, row)
    np.testing.assert_allclose(state.adjust(row), wanted, rtol=0, atol=1e-6)
    both = begin_path(Penalties(repetition=2.0, bias=biases), PROMPT, VOCAB)
    np.testing.assert_allclose(
        both.adjust(row),
        library(RepetitionPenaltyLogitsProcessor(2.0), PROMPT, state.adjust(row)),
        atol=1e-12,
    )


@pytest.mark.parametrize("min_p", [0.02, 0.3, 1.0])
def test_min_p_keeps_what_the_library_keeps(min_p):
    for seed in range(20):
        row = logits_of(seed)
        wanted = np.isfinite(library(MinPLogitsWarper(min_p), PROMPT, row))
        np.testing.assert_array_equal(allowed_tokens(row, Filters(0, 1.0, min_p)), wanted)


def test_a_state_is_its_parents_with_one_token_more_and_parents_stay():
    root = begin_path(Penalties(frequency=1.0), PROMPT, VOCAB)
    left, right = root.after(7), root.after(8)
    assert (root.counts.sum(), left.counts[7], left.counts[8], right.counts[8]) == (0, 1, 0, 1)
    assert begin_path(NO_PENALTIES, PROMPT, VOCAB) is None


def test_the_draft_guesses_by_the_same_numbers():
    rule = Penalties(repetition=1.3, presence=0.5, frequency=0.2, bias=((1, 3.0),))
    state = begin_path(rule, PROMPT, VOCAB).after(4, 4, 9)
    rows = np.stack([logits_of(5), logits_of(6)])
    found = penalized(torch.tensor(rows, dtype=torch.float32), penalty_numbers(state))
    np.testing.assert_allclose(found.numpy(), np.stack([state.adjust(row) for row in rows]), atol=1e-5)


def test_a_draft_head_of_few_bits_keeps_the_penalties_when_the_16_bit_head_scores_again():
    state = begin_path(Penalties(repetition=1.3, bias=((7, -50.0), (8, 4.0))), PROMPT, VOCAB)
    weight = torch.tensor(np.stack([logits_of(7)]).T, dtype=torch.float32)
    rough = (weight.T + 0.01).contiguous()
    arithmetic = Arithmetic(attention_scale=1.0, eps=0.0)
    head = Head(OutputMath(arithmetic, torch.ones(1)), weight)
    found = DraftLogits(rough, normed=torch.ones(1, 1), head=head)
    ids, _ = rank(found, None, penalty_numbers(state))
    wanted = np.argsort(-state.adjust(weight[:, 0].double().numpy()))
    assert ids[0].tolist() == wanted[:8].tolist()


RULES = {
    "repetition": {"repetition_penalty": 1.4},
    "presence and frequency": {"presence_penalty": 1.5, "frequency_penalty": 0.7, "temperature": 1.0},
    "min-p": {"min_p": 0.1, "temperature": 1.3},
    "all": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "min_p": 0.05,
        "top_p": 0.95,
        "temperature": 0.9,
        "logit_bias": {"65": 4.0, "66": -50.0},
    },
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=() if family == "llama" else pytest.mark.slow) for family in FAMILIES],
)
def test_speculation_changes_no_token(shelf, family, rule):
    with open_tiny(shelf.model(family), sampling=rule | {"seed": 3}) as session:
        arms = [
            answer_to(session, prompt, 40, plain=plain, request_number=2)
            for prompt in ("Hello", "aaaa bbbb aaaa bbbb " * 6)
            for plain in (False, True)
        ]
    assert [answer.outcome for answer in arms[0::2]] == [answer.outcome for answer in arms[1::2]]
    assert arms[0].stats.drafted_tokens > 0


def test_a_repetition_penalty_ends_a_loop(shelf):
    model = shelf.model("llama")
    with open_tiny(model) as session:
        loop = answer_to(session, "aaaa aaaa aaaa", 60).token_ids
    with open_tiny(model, sampling={"frequency_penalty": 50.0}) as session:
        other = answer_to(session, "aaaa aaaa aaaa", 60).token_ids
    assert len(set(other)) == len(other), "no token comes twice"
    assert len(set(loop)) < len(loop)
