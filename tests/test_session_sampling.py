"""Where sampling comes from in a session: flags, the model's own files, biases by token or text."""

from __future__ import annotations

import json

import pytest
from fakes_session import answer_to, open_tiny

from subspec_cli.checkpoint.model_sampling import read_model_sampling
from subspec_cli.config import Config, SamplingConfig
from subspec_cli.errors import UnsupportedModelError, UsageError
from subspec_cli.session.sampling_source import sampling_notes, with_model_sampling
from subspec_cli.session.token_biases import token_biases

SHIPPED = {
    "do_sample": True,
    "temperature": 0.9,
    "top_p": 0.95,
    "top_k": 40,
    "repetition_penalty": 1.2,
    "eos_token_id": 258,
}


@pytest.fixture
def say(shelf):
    """A prepared model whose generation_config.json says this."""
    model = shelf.model("qwen2", layers=2)
    file = model / "generation_config.json"
    before = file.read_bytes()

    def write(**content):
        file.write_text(json.dumps(content))
        return model

    yield write
    file.write_bytes(before)


def test_the_models_own_values_are_used_when_asked_for_and_flags_win(say):
    model = say(**SHIPPED)
    with open_tiny(model) as session:
        assert session.description.config.sampling == SamplingConfig()
        assert session.description.model_sampling.top_k == 40
    with open_tiny(model, sampling={"sampling": "model", "top_p": 0.5, "seed": 3}) as session:
        used = session.description.config.sampling
        assert used == SamplingConfig(
            source="model", temperature=0.9, top_p=0.5, top_k=40, repetition_penalty=1.2, seed=3
        )
        arms = [
            answer_to(session, "aaaa bbbb aaaa bbbb", 40, plain=plain, request_number=1)
            for plain in (False, True)
        ]
        by_hand = {name: getattr(used, name) for name in ("temperature", "top_p", "top_k", "seed")}
    with open_tiny(model, sampling={**by_hand, "repetition_penalty": 1.2}) as session:
        arms.append(answer_to(session, "aaaa bbbb aaaa bbbb", 40, request_number=1))
    assert arms[0].outcome == arms[1].outcome == arms[2].outcome


def test_what_cannot_be_computed_is_refused_if_asked_for_and_noted_in_a_chat(say):
    model = say(**SHIPPED, no_repeat_ngram_size=3)
    with pytest.raises(
        UnsupportedModelError, match=r"generation_config\.json asks for no_repeat_ngram_size 3"
    ) as raised:
        open_tiny(model, sampling={"sampling": "model"})
    assert raised.value.hint.endswith("--temperature 0.9 --top-p 0.95 --top-k 40 --repetition-penalty 1.2")
    with open_tiny(model, sampling={"temperature": 1.0}) as session:
        assert session.description.notes == ()
    notes = sampling_notes(SamplingConfig(source="model"), read_model_sampling({}, {"min_length": 4}))
    assert notes == ("generation_config.json also asks for min_length 4, which is not computed here",)
    config = Config(sampling=SamplingConfig(source="model"))  # as a chat makes it, nothing given
    filled = with_model_sampling(config, read_model_sampling({}, {"min_length": 4, "do_sample": True}))
    assert (filled.sampling.temperature, filled.sampling.top_k) == (1.0, 50)


def test_a_broken_value_is_refused_before_anything_is_loaded_and_only_if_it_is_used(say, monkeypatch):
    model = say(**SHIPPED | {"temperature": -1})
    with open_tiny(model) as session:
        assert session.description.model_sampling is None
    monkeypatch.setattr("subspec_cli.session.build.build_session", None)
    with pytest.raises(UnsupportedModelError, match=r"temperature in generation_config\.json is -1"):
        open_tiny(model, sampling={"sampling": "model"})


class Tokenizer:
    """A token for each character, but one for `the`."""

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return [50] if text == "the" else [ord(character) for character in text]


def test_biases_are_named_by_id_or_by_a_text_that_is_one_token():
    written = [("65", 1.0), ("the", -2.0), ("7", 3.0), ("B", 4.0), ("²", 5.0)]
    assert token_biases(written, Tokenizer(), 300) == ((65, 1.0), (50, -2.0), (7, 3.0), (66, 4.0), (178, 5.0))


@pytest.mark.parametrize(
    ("written", "told", "hint"),
    [
        ([("300", 1.0)], "the token 300, the model has 300", "correct the id"),
        ([("they", 1.0)], "'they' is 4 tokens, not one", "here 116, 104, 101, 121"),
        ([("\u0000" * 9, 1.0)], "is 9 tokens, not one", "0, 0 …"),
        ([("A", 1.0), ("65", 2.0)], "the token 65 twice, once as '65'", "leave one"),
    ],
)
def test_a_bias_of_no_token_is_refused(written, told, hint):
    with pytest.raises(UsageError, match=told) as raised:
        token_biases(written, Tokenizer(), 300)
    assert hint in raised.value.hint


def test_a_session_takes_biases_by_text(say):
    model = say(eos_token_id=258)
    with open_tiny(model, sampling={"logit_bias": {"Q": 100}}) as session:
        assert set(answer_to(session, "Hello", 6).text) == {"Q"}
        session.set_sampling(SamplingConfig(logit_bias=(("Z", 100.0),)))
        assert set(answer_to(session, "Hello", 6).text) == {"Z"}
    with pytest.raises(UsageError, match="names the token 9999, the model has"):
        open_tiny(model, sampling={"logit_bias": {"9999": 1}})
