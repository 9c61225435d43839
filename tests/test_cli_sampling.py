"""Sampling on the command line: the model's own settings, what is said of them, and the file of biases."""

from __future__ import annotations

import dataclasses

import pytest
from fakes_cli import FakeDescription, FakeSession, use_session

from subspec_cli.__main__ import main
from subspec_cli.cli.sampling_text import chat_sampling_line, sampling_words
from subspec_cli.config import Config, SamplingConfig

OWN = SamplingConfig(source="model", temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


@pytest.fixture
def configs(monkeypatch):
    """The settings that sessions are opened with; the model has sampling settings of its own."""
    return use_session(monkeypatch, FakeSession(description=FakeDescription(model_sampling=OWN)))


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (SamplingConfig(), "greedy"),
        (SamplingConfig(top_p=0.5, repetition_penalty=1.2), "greedy, rep 1.2"),
        (OWN, "T 0.7, top-p 0.8, top-k 20, rep 1.05"),
        (
            SamplingConfig(
                temperature=1.0,
                min_p=0.05,
                presence_penalty=0.3,
                frequency_penalty=-0.2,
                logit_bias=(("65", 1.0), ("the", 2.0)),
            ),
            "T 1, min-p 0.05, presence 0.3, frequency -0.2, bias on 2",
        ),
    ],
)
def test_words_for_how_tokens_are_chosen(sampling, words):
    assert sampling_words(sampling) == words


def test_a_chats_header_says_whose_settings_these_are():
    def line(sampling):
        return chat_sampling_line(FakeSession(description=FakeDescription(config=Config(sampling=sampling))))

    assert line(OWN) == "sampling model's own: T 0.7, top-p 0.8, top-k 20, rep 1.05"
    yours = dataclasses.replace(OWN, temperature=0.2, given=frozenset({"temperature", "seed"}))
    assert line(yours) == "sampling model's and yours: T 0.2, top-p 0.8, top-k 20, rep 1.05"
    assert line(SamplingConfig(source="greedy", temperature=0.2)) == "sampling T 0.2"


def test_a_chat_takes_the_models_own_settings_by_default_and_run_does_not(capsys, configs, monkeypatch):
    monkeypatch.setattr("subspec_cli.cli.chat.make_reader", lambda output: leave)
    assert main(["chat"]) == 0
    assert main(["chat", "--sampling", "greedy"]) == 0
    assert main(["run", "hello"]) == 0
    assert main(["run", "hello", "--sampling", "model", "--top-k", "3"]) == 0
    samplings = [config.sampling for config in configs]
    assert [sampling.source for sampling in samplings] == ["model", "greedy", None, "model"]
    assert samplings[0].given == frozenset(), "a chat's default is no wish of the user"
    assert samplings[3].given == {"source", "top_k"}


def leave():
    raise EOFError


def test_run_says_that_the_models_own_settings_are_not_used(capsys, configs):
    hint = "the model's own sampling, T 0.7, top-p 0.8, top-k 20, rep 1.05, is not used: --sampling model"
    assert main(["run", "hello"]) == 0
    assert hint in capsys.readouterr().err
    for flags in (["--sampling", "greedy"], ["--temperature", "0"], ["--top-p", "0.9"]):
        assert main(["run", "hello", *flags]) == 0
        assert "is not used" not in capsys.readouterr().err


def test_a_settings_file_may_choose_the_models_own(capsys, configs, tmp_path):
    (tmp_path / "subspec.toml").write_text(
        '[sampling]\nsampling = "model"\n[sampling.logit_bias]\nthe = -3\n'
    )
    assert main(["run", "hello"]) == 0
    assert configs[0].sampling.source == "model"
    assert configs[0].sampling.logit_bias == (("the", -3.0),)
    (tmp_path / "subspec.toml").write_text('[sampling]\nsampling = "hot"\n')
    assert main(["run", "hello"]) == 2
    assert 'sampling.sampling = "hot" must be model or greedy' in capsys.readouterr().err


def test_biases_come_from_a_file(capsys, configs, tmp_path):
    (tmp_path / "bias.json").write_text('{"65": 2.5, " the": -100, "ü": 1}')
    assert main(["run", "hello", "--logit-bias", "bias.json"]) == 0
    assert configs[0].sampling.logit_bias == (("65", 2.5), (" the", -100.0), ("ü", 1.0))
    assert configs[0].as_dict()["sampling"]["logit_bias"] == {"65": 2.5, " the": -100.0, "ü": 1.0}
    # As on the command line, and not added to them: the file's own biases are replaced.
    (tmp_path / "subspec.toml").write_text("[sampling.logit_bias]\n66 = -4\n")
    assert main(["run", "hello", "--logit-bias", "bias.json"]) == 0
    assert configs[1].sampling.logit_bias == configs[0].sampling.logit_bias


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"65": 100.5}', "the bias of '65' is 100.5, not a number from -100 to 100"),
        (b'{"65": NaN}', "the bias of '65' is nan, not a number"),
        (b'{"65": "2"}', "the bias of '65' is 2, not a number"),
        (b'{"65": true}', "the bias of '65' is True, not a number"),
        (b'{"": 1}', "a token is empty"),
        (b"[65]", "holds a list, expected a JSON object"),
        (b'{"65": 1, "65": 2}', "has the key '65' twice"),
        (b'{"65": 1,}', "is not JSON at byte 9"),
        (b'{"\xff": 1}', "is not UTF-8 at byte 2"),
        (None, "No such file or directory"),
    ],
)
def test_a_bad_bias_file_is_refused_by_name(capsys, configs, tmp_path, content, told):
    if content is not None:
        (tmp_path / "bias.json").write_bytes(content)
    for command in (["run", "hello"], ["chat"], ["bench", "sample"]):
        assert main([*command, "--logit-bias", "bias.json"]) == 2
        error = capsys.readouterr().err
        assert "--logit-bias bias.json" in error
        assert told in error
    assert configs == []
