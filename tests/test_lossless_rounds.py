"""Real tiny models: an answer has the tokens of plain decoding alone, whoever is answered beside it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fakes_session
import numpy as np
import pytest
import tiny_models
import torch
from fakes_session import Shelf, answer_to, open_tiny

from subspec_cli.config import SamplingConfig
from subspec_cli.decoding.logprobs import token_logprobs
from subspec_cli.session.answer import BegunAnswer
from subspec_cli.session.rounds import AnswerInFlight, Rounds
from subspec_cli.session.session import Session

shelf = fakes_session.shelf
one_thread = tiny_models.one_thread
MODELS: dict[str, Callable[[Shelf], Path]] = {
    "qwen2": lambda shelf: shelf.model(
        "qwen2",
        dtype=torch.bfloat16,
        tied=False,
        use_sliding_window=True,
        sliding_window=24,
        max_window_layers=1,
    ),
    "hybrid": lambda shelf: shelf.model(
        "qwen3_5_text",
        bits=8,
        tied=False,
        layers=5,
        head_dim=32,
        linear_key_head_dim=16,
        linear_value_head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        max_position_embeddings=2048,
    ),
}
GREEDY, WARM = SamplingConfig(), SamplingConfig(temperature=1.0, top_p=0.95)


class Asked(NamedTuple):
    text: str
    limit: int
    sampling: SamplingConfig = GREEDY
    seed: int = 0
    choice: int = 0
    stop: tuple[str, ...] = ()


ASKED = [
    Asked("Rivers", 20),
    Asked("All work and no play makes a dull day. " * 8, 13, WARM, 6),
    Asked("x", 30, SamplingConfig(temperature=0.7, top_k=20, repetition_penalty=1.3), 2),
    Asked("Why is the sky blue?", 1, WARM, 6),
    Asked("One two three one", 17, WARM, 6, 1),
    Asked("One two three one", 17, SamplingConfig(frequency_penalty=0.5, logit_bias=(("65", 3.0),))),
    Asked("Rivers", 20, stop=("e",)),
]


def begin(session: Session, asked: Asked) -> BegunAnswer:
    prompt = session.encode_prompt(asked.text, system=None, raw=False)
    return session.begin_by(
        prompt, asked.sampling, seed=asked.seed, choice=asked.choice, stop=asked.stop, logprobs=2
    )


def alone(session: Session, asked: Asked) -> tuple[list[int], str]:
    """The tokens and the text of plain decoding."""
    session.reset()
    begun = begin(session, asked)
    deltas = list(session.go_on(begun, max_new_tokens=asked.limit, plain=True))
    return begun.token_ids, "".join(delta.text for delta in deltas)


class _Interrupted(Exception):
    pass


def answered(session: Session, chance: random.Random) -> dict[int, tuple[list[int], str]]:
    """Tokens and texts of all, which come and go at random over three caches, some of them twice.

    Some leave in the middle and come again; some rounds are interrupted.
    """
    rounds = session.rounds()
    waiting, texts = [*range(len(ASKED)), *range(len(ASKED))], dict[AnswerInFlight, str]()
    chance.shuffle(waiting)
    numbers, found = dict[AnswerInFlight, int](), dict[int, tuple[list[int], str]]()
    while waiting or rounds.in_flight:
        while waiting and rounds.free:
            number = waiting.pop()
            answer = rounds.join(begin(session, ASKED[number]), ASKED[number].limit)
            numbers[answer], texts[answer] = number, ""
            if chance.random() < 0.5:
                break
        for answer in one_round(rounds, texts, chance):
            outcome = answer.begun.token_ids, texts[answer]
            assert found.setdefault(numbers[answer], outcome) == outcome
        for answer in list(rounds.in_flight):
            if chance.random() < 0.05:  # its client has left
                waiting.insert(0, numbers[answer])
                rounds.leave(answer)
    assert rounds.free == 3
    return found


def one_round(
    rounds: Rounds, texts: dict[AnswerInFlight, str], chance: random.Random
) -> list[AnswerInFlight]:
    """Run a round, which may be interrupted; return the answers that ended."""
    layers = iter(range(chance.randrange(1, 12)))

    def on_layer() -> None:
        if next(layers, None) is None and chance.random() < 0.1:
            raise _Interrupted

    ended = []
    try:
        for answer, delta in rounds.round(on_layer):
            texts[answer] += delta.text
            assert [each.token_id for each in delta.logprobs] == list(delta.token_ids)
            if delta.finish_reason is not None:
                ended.append(answer)
    except _Interrupted:
        pass
    return ended


@pytest.mark.parametrize("kind", MODELS)
def test_an_answer_in_random_company_is_the_one_alone(shelf: Shelf, kind: str) -> None:
    with open_tiny(MODELS[kind](shelf), memory={"context": 512}, parallel=3) as session:
        assert session.description.exactness == "exact"
        assert len(session.loaded.caches) == 3
        expected = {number: alone(session, asked) for number, asked in enumerate(ASKED)}
        for seed in range(3):
            assert answered(session, random.Random(seed)) == expected


def test_a_prompt_goes_to_the_cache_that_holds_most_of_it(shelf: Shelf) -> None:
    texts = ["Rivers run. " * 20, "Mountains stand. " * 20]
    with open_tiny(MODELS["qwen2"](shelf), memory={"context": 512}, parallel=2) as session:
        rounds = session.rounds()
        reused = []
        for text in (*texts, *(text + "Why?" for text in texts)):
            prompt = session.encode_prompt(text, system=None, raw=True)
            answer = rounds.join(session.begin_by(prompt, GREEDY, seed=0), 3)
            reused.append(answer.answer.reused / len(prompt))
            while rounds.in_flight:
                list(rounds.round())
        assert reused[:2] == [0, 0]
        assert min(reused[2:]) > 0.9


def test_an_answer_that_leaves_early_frees_its_place(shelf: Shelf) -> None:
    with open_tiny(MODELS["qwen2"](shelf), memory={"context": 512}, parallel=1) as session:
        rounds = session.rounds()
        first = rounds.join(begin(session, ASKED[0]), 40)
        list(rounds.round())
        assert rounds.free == 0
        rounds.leave(first)
        rounds.leave(first)
        assert rounds.free == 1


def test_a_seed_gives_the_same_answer_beside_others_and_by_generate(shelf: Shelf) -> None:
    with open_tiny(MODELS["qwen2"](shelf), sampling={"temperature": 1.0}, parallel=2) as session:
        expected = answer_to(session, "Rivers", 30, seed=11).token_ids
        rounds = session.rounds()
        warm = SamplingConfig(temperature=1.0)
        asked = [rounds.join(begin(session, Asked("Rivers", 30, warm, 11, n)), 30) for n in range(2)]
        while rounds.in_flight:
            list(rounds.round())
        assert asked[0].begun.token_ids == expected
        assert asked[1].begun.token_ids != expected, "another choice has other noise"


def test_log_probabilities_are_those_of_the_raw_logits() -> None:
    logits = np.random.default_rng(5).normal(0, 4, 50)
    logits[[7, 31]] = logits.max() + 1  # equal ones in the order of their ids
    expected = torch.log_softmax(torch.from_numpy(logits), dim=0)
    found = token_logprobs(logits, 12, 3)
    assert found.logprob == pytest.approx(float(expected[12]), abs=1e-12)
    assert [token for token, _ in found.top[:2]] == [7, 31]
    assert [value for _, value in found.top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-12)
    assert token_logprobs(logits, 12, 0).top == ()
    assert len(token_logprobs(logits, 12, 99).top) == 50


def test_log_probabilities_do_not_depend_on_speculation_or_penalties(shelf: Shelf) -> None:
    plain_rows: list[Any] = []
    with open_tiny(MODELS["qwen2"](shelf), memory={"context": 512}, parallel=2) as session:
        for plain in (True, False):
            session.reset()
            sampling = SamplingConfig(temperature=0.8, repetition_penalty=1.5)
            prompt = session.encode_prompt("Rivers", system=None, raw=False)
            begun = session.begin_by(prompt, sampling, seed=3, logprobs=4)
            found = [
                each
                for delta in session.go_on(begun, max_new_tokens=20, plain=plain)
                for each in delta.logprobs
            ]
            plain_rows = plain_rows or found
            assert found == plain_rows
            assert all(each.logprob <= each.top[0][1] for each in found)
