"""One session, many answers: noise, stops, context, chat turns and interruptions."""

import shutil
from dataclasses import replace

import pytest
import torch
from fakes import collect
from fakes_session import Answer, answer_to, open_tiny, prepare_quietly
from tiny_models import EOS_ID

from subspec_cli.config import SamplingConfig
from subspec_cli.decoding.sampler import derived_seed
from subspec_cli.errors import ExitCode, IntegrityError, UsageError
from subspec_cli.modeling.decoder import TargetDecoder

TALKATIVE = {"temperature": 1.5, "seed": 3}
PROMPT = "Tell me of rivers"


@pytest.fixture
def model(shelf):
    return shelf.model("qwen3", tied=False)


@pytest.fixture
def session(model):
    with open_tiny(model, memory={"context": 160}) as session:
        yield session


@pytest.fixture
def sampling(model):
    with open_tiny(model, sampling=TALKATIVE) as session:
        yield session


def asked(chat, text, limit=12, **how):
    return Answer(chat.ask(text, **({"max_new_tokens": limit, "stop": ()} | how)))


def full_prompt(session, messages):
    """Number of prompt tokens of a conversation given as (role, text) pairs."""
    return len(session.encode_messages([{"role": role, "content": text} for role, text in messages]))


# --- noise ------------------------------------------------------------------------------------------------------


def test_each_request_has_noise_of_its_own(sampling):
    """Trap 1: the same prompt at the same positions, asked again, is another draw."""
    answers = [answer_to(sampling, PROMPT, 16) for _ in range(4)]
    assert len({tuple(answer.token_ids) for answer in answers}) == 4


def test_a_named_request_repeats_its_answer(sampling):
    first = answer_to(sampling, PROMPT, 16, request_number=5)
    assert answer_to(sampling, PROMPT, 16, request_number=6).token_ids != first.token_ids
    assert answer_to(sampling, PROMPT, 16, request_number=5).outcome == first.outcome
    assert answer_to(sampling, PROMPT, 16, request_number=5, plain=True).outcome == first.outcome


def test_a_number_that_was_named_is_not_drawn_again(sampling):
    first = answer_to(sampling, PROMPT, 16, request_number=9)
    assert (
        answer_to(sampling, PROMPT, 16).outcome == answer_to(sampling, PROMPT, 16, request_number=10).outcome
    )
    assert first.token_ids != answer_to(sampling, PROMPT, 16, request_number=10).token_ids


def test_a_reset_chat_draws_anew(sampling):
    chat, answers = sampling.chat(None), []
    for _ in range(3):
        answers.append(asked(chat, PROMPT, 16))
        chat.reset()
    assert {answer.stats.prefilled_tokens for answer in answers} == {answers[0].stats.prompt_tokens}
    assert len({tuple(answer.token_ids) for answer in answers}) == 3


def test_the_same_seed_gives_the_same_answers(model, sampling):
    expected = [answer_to(sampling, PROMPT, 16).outcome for _ in range(2)]
    with open_tiny(model, sampling=TALKATIVE) as again:
        assert [answer_to(again, PROMPT, 16).outcome for _ in range(2)] == expected
    with open_tiny(model, sampling=TALKATIVE | {"seed": 4}) as other:
        assert answer_to(other, PROMPT, 16).outcome != expected[0]


def test_a_fresh_seed_is_shown_and_can_be_given_again(model):
    seeds, outcomes = [], []
    for _ in range(2):
        with open_tiny(model, sampling={"temperature": 1.5}) as session:
            assert session.description.fresh_seed
            seeds.append(session.description.seed)
            outcomes.append(answer_to(session, PROMPT, 16).outcome)
    assert seeds[0] != seeds[1]
    assert max(seeds) < 2**53  # what readers of JSON keep of a number
    assert outcomes[0] != outcomes[1]
    with open_tiny(model, sampling={"temperature": 1.5, "seed": seeds[0]}) as session:
        assert (session.description.seed, session.description.fresh_seed) == (seeds[0], False)
        assert answer_to(session, PROMPT, 16).outcome == outcomes[0]


# --- endings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True])
def test_a_stop_string_ends_the_answer_and_is_not_shown(sampling, plain):
    whole = answer_to(sampling, PROMPT, 30, request_number=1)
    assert whole.finish_reason == "length"
    for at in range(2, len(whole.text) - 3, 3):
        stop = whole.text[at : at + 3]
        answer = answer_to(sampling, PROMPT, 30, request_number=1, stop=(stop, "never"), plain=plain)
        assert answer.finish_reason == "stop"
        assert answer.text == whole.text[: whole.text.index(stop)]
        assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]


def test_deltas_are_the_text_and_the_tokens(sampling):
    answer = answer_to(sampling, PROMPT, 30, request_number=1)
    assert len(answer.token_ids) == answer.stats.new_tokens == 30
    assert [delta.finish_reason for delta in answer.deltas[:-1]] == [None] * (len(answer.deltas) - 1)
    assert answer.text == sampling.loaded.tokenizer.decode(answer.token_ids)


@pytest.mark.parametrize("plain", [False, True])
def test_an_answer_ends_where_the_context_does(session, plain):
    room = 20
    ids = session.encode_prompt("x" * (160 - room), system=None, raw=True)
    session.reset()
    answer = Answer(session.generate(ids, max_new_tokens=500, stop=(), plain=plain))
    assert len(answer.token_ids) == room
    assert answer.finish_reason == "length"


@pytest.mark.parametrize(
    ("length", "told"), [(160, "the prompt has 160 tokens, the context holds 160"), (0, "empty")]
)
def test_a_prompt_without_room_is_refused(session, length, told):
    ids = session.encode_prompt("x" * length, system=None, raw=True)
    with pytest.raises(UsageError, match=told) as caught:
        next(session.generate(ids, max_new_tokens=5, stop=()))
    assert caught.value.exit_code == ExitCode.USAGE
    assert len(answer_to(session, PROMPT, 5).token_ids) == 5


def test_a_prompt_of_all_but_one_row_gets_one_token(session):
    ids = session.encode_prompt("x" * 159, system=None, raw=True)
    assert len(Answer(session.generate(ids, max_new_tokens=5, stop=())).token_ids) == 1


def test_raw_prompts_bypass_the_template(session):
    assert bytes(session.encode_prompt("héllo", system=None, raw=True)) == "héllo".encode()
    templated = session.encode_prompt("héllo", system="Be brief.", raw=False)
    assert templated == session.encode_messages(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "héllo"}]
    )
    assert len(templated) > 30


def test_sampling_set_later_is_the_sampling_given_at_first(model, sampling):
    expected = [answer_to(sampling, PROMPT, 16, request_number=number).outcome for number in range(2)]
    settings = sampling.description.config.sampling
    with open_tiny(model) as other:
        greedy = answer_to(other, PROMPT, 16).outcome
        other.set_sampling(settings)
        assert [answer_to(other, PROMPT, 16).outcome for _ in range(2)] == expected
        other.set_sampling(SamplingConfig())
        assert answer_to(other, PROMPT, 16).outcome == greedy


def test_a_chat_goes_on_from_another_conversation(session):
    chat = session.chat("Be brief.")
    first = asked(chat, "Hello")
    other = session.chat(None)
    other.replace_messages(chat.messages)
    other.set_system("Be brief.")
    assert asked(other, "And then?").outcome == asked(chat, "And then?").outcome
    assert other.messages[1]["content"] == first.text


# --- chat -------------------------------------------------------------------------------------------------------


def test_a_turn_prefills_only_what_is_new(session):
    chat = session.chat("Be brief.")
    first = asked(chat, "Hello")
    second = asked(chat, "And then?")
    said = [("system", "Be brief."), ("user", "Hello"), ("assistant", first.text), ("user", "And then?")]
    assert second.stats.prompt_tokens == full_prompt(session, said)
    assert second.stats.prefilled_tokens <= second.stats.prompt_tokens - first.stats.prompt_tokens
    session.reset()
    ids = session.encode_messages([{"role": role, "content": text} for role, text in said])
    fresh = Answer(session.generate(ids, max_new_tokens=12, stop=()))
    assert fresh.stats.prefilled_tokens == fresh.stats.prompt_tokens
    assert fresh.outcome == second.outcome


def test_an_interrupted_turn_keeps_what_was_said(session):
    chat = session.chat(None)
    deltas = chat.ask("Hello", max_new_tokens=40, stop=())
    heard = "".join(next(deltas).text for _ in range(3))
    deltas.close()
    second = asked(chat, "Go on")
    said = [("user", "Hello"), ("assistant", heard), ("user", "Go on")]
    assert second.stats.prompt_tokens == full_prompt(session, said)


def test_ctrl_c_inside_a_pass_keeps_what_was_said(session, monkeypatch):
    chat, layers, passes = session.chat(None), TargetDecoder.layers, []

    def interrupted(target, flow):
        passes.append(1)
        for layer in layers(target, flow):
            if len(passes) == 4:
                raise KeyboardInterrupt
            yield layer

    monkeypatch.setattr(TargetDecoder, "layers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        asked(chat, "Hello", 90)
    monkeypatch.undo()
    second = asked(chat, "Go on")
    said = [message for message in chat.messages if message["role"] == "assistant"]
    assert len(said) == 2
    session.reset()
    ids = session.encode_messages(chat.messages[:-1])
    assert len(ids) == second.stats.prompt_tokens
    assert Answer(session.generate(ids, max_new_tokens=12, stop=())).outcome == second.outcome


def test_an_interruption_before_the_first_token_leaves_the_chat_as_it_was(session, monkeypatch):
    chat = session.chat(None)
    first = asked(chat, "Hello")

    def interrupted(*args, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(TargetDecoder, "begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        asked(chat, "Never heard")
    monkeypatch.undo()
    said = [("user", "Hello"), ("assistant", first.text), ("user", "Why?")]
    assert asked(chat, "Why?").stats.prompt_tokens == full_prompt(session, said)


def test_a_prompt_too_long_leaves_the_chat_usable(session):
    chat = session.chat(None)
    first = asked(chat, "Hello")
    with pytest.raises(UsageError, match="context holds 160"):
        asked(chat, "x" * 200)
    second = asked(chat, "And?", 4)
    said = [("user", "Hello"), ("assistant", first.text), ("user", "And?")]
    assert second.stats.prompt_tokens == full_prompt(session, said)
    assert second.stats.prefilled_tokens < second.stats.prompt_tokens


def test_a_full_chat_goes_on_after_a_reset(session):
    chat = session.chat(None)
    asked(chat, "Tell me more of it", 20)
    asked(chat, "Tell me more of it", 20)
    with pytest.raises(UsageError, match="the context holds 160") as caught:
        asked(chat, "Tell me more of it" * 5, 20)
    assert "/reset" in caught.value.hint
    chat.reset()
    answer = asked(chat, "Hello")
    assert (
        answer.stats.prompt_tokens
        == answer.stats.prefilled_tokens
        == full_prompt(session, [("user", "Hello")])
    )


PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.3}


def in_parts(chat, question, counts, limit, *, between=lambda: None):
    """Tokens of an answer that is stopped after so many pieces each time; `between` is called before it goes on."""
    token_ids, deltas = [], chat.ask(question, max_new_tokens=limit, stop=(), request_number=5)
    for count in counts:
        taken = [next(deltas) for _ in range(count)]
        deltas.close()
        token_ids += [token for delta in taken for token in delta.token_ids]
        assert chat.messages[-1]["content"].endswith("".join(delta.text for delta in taken))
        assert chat.messages[-1]["content"] == chat.unfinished
        between()
        deltas = chat.resume(max_new_tokens=limit - len(token_ids))
    return [*token_ids, *(token for delta in deltas for token in delta.token_ids)]


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "seed": 3} | PENALTIES]
)
def test_an_interrupted_answer_goes_on_with_the_tokens_of_a_whole_one(model, sampling):
    with open_tiny(model, sampling=sampling) as session:
        chat = session.chat(None)
        whole = asked(chat, PROMPT, 50, request_number=5).token_ids
        messages = chat.messages
        assert len(whole) > 30
        for counts, between in (((1,), session.reset), ((2, 1, 1), lambda: None), ((3, 2), session.reset)):
            chat.reset()
            assert in_parts(chat, PROMPT, counts, 50, between=between) == whole
            assert chat.messages == messages


def test_an_answer_that_was_interrupted_before_its_first_token_goes_on(sampling):
    def interrupt(progress):
        raise KeyboardInterrupt

    chat = sampling.chat(None)
    whole = asked(chat, PROMPT, 20, request_number=5).token_ids
    chat.reset()
    with pytest.raises(KeyboardInterrupt):
        asked(chat, PROMPT, 20, request_number=5, on_prefill=interrupt)
    assert chat.messages == ()
    assert Answer(chat.resume(max_new_tokens=20)).token_ids == whole
    assert len(chat.messages) == 2


def test_an_answer_that_length_ended_goes_on(sampling):
    chat = sampling.chat(None)
    whole = asked(chat, PROMPT, 40, request_number=5)
    text = chat.messages[-1]["content"]
    chat.reset()
    first = asked(chat, PROMPT, 13, request_number=5)
    known = chat.unfinished
    second = Answer(chat.resume(max_new_tokens=27))
    assert first.token_ids + second.token_ids == whole.token_ids
    assert known + second.text == text == chat.messages[-1]["content"]
    assert second.stats.prefilled_tokens == 1


def test_rotary_positions_of_an_answer_that_goes_on_are_those_of_its_prompt(shelf):
    """LongRoPE turns a prompt that is longer than the original length otherwise than tokens after a shorter one."""
    factors = {"short_factor": [1.0] * 16, "long_factor": [3.0] * 16}
    table = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 50}
    with open_tiny(shelf.model("llama", rope_parameters=table | factors)) as session:
        chat = session.chat(None)
        whole = asked(chat, PROMPT, 40)
        chat.reset()
        first = asked(chat, PROMPT, 20)
        assert first.stats.prompt_tokens < 50 < first.stats.prompt_tokens + 20
        assert first.token_ids + Answer(chat.resume(max_new_tokens=20)).token_ids == whole.token_ids


def test_only_an_unfinished_answer_goes_on(session):
    chat = session.chat(None)
    with pytest.raises(UsageError, match="no answer was interrupted"):
        next(chat.resume())
    asked(chat, "Hello", 5)
    assert chat.unfinished is not None
    chat.replace_messages([dict(message) for message in chat.messages])
    assert chat.unfinished is None
    asked(chat, "Hello", 5)
    chat.reset()
    assert chat.unfinished is None


def test_a_context_that_is_full_has_room_again_after_a_drop(session):
    chat = session.chat(None)
    asked(chat, "Hello" * 4, 5)
    asked(chat, PROMPT, 900)
    with pytest.raises(UsageError, match="the context is full, all 160 tokens") as caught:
        next(chat.resume())
    assert "/drop" in caught.value.hint
    said = chat.messages[-1]["content"]
    chat.replace_messages(chat.messages[2:])
    answer = Answer(chat.resume(max_new_tokens=4))
    assert len(answer.token_ids) == 4
    assert chat.messages[-1]["content"].startswith(said.rstrip("\ufffd"))


def seeds_of(session, chat, *steps):
    """The seed of the noise after each step of a conversation."""
    found = []
    for step in steps:
        step()
        asked(chat, "Hello", 2)
        found.append(chat._open.begun.sampler._seed)
    return found


def test_a_conversation_keeps_its_seed_until_it_goes_back(sampling):
    sampling.set_sampling(replace(sampling.description.config.sampling, seed=77))
    chat = sampling.chat(None)
    first, second, reset, again, retried = seeds_of(
        sampling,
        chat,
        lambda: None,
        lambda: None,
        chat.reset,
        lambda: None,
        lambda: chat.replace_messages(chat.messages[:-2]),
    )
    assert first == second == 77, (
        "the first conversation has the session's seed, as a request by that seed has"
    )
    assert reset == again == derived_seed(77, 1)
    assert retried == derived_seed(77, 2)
    sampling.set_sampling(replace(sampling.description.config.sampling, seed=78))
    assert seeds_of(sampling, chat, lambda: None) == [78]


def test_both_arms_hold_the_same_conversation(sampling):
    outcomes = []
    for plain in (False, True):
        sampling.reset()
        chat = sampling.chat("Be brief.")
        outcomes.append(
            [asked(chat, text, 20, plain=plain, request_number=4).outcome for text in ("One", "Two", "Three")]
        )
    assert outcomes[0] == outcomes[1]


def test_a_model_without_a_template_chats_in_plain_lines(shelf, tmp_path):
    directory = shutil.copytree(shelf.model("llama"), tmp_path / "bare")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    prepare_quietly(directory)
    with open_tiny(directory) as session:
        assert not session.description.has_chat_template
        chat = session.chat("Be brief.")
        first = asked(chat, "Hello")
        second = asked(chat, "And?")
        lines = f"Be brief.\nHello\n{first.text}\nAnd?\n"
        assert second.stats.prompt_tokens == len(session.encode_prompt(lines, system=None, raw=False))


# --- when something breaks while it runs ------------------------------------------------------------------------


def test_weights_that_vanish_while_running_are_an_integrity_error(shelf, tmp_path):
    """F63: the file is cut while it is served; an error, never a wrong token or a dead process."""
    directory = shutil.copytree(shelf.model("llama"), tmp_path / "cut")
    prepare_quietly(directory)
    with open_tiny(directory) as session:
        expected = answer_to(session, PROMPT, 40)
        with (directory / "model.safetensors").open("r+b") as file:
            file.truncate(4096)
        session.reset()
        ids, tokens = session.encode_prompt(PROMPT, system=None, raw=False), []
        with pytest.raises(IntegrityError) as caught:
            collect(session.generate(ids, max_new_tokens=40, stop=()), tokens)
        assert caught.value.exit_code == ExitCode.INTEGRITY
        assert tokens == expected.token_ids[: len(tokens)]


def test_damaged_logits_end_the_answer(session, monkeypatch):
    """F85, at the head of a real model."""
    head, before = session.loaded.head, answer_to(session, PROMPT, 20)
    head.output.norm_weight.mul_(torch.nan)
    with pytest.raises(IntegrityError, match="not finite"):
        answer_to(session, PROMPT, 20)
    assert len(before.token_ids) == 20


def test_the_end_token_of_the_model_ends_answers(session):
    assert EOS_ID in session.loaded.eos_ids
