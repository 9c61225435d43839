"""The public names of the package: five lines load a model and answer, as the README says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fakes_session import answer_to, open_tiny

import subspec_cli
from subspec_cli import Reporter, SubspecError, load
from subspec_cli.errors import UsageError

pytestmark = pytest.mark.usefixtures("attention_checked_once")

QUESTION = "What does os.path.join do?"
EXAMPLE = """\
from subspec_cli import load

with load("demo", memory_gib=1) as model:
    for piece in model.generate("What does os.path.join do?", seed=7):
        print(piece.text, end="")
"""


def indented(text: str) -> str:
    return "".join(f"    {line}".rstrip() + "\n" for line in text.splitlines())


@pytest.fixture
def directory(shelf):
    return shelf.model("qwen3", tied=False)


def opened(directory, **settings):
    return load(str(directory), memory_gib=1, device="cpu", resident_layers=0, **settings)


def said(pieces):
    return "".join(piece.text for piece in pieces)


def test_the_example_answers(directory, capsys, monkeypatch):
    """As written, with a tiny model in place of the demo."""
    monkeypatch.setattr(subspec_cli, "load", lambda _name, **how: opened(directory, max_new_tokens=12), False)
    exec(EXAMPLE, {})
    with opened(directory, max_new_tokens=12) as model:
        assert capsys.readouterr().out == said(model.generate(QUESTION, seed=7)) != ""


def test_the_example_is_the_documented_one():
    assert indented(EXAMPLE) in subspec_cli.__doc__
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    if "from subspec_cli import load" in readme:
        assert EXAMPLE in readme


def test_importing_loads_no_heavy_library():
    code = (
        "import sys, subspec_cli; from subspec_cli import load; "
        "print({'torch', 'transformers', 'numpy', 'optimum'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_public_name_is_there_and_no_other():
    assert all(getattr(subspec_cli, name) for name in subspec_cli.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = subspec_cli.nothing


@pytest.mark.parametrize("plain", [False, True])
def test_a_seed_gives_the_answer_of_a_run_with_that_seed(directory, plain):
    with open_tiny(directory, sampling={"temperature": 1.5, "seed": 7}) as session:
        expected = answer_to(session, QUESTION, 20).text
    with opened(directory, temperature=1.5, max_new_tokens=20) as model:
        _ = said(model.generate("Something else"))
        assert said(model.generate(QUESTION, seed=7, plain=plain)) == expected
        assert said(model.generate(QUESTION, seed=8, plain=plain)) != expected
        assert said(model.generate(QUESTION, seed=7, plain=plain)) == expected


def test_pieces_have_text_tokens_and_figures(directory):
    with opened(directory, max_new_tokens=9) as model:
        pieces = list(model.generate(QUESTION))
        assert sum(len(piece.token_ids) for piece in pieces) == pieces[-1].stats.new_tokens == 9
        assert pieces[-1].finish_reason == "length"
        assert model.plan.streamed_layers == 3
        ids = model.encode_prompt(QUESTION, system=None, raw=False)
        assert said(model.generate(ids)) == said(pieces)


def test_a_chat_takes_the_settings_system_message(directory):
    with opened(directory, system="Be brief.", max_new_tokens=5) as model:
        chat = model.chat()
        first, second = list(chat.ask("Hello")), list(chat.ask("And?", seed=3))
        explicit = list(model.chat("Be brief.").ask("Hello"))
        other = list(model.chat("Be long.").ask("Hello"))
    assert first[-1].stats.prompt_tokens == explicit[-1].stats.prompt_tokens
    assert said(first) == said(explicit)
    assert other[-1].stats.prompt_tokens != first[-1].stats.prompt_tokens + 1
    assert second[-1].stats.prompt_tokens > first[-1].stats.prompt_tokens


def test_progress_and_notes_go_to_the_reporter(directory):
    doing: list[str] = []
    opened(directory, reporter=Reporter(doing.append)).close()
    assert "loading the tokenizer" in doing


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"colour": 3}, "colour is no setting"),
        ({"context": 3}, "--context"),
        ({"bits": 2}, "2 bits|2-bit|--bits 2"),
    ],
)
def test_what_cannot_be_is_an_error_of_ours(directory, settings, told):
    with pytest.raises(SubspecError, match=told) as caught:
        opened(directory, **settings)
    assert isinstance(caught.value, UsageError)


def test_another_drafter_changes_no_token(directory):
    """The seam for experiments: what is drafted decides the speed alone."""
    from subspec_cli.decoding.drafter import PlainDrafter

    with opened(directory, temperature=1.5, max_new_tokens=20) as model:
        expected = list(model.generate(QUESTION, seed=7))
        found = list(model.with_drafter(PlainDrafter()).generate(QUESTION, seed=7))
    assert said(found) == said(expected)
    assert expected[-1].stats.drafted_tokens > found[-1].stats.drafted_tokens == 0
