"""A prompt that is known before the model is loaded: counted first, planned for, and read with progress."""

import json

import pytest
from fakes_cli import pipe_in
from fakes_session import Answer, answer_to, open_tiny

from subspec_cli.__main__ import main
from subspec_cli.errors import PromptRefusedError, UsageError
from subspec_cli.limits import PREFILL_CHUNK
from subspec_cli.metrics import PrefillProgress
from subspec_cli.planning.plan import fastest_plan
from subspec_cli.planning.request import WantedTokens
from subspec_cli.planning.search import LayoutSearch
from subspec_cli.reporter import Reporter
from subspec_cli.session import build, opening
from subspec_cli.units import GIB


@pytest.fixture
def model(shelf):
    return shelf.model("qwen3", tied=False)


def counting(prompt, answer):
    return lambda tokenizer: WantedTokens(len(tokenizer.encode_prompt(prompt, system=None, raw=True)), answer)


def opened(model, prompt, answer=20, **flags):
    return open_tiny(model, count=counting(prompt, answer), **flags)


def refuse_loading(monkeypatch):
    def fails(*args, **how):
        raise AssertionError("weights were loaded, or the machine was timed")

    monkeypatch.setattr(build.Loader, "load", fails)
    monkeypatch.setattr("subspec_cli.session.machine_costs.probe_in_subprocess", fails)


# --- the context fits the prompt --------------------------------------------------------------------------------


def test_the_context_is_made_for_the_prompt_and_the_answer_is_the_same(model):
    prompt = "Tell me of rivers. " * 10
    with open_tiny(model) as session:
        expected = answer_to(session, prompt, 20, raw=True).outcome
    with opened(model, prompt) as session:
        assert session.description.context_tokens == 256
        assert session.description.notes == ()
        assert answer_to(session, prompt, 20, raw=True).outcome == expected


def test_the_meter_starts_before_the_tokenizer_and_the_plan_follows_both(model, monkeypatch):
    order = []

    def noting(name):
        original = getattr(build, name)

        def noted(*args, **how):
            order.append(name)
            return original(*args, **how)

        monkeypatch.setattr(build, name, noted)

    for name in ("Loader", "plan_opening", "ModelTokenizer", "MemoryMeter"):
        noting(name)
    opened(model, "Hello").close()
    assert order == ["MemoryMeter", "ModelTokenizer", "plan_opening", "Loader"]


def test_a_prompt_longer_than_the_model_is_refused_before_anything_is_loaded(model, monkeypatch):
    refuse_loading(monkeypatch)
    with pytest.raises(UsageError, match="the prompt has 600 tokens, the model was made for 512 positions"):
        opened(model, "x" * 600)


def test_a_given_context_wins_and_a_prompt_beyond_it_is_refused_first(model, monkeypatch):
    with opened(model, "x" * 90, memory={"context": 128}) as session:
        assert session.description.context_tokens == 128
    refuse_loading(monkeypatch)
    with pytest.raises(UsageError, match="the prompt has 128 tokens, --context 128 holds 128") as caught:
        opened(model, "x" * 128, memory={"context": 128})
    assert "--context 192" in caught.value.hint


@pytest.mark.parametrize(
    ("memory", "limit"),
    [({}, "the model, made for 512 positions, leaves 12"), ({"context": 510}, "--context 510 leaves 10")],
)
def test_an_answer_that_is_bounded_is_told(model, memory, limit):
    notes = []
    prompt = "x" * 500
    with opened(model, prompt, memory=memory, reporter=Reporter(note=notes.append)) as session:
        room = session.description.context_tokens - 500
        answer = answer_to(session, prompt, 20, raw=True)
    assert notes == [f"the prompt has 500 tokens, so {limit} for the answer, not 20"]
    assert tuple(notes) == session.description.notes
    assert len(answer.token_ids) == room


def test_a_small_budget_bounds_the_answer_before_it_refuses_the_prompt(model, monkeypatch):
    seen = []

    def noted(requests):
        seen.append(LayoutSearch(requests[0]))
        return fastest_plan(requests)

    monkeypatch.setattr(opening, "fastest_plan", noted)
    opened(model, "x" * 300, 212).close()
    budget_bytes = seen[0].total_bytes(seen[0].front[0], 448)
    with opened(model, "x" * 300, 212, memory={"vram_gb": budget_bytes / GIB}) as session:
        (note,) = session.description.notes
        assert session.plan.drafts
        assert session.plan.context == 448
        assert len(answer_to(session, "x" * 300, 212, raw=True).token_ids) == 148
    assert "so the budget, which holds 448 tokens, leaves 148 for the answer, not 212" in note


def test_a_piped_document_needs_no_flags(model, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    pipe_in(monkeypatch, b"A line of a long document.\n" * 15)
    argv = ["run", "--model", str(model), "--device", "cpu", "--max-new-tokens", "9", "--json"]
    assert main([*argv, "--memory-gb", "1", "--resident-layers", "0"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["prompt_tokens"] > 400
    assert document["plan"]["context"] == -(-(document["prompt_tokens"] + 9) // 64) * 64
    assert "context 448 tokens" in captured.err
    assert "reading the prompt" not in captured.err


# --- chat templates ---------------------------------------------------------------------------------------------


@pytest.fixture
def templated(shelf):
    """Give a prepared model a chat template of the test's choice."""
    directory = shelf.model("qwen3", tied=False, layers=1)
    path = directory / "tokenizer_config.json"

    def give(template):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
        return directory

    return give


REFUSED = {
    "{% if %}": "the chat template is broken: line 1: Expected an expression",
    "{{ nobody.name }}": "the chat template is broken: 'nobody' is undefined",
    "{% if false %}{{ messages }}{% endif %}": "the chat template gives an empty text",
    "{{ ('a' * 3000000000) | length }}": "the chat template takes too much memory: more than 128.0 MiB",
    "{{ 'a' * 20000000 }}": "the chat template gives a text of more than 16.0 MiB",
    "{{ raise_exception('no') }}": "the chat template refuses this conversation: no",
}


@pytest.mark.parametrize("chats", [False, True])
@pytest.mark.parametrize("template", REFUSED)
def test_a_template_that_cannot_be_used_is_refused_before_weights_are_read(
    templated, template, chats, monkeypatch, capsys, tmp_path
):
    refuse_loading(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    argv = ["run", "--model", str(templated(template)), "--device", "cpu", "--memory-gb", "0.3"]
    if chats:
        monkeypatch.setattr("subspec_cli.cli.run.read_prompt", lambda *how: None)
    else:
        argv.append("hi")
    assert main(argv) == 3
    captured = capsys.readouterr()
    *_, said, hint = captured.err.splitlines()
    assert said.startswith(f"subspec: error: {REFUSED[template]}")
    assert "--raw" in hint
    assert captured.out == ""


def test_a_template_is_not_tried_where_it_is_not_used(templated):
    directory = templated("{% if %}")
    with opened(directory, "Hello") as session:  # counted and asked without the template
        assert answer_to(session, "Hello", 2, raw=True).token_ids
    with open_tiny(directory) as session:  # and a session of the API may get token ids only
        assert answer_to(session, "Hello", 2, raw=True).token_ids


def test_a_template_that_only_refuses_a_system_message_is_no_obstacle(templated):
    directory = templated(
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ message.content }}{% endfor %}"
    )
    with open_tiny(directory) as session:
        assert list(session.chat().ask("Hello", max_new_tokens=2))
        with pytest.raises(PromptRefusedError, match="no system"):
            list(session.chat("Be brief.").ask("Hello", max_new_tokens=2))


def test_a_message_that_the_template_refuses_leaves_the_conversation_as_it_was(templated):
    directory = templated(
        "{% for message in messages %}{% if 'apple' in message.content %}{{ raise_exception('no apples') }}"
        "{% endif %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    )
    with open_tiny(directory) as session:
        chat = session.chat()
        Answer(chat.ask("Pears?", max_new_tokens=3, stop=()))
        before = chat.messages
        with pytest.raises(PromptRefusedError, match="refuses this conversation: no apples"):
            Answer(chat.ask("An apple?", max_new_tokens=3, stop=()))
        assert chat.messages == before
        Answer(chat.ask("Plums?", max_new_tokens=3, stop=()))
        assert [message["content"] for message in chat.messages[::2]] == ["Pears?", "Plums?"]


# --- progress ---------------------------------------------------------------------------------------------------


def test_progress_of_a_prompt_comes_through_the_api(model):
    told = []
    with open_tiny(model) as session:
        ids = session.encode_prompt("x" * (PREFILL_CHUNK + 40), system=None, raw=True)
        Answer(session.generate(ids, max_new_tokens=2, stop=(), on_prefill=told.append))
        layers = session.loaded.math.geometry.layers
        assert [(item.done_tokens, item.tokens) for item in told] == [
            (pytest.approx(len(ids) * (layer + 1) / layers), len(ids)) for layer in range(layers)
        ]
        assert all(isinstance(item, PrefillProgress) and item.elapsed_s > 0 for item in told)
        told.clear()
        Answer(session.chat(None).ask("Hello", max_new_tokens=2, stop=(), on_prefill=told.append))
        assert told[-1].done_tokens == told[-1].tokens > 0


def test_ctrl_c_while_the_prompt_is_read_leaves_a_session_that_answers(model):
    def interrupt(progress):
        raise KeyboardInterrupt

    with open_tiny(model) as session:
        expected = answer_to(session, "Hello", 8).outcome
        ids = session.encode_prompt("x" * (PREFILL_CHUNK + 40), system=None, raw=True)
        with pytest.raises(KeyboardInterrupt):
            next(session.generate(ids, max_new_tokens=2, stop=(), on_prefill=interrupt))
        assert session.loaded.kv.committed == 0
        assert answer_to(session, "Hello", 8, keep_cache=True).outcome == expected
