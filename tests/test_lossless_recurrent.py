"""Sessions of a hybrid: its recurrent state changes no token, whatever is drafted, interrupted or taken back."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import fakes_session
import pytest
import tiny_models
import torch
from fakes_session import Answer, Shelf, answer_to, open_tiny

shelf = fakes_session.shelf
one_thread = tiny_models.one_thread
HYBRID: dict[str, Any] = {
    "layers": 5,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "max_position_embeddings": 2048,
}
LENGTHS = (10, 256, 257, 1500)
WARM = {"temperature": 1.0, "top_p": 0.95, "seed": 6}


def hybrid(shelf: Shelf, bits: int = 8) -> Path:
    return shelf.model("qwen3_5_text", bits=bits, tied=False, **HYBRID)


def prompt_of(length: int) -> str:
    """A text of so many tokens, a byte each."""
    words = "All work and no play makes a dull day, and another one. "
    return (words * (length // len(words) + 1))[:length]


@pytest.mark.parametrize("sampling", [{}, WARM], ids=["greedy", "warm"])
def test_prompts_of_any_length_have_the_tokens_of_plain_decoding(
    shelf: Shelf, sampling: dict[str, Any]
) -> None:
    drafted = 0
    with open_tiny(hybrid(shelf), sampling=sampling, memory={"context": 1600}) as session:
        assert session.description.exactness == "exact", session.description
        for length in LENGTHS:
            arms = [
                answer_to(session, prompt_of(length), 24, raw=True, plain=plain, request_number=length)
                for plain in (False, True)
            ]
            assert arms[0].outcome == arms[1].outcome
            drafted += arms[0].stats.drafted_tokens
    assert drafted > 0


def test_a_chat_that_goes_back_has_the_tokens_of_fresh_prompts(shelf: Shelf) -> None:
    """Turns that continue, that differ in the middle, that are repeated, and a reset."""
    prompts = [
        prompt_of(300),
        prompt_of(280) + " but less",
        prompt_of(300) + " and more",
        prompt_of(300),
        "?",
    ]
    with open_tiny(hybrid(shelf), sampling=WARM, memory={"context": 700}) as session:
        fresh = [answer_to(session, text, 20, raw=True, request_number=3).outcome for text in prompts]
        session.reset()
        kept = [answer_to(session, text, 20, raw=True, request_number=3, keep_cache=True) for text in prompts]
        again = answer_to(session, prompts[-1], 20, raw=True, request_number=3, keep_cache=True)
    assert [answer.outcome for answer in kept] == fresh
    assert again.outcome == fresh[-1]
    read = [answer.stats.prefilled_tokens for answer in kept]
    assert read[1] == 280 + len(" but less") - 256  # goes back to where the first prompt's last chunk began


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_an_interrupted_answer_leaves_a_state_to_go_on_from(shelf: Shelf, taken: int) -> None:
    prompt = prompt_of(90)
    with open_tiny(hybrid(shelf), sampling=WARM) as session:
        whole = answer_to(session, prompt, 30, raw=True, request_number=2)
        session.reset()
        ids = session.encode_prompt(prompt, system=None, raw=True)
        with closing(session.generate(ids, max_new_tokens=30, stop=(), request_number=2)) as deltas:
            for _ in range(taken):
                next(deltas)
        for _ in range(2):
            assert (
                answer_to(session, prompt, 30, raw=True, request_number=2, keep_cache=True).outcome
                == whole.outcome
            )


@pytest.mark.parametrize("threads", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_threads_change_no_token_between_both_arms(shelf: Shelf, threads: int) -> None:
    torch.set_num_threads(threads)
    with open_tiny(hybrid(shelf), memory={"resident_layers": 2}) as session:
        arms = [answer_to(session, prompt_of(120), 30, raw=True, plain=plain) for plain in (False, True)]
    assert arms[0].outcome == arms[1].outcome


def test_the_plan_counts_the_recurrent_state(shelf: Shelf) -> None:
    with open_tiny(hybrid(shelf)) as session:
        lines = {line.label: line.size_bytes for line in session.plan.lines}
        answer = Answer(session.generate(prompt_of(50), max_new_tokens=5))
    states = 4 * 4 * 16 * 32 * 4  # layers, and a state of float32 each
    assert lines["recurrent state"] > 4 * states  # committed, next and two snapshots
    assert answer.token_ids
