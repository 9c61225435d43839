"""The chat: commands, Ctrl-C, and errors that end no conversation."""

import json
import re

import pytest
from fakes_cli import FakeSession, on_terminal, pipe_in, use_session

from subspec_cli.__main__ import main
from subspec_cli.cli import chat_commands, conversation
from subspec_cli.cli.answer_text import continue_hint, fullness_warning
from subspec_cli.cli.chat_commands import ChatState
from subspec_cli.cli.live import Answer
from subspec_cli.cli.messages import read_lines
from subspec_cli.cli.output import Output
from subspec_cli.config import Config
from subspec_cli.errors import PromptRefusedError, ResourceError, UsageError
from subspec_cli.metrics import GenerationStats


@pytest.fixture
def talk(tmp_path, monkeypatch):
    """Hold a chat of scripted lines (or exceptions); gives status, session, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def hold(lines, pieces=("Hi", "!"), argv=("run", "--plain", "--system", "S")):
        stdout, stderr = on_terminal(monkeypatch)
        session = FakeSession(list(pieces))
        use_session(monkeypatch, session)
        script = iter(lines)

        def ask(self, prompt):
            line = next(script)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(Output, "ask", ask)
        monkeypatch.setattr("subspec_cli.cli.chat.make_reader", lambda output: lambda: read_lines(output.ask))
        status = main(list(argv))
        assert session.closed
        assert next(script, None) is None, "the chat left before its script ended"
        return status, session, stdout.getvalue(), stderr.getvalue()

    return hold


def test_questions_commands_and_leaving(talk):
    status, session, stdout, stderr = talk(["Hello?", "", "/reset", "/help", "/nope", "/etc/hosts", "/exit"])
    assert status == 0
    asked = [call for call in session.calls if call[0] != "generate"]
    assert asked == [("chat", "S"), ("ask", "Hello?"), ("reset",), ("ask", "/etc/hosts")]
    assert stdout == "Hi!\nHi!\n"
    assert "the conversation is cleared" in stderr
    assert "no command /nope: /help lists them" in stderr
    assert stderr.count("tok/s") == 2


@pytest.mark.parametrize("last", ["/quit", EOFError()])
def test_other_ways_to_leave(talk, last):
    assert talk([last])[0] == 0


def test_live_chat(talk):
    status, _, stdout, _ = talk(["Hello?", EOFError()], argv=("run",))
    assert status == 0
    assert "1 token" in stdout
    assert stdout.endswith("Hi!\n")


def test_ctrl_c_stops_the_answer_and_a_second_one_leaves(talk):
    status, session, stdout, stderr = talk(
        ["Hello?", KeyboardInterrupt()], pieces=["Hi", KeyboardInterrupt()]
    )
    assert status == 0
    assert stdout == "Hi\n"
    assert "interrupted" in stderr
    assert session.stopped


class Tokenizer:
    """Says what it was given to encode."""

    def encode_prompt(self, text, *, system, raw):
        self.asked = (text, system, raw)
        return [1]


def test_a_chats_template_is_tried_before_the_model_is_loaded(talk):
    _, session, _, _ = talk(["/exit"])
    tokenizer = Tokenizer()
    assert session.count(tokenizer) is None
    assert tokenizer.asked == ("Hello", "S", False)


def test_the_header_has_two_lines_of_forty_columns_and_info_the_rest(talk):
    _, _, _, stderr = talk(["/exit"], argv=("chat",))
    header = (
        re.sub(r"\x1b[^a-zA-Z]*[a-zA-Z]", "", stderr.split("loading substitutes 1/4")[-1])
        .strip()
        .splitlines()
    )
    assert header == ["demo · cpu · exact", "context 256 · greedy · /help for more"]
    assert max(len(line) for line in header) <= 40
    assert "plan: 1 resident" in talk(["/info", "/exit"])[3]


@pytest.mark.parametrize(
    ("used", "told"),
    [
        (191, ""),
        (192, "the context is 75% full: 64 of 256 tokens are left"),
        (255, "the context is 99% full: 1 of 256 tokens are left"),
        (256, "the context is full, all 256 tokens: /drop forgets the oldest turns, /reset all"),
    ],
)
def test_a_chat_that_is_three_quarters_full_says_so(used, told):
    stats = GenerationStats(prompt_tokens=used - 20, new_tokens=20)
    warning = fullness_warning(Answer(stats=stats), FakeSession())
    assert warning.startswith(told)
    assert bool(warning) == bool(told)


def test_the_warning_follows_the_summary(talk, monkeypatch):
    monkeypatch.setattr(
        "subspec_cli.cli.conversation.fullness_warning", lambda answer, session: "nearly full"
    )
    assert "exact\nnearly full\n" in talk(["Hello?", "/exit"])[3]


def test_a_file_that_cannot_be_written_is_said_without_the_hint_of_models(talk, tmp_path):
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "a.json").mkdir()
    _, _, _, stderr = talk(["/save! locked/a.json", "/exit"])
    assert "cannot write" in stderr
    assert "/save takes another" in stderr
    assert "HF_HOME" not in stderr


def test_one_ctrl_c_at_the_prompt_only_says_how_to_leave(talk):
    interrupt = KeyboardInterrupt
    status, session, _, stderr = talk([interrupt(), "Hello?", interrupt(), interrupt()])
    assert status == 0
    assert ("ask", "Hello?") in session.calls
    assert stderr.count("Ctrl-C again, Ctrl-D or /exit leaves") == 2


def test_full_conversation_is_said_and_goes_on(talk):
    status, _, _, stderr = talk(
        ["Hello?", "/exit"], pieces=[UsageError("the chat is full", "/reset clears it")]
    )
    assert status == 0
    assert "the chat is full: /reset clears it" in stderr


def test_a_message_that_the_template_refuses_is_said_and_the_chat_goes_on(talk):
    refusal = PromptRefusedError("the chat template refuses this conversation: no apples", "--raw has none")
    status, session, _, stderr = talk(["Apples?", "Pears?", "/exit"], pieces=[refusal])
    assert status == 0
    assert ("ask", "Pears?") in session.calls
    assert stderr.count("the chat template refuses this conversation: no apples") == 2


def test_other_errors_end_it(talk):
    status, _, _, stderr = talk(["Hello?"], pieces=[ResourceError("the disk is gone")])
    assert status == 7
    assert "subspec: error: the disk is gone" in stderr


def test_line_that_is_no_utf_8(talk):
    status, session, _, stderr = talk([UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "/exit"])
    assert status == 0
    assert "not UTF-8 at byte 0" in stderr
    assert ("ask", "") not in session.calls


def test_sigterm_is_no_ctrl_c(talk, monkeypatch):
    """SIGTERM must end the program, at the prompt and during an answer."""
    monkeypatch.setattr("subspec_cli.cli.conversation.is_terminating", lambda: True)
    status, _, _, _ = talk([KeyboardInterrupt()])
    assert status == 130
    status, _, _, _ = talk(["Hello?"], pieces=["Hi", KeyboardInterrupt()])
    assert status == 130


def test_asking_reads_a_line(monkeypatch):
    on_terminal(monkeypatch)
    monkeypatch.setattr("builtins.input", lambda prompt: f"{prompt}typed")
    assert Output().ask("> ") == "> typed"


def test_chat_is_a_command_whose_files_begin_the_conversation(talk, tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    argv = ("chat", "--plain", "-f", "a.txt", "--system", "S")
    status, session, _, _ = talk(["Sum up", "Again", "/exit"], argv=argv)
    assert status == 0
    asked = [call for call in session.calls if call[0] in ("ask", "chat")]
    assert asked == [("chat", "S"), ("ask", "a.txt:\none\n\nSum up"), ("ask", "Again")]


def test_chat_takes_the_lines_of_a_pipe_and_writes_answers_only(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    session = FakeSession(["Hi", "!"])
    use_session(monkeypatch, session)
    pipe_in(monkeypatch, b"One\nTwo\n")
    assert main(["chat"]) == 0
    assert [call[1] for call in session.calls if call[0] == "ask"] == ["One", "Two"]
    assert capsys.readouterr().out == "Hi!\nHi!\n"


def test_fences_hold_a_message_of_several_lines_that_is_no_command(talk):
    _, session, _, _ = talk(['"""one', "/exit", 'two"""', '"""/exit"""', "/exit"])
    assert [call[1] for call in session.calls if call[0] == "ask"] == ["one\n/exit\ntwo", "/exit"]


def asked(session):
    return [call[1] for call in session.calls if call[0] == "ask"]


def test_help_lists_the_commands(talk):
    _, session, _, stderr = talk(["/help", "/HELP", "/exit"])
    for command in (
        "/reset",
        "/drop",
        "/retry",
        "/continue",
        "/system TEXT",
        "/set NAME VALUE",
        "/save FILE",
        "/load FILE",
        "/exit",
    ):
        assert stderr.count(f"\n{command} ") == 2
    assert asked(session) == []
    assert max(len(line) for line in chat_commands._HELP.splitlines()) <= 40


def test_unknown_words_after_a_slash_are_not_sent(talk):
    _, session, _, stderr = talk(["/foo bar", "/reset now", "/etc/hosts is what?", "1/2", "/exit"])
    assert asked(session) == ["/etc/hosts is what?", "1/2"]
    assert "no command /foo" in stderr
    assert "/reset takes nothing after it" in stderr
    assert ("reset",) not in session.calls


def test_settings_change_within_a_chat(talk):
    lines = ["/set temperature 0.7", "/set seed 3", "/set max-new-tokens 9", "/set top_k", "Hello?", "/exit"]
    _, session, _, stderr = talk(lines)
    sampling = [call[1] for call in session.calls if call[0] == "sampling"][-1]
    assert (sampling.temperature, sampling.seed) == (0.7, 3)
    assert ("generate", 1, 9, ()) in session.calls
    assert "top_k is 0" in stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temperature -1", "--temperature must be a number of at least 0"),
        ("/set top_p high", "--top-p must be a number above 0"),
        ("/set max_new_tokens 0", "--max-new-tokens must be a whole number of at least 1"),
        ("/set nonsense 1", "/set takes temperature, top_p, top_k"),
        ("/set", "/set takes temperature"),
        ("/save", "/save needs a file"),
        ("/save none/a.json", "there is no directory none"),
        ("/load none.json", "none.json: No such file"),
    ],
)
def test_commands_that_cannot_be_done(talk, line, message):
    _, session, _, stderr = talk([line, "/exit"])
    assert message in stderr
    assert "sampling" not in [call[0] for call in session.calls]


def test_the_system_message_can_be_changed(talk):
    _, session, _, stderr = talk(["/system", "/system Be brief", "/exit"])
    assert "the system message is: S" in stderr
    assert ("system", "Be brief") in session.calls


def test_a_chat_is_saved_and_loaded(talk, tmp_path):
    _, session, _, stderr = talk(["Hello?", "/save a.json", "/save a.json", "/save! a.json", "/exit"])
    assert "a.json exists: /save! a.json replaces it" in stderr
    assert stderr.count("3 messages in a.json") == 2
    said = [("system", "S"), ("user", "Hello?"), ("assistant", "Hi!")]
    saved = json.loads((tmp_path / "a.json").read_text())
    assert saved == {"messages": [{"role": role, "content": content} for role, content in said]}
    _, session, _, stderr = talk(["/load a.json", "/retry", "/exit"])
    assert "2 messages of a.json · context 9 of 256" in stderr
    assert asked(session) == ["Hello?"]
    assert len(session.messages) == 2


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}',
    ],
)
def test_a_file_that_is_no_chat(talk, tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    _, session, _, stderr = talk(["Hello?", "/load a.json", "/exit"])
    assert "/save writes such a file" in stderr or "expected a JSON object" in stderr
    assert session.messages[0]["content"] == "Hello?"


def test_retry_asks_the_last_question_again(talk):
    _, session, _, stderr = talk(["/retry", "One?", "Two?", "/retry", "/exit"])
    assert "nothing was asked yet" in stderr
    assert asked(session) == ["One?", "Two?", "Two?"]
    assert [message["content"] for message in session.messages] == ["One?", "Hi!", "Two?", "Hi!"]
    assert "at temperature 0 the answer is the same" in stderr


def test_continue_goes_on_with_an_answer_that_was_cut_short(talk):
    status, session, stdout, stderr = talk(
        ["Hello?", "/continue", "/Continue now", "/exit"], pieces=["Hi", KeyboardInterrupt()]
    )
    assert status == 0
    assert [call[0] for call in session.calls if call[0] in ("ask", "resume")] == ["ask", "resume"]
    assert stdout == "Hi\nHi\n"
    assert (
        stderr.count("1 token (interrupted) · context 6 of 256 · exact\ninterrupted: /continue goes on") == 2
    )
    assert "/continue takes nothing after it" in stderr


def test_on_a_terminal_the_unfinished_row_is_shown_again(talk):
    _, _, stdout, _ = talk(["/continue", "/exit"], pieces=["ere, ", "all"], argv=("chat",))
    assert stdout.endswith("Hi there, all\n")


@pytest.mark.parametrize(
    ("reason", "used", "turns", "told"),
    [
        ("stop", 100, 1, ""),
        ("length", 100, 1, "ended by length: /continue goes on"),
        ("interrupted", 100, 1, "interrupted: /continue goes on"),
        ("length", 256, 1, ""),
        ("length", 256, 2, "ended by length: /continue goes on after /drop"),
    ],
)
def test_an_answer_that_was_cut_short_says_how_it_goes_on(reason, used, turns, told):
    stats = GenerationStats(prompt_tokens=used - 20, new_tokens=20)
    assert continue_hint(Answer(finish_reason=reason, stats=stats), FakeSession(), turns) == told


def test_commands_of_the_loop_take_nothing_and_any_case(talk):
    _, session, _, stderr = talk(["/retry it", "/exit now", "/EXIT"])
    assert "/retry takes nothing after it" in stderr
    assert "/exit takes nothing after it" in stderr
    assert asked(session) == []


def test_a_retry_that_is_refused_keeps_the_answer(talk, monkeypatch):
    _, session, _, _ = talk(["One?", "Two?", "/exit"])
    state = ChatState(session, session, Config(), None, question="Two?")
    session.pieces = [UsageError("no room")]
    conversation._retry(state, Output())
    assert [message["content"] for message in session.messages] == ["One?", "Hi!", "Two?", "Hi!"]


def test_oldest_turns_are_dropped_only_when_told_to(talk):
    long = "x" * 100
    _, session, _, stderr = talk([long, "Two?", "Three?", "/drop", "/drop", "/drop", "/exit"])
    assert "the oldest turn is dropped · context 16 of 256" in stderr
    assert session.messages == ()
    assert talk(["/drop", "/exit"])[3].count("nothing was said") == 1
    _, session, _, _ = talk(["One?", long * 2, "/drop", "/exit"])
    assert [message["content"] for message in session.messages] == [long * 2, "Hi!"]


def test_a_gauge_of_the_context_follows_an_answer(talk):
    assert "context 9 of 256 · exact\n" in talk(["Hello?", "/exit"])[3]
