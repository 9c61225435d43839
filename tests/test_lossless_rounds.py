"""Real tiny models: an answer has the tokens of plain decoding alone, whoever is answered beside it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes_session
import pytest
import tiny_models
import torch
from fakes_session import Shelf, answer_to, open_tiny

from subspec_cli.decoding.engine import Answer, Engine, Request
from subspec_cli.decoding.text import AnswerText
from subspec_cli.modeling.kv_cache import KVCache, cache_for
from subspec_cli.session.session import Session

shelf = fakes_session.shelf
one_thread = tiny_models.one_thread
TEXTS = [
    "Rivers",
    "All work and no play makes a dull day. " * 8,
    "x",
    "Why is the sky blue?",
    "One two three one",
]
LIMITS = [40, 25, 60, 1, 33]
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


def cache_like(session: Session) -> KVCache:
    loaded = session.loaded
    return cache_for(
        loaded.math,
        context=loaded.kv.context,
        scratch=loaded.kv.capacity - loaded.kv.context,
        dtype=loaded.head.weight.dtype,
        device=loaded.head.weight.device,
    )


def request_of(session: Session, text: str, limit: int, number: int) -> Request:
    """As the session makes it."""
    prompt = session.encode_prompt(text, system=None, raw=False)
    begun = session.begin(prompt, request_number=number)
    stop = AnswerText(session.loaded.tokenizer, eos_ids=session.loaded.eos_ids, stop=(), max_new_tokens=limit)
    return Request(begun.prompt_ids, begun.sampler, limit, stop, begun.penalties)


def answered(engine: Engine, session: Session, chance: random.Random) -> dict[int, list[int]]:
    """Tokens of all texts, which come and go at random over three caches, some of them twice."""
    free, in_flight = [cache_like(session) for _ in range(3)], dict[int, Answer]()
    waiting, tokens = [*range(len(TEXTS)), *range(len(TEXTS))], dict[int, list[int]]()
    chance.shuffle(waiting)
    found = dict[int, list[int]]()
    while waiting or in_flight:
        while waiting and free and waiting[-1] not in in_flight:
            number = waiting.pop()
            request = request_of(session, TEXTS[number], LIMITS[number], number)
            in_flight[number], tokens[number] = engine.join(request, free.pop()), []
            if chance.random() < 0.5:
                break
        numbers = {id(answer): number for number, answer in in_flight.items()}
        for answer, output in engine.round(list(in_flight.values())):
            tokens[numbers[id(answer)]].extend(output.token_ids)
        for number, answer in list(in_flight.items()):
            if answer.has_ended:
                assert found.setdefault(number, tokens[number]) == tokens[number]
            elif chance.random() > 0.05:  # else its client has left
                continue
            else:
                waiting.insert(0, number)
            free.append(in_flight.pop(number).kv)
    return found


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "top_p": 0.95, "seed": 6}], ids=["greedy", "warm"]
)
@pytest.mark.parametrize("kind", MODELS)
def test_tokens_in_random_company_are_those_alone(shelf: Shelf, kind: str, sampling: dict[str, Any]) -> None:
    with open_tiny(MODELS[kind](shelf), sampling=sampling, memory={"context": 512}) as session:
        assert session.description.exactness == "exact"
        expected = {
            number: answer_to(session, text, limit, plain=True, request_number=number).token_ids
            for number, (text, limit) in enumerate(zip(TEXTS, LIMITS, strict=True))
        }
        for seed in range(3):
            assert answered(session._engines.speculative, session, random.Random(seed)) == expected
