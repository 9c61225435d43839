"""The line editor: pastes, messages of several lines, and a history that lasts."""

import json
import os
import stat
import threading

import pytest
from fakes_cli import on_terminal
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from subspec_cli.cli.chat import make_reader
from subspec_cli.cli.line_editor import LineEditor, history_file
from subspec_cli.cli.messages import Message
from subspec_cli.cli.output import Output

ENTER = "\r"
CTRL_J = "\n"
ALT_ENTER = "\x1b\r"
UP = "\x1b[A"


def pasted(text):
    return f"\x1b[200~{text}\x1b[201~"


def read(keys, history=None, count=1):
    """The messages that these keys make."""
    with create_pipe_input() as terminal:
        # From a thread, for a pipe holds less than a long paste.
        threading.Thread(target=terminal.send_text, args=(keys,)).start()
        editor = LineEditor(history, keys=terminal, screen=DummyOutput())
        return [editor.read() for _ in range(count)]


@pytest.mark.parametrize("line_end", ["\n", "\r", "\r\n"])
def test_a_paste_is_one_message_and_no_command(line_end):
    text = line_end.join(["def f():", "    return 1", "/exit"])
    assert read(pasted(text) + ENTER) == [Message("def f():\n    return 1\n/exit", is_typed=False)]
    assert read(pasted("/exit") + ENTER) == [Message("/exit", is_typed=False)]


def test_a_paste_may_be_edited_and_loses_nothing():
    long = "x" * 70_000
    assert read("See: " + pasted(long) + " end" + ENTER) == [Message(f"See: {long} end", is_typed=False)]


def test_a_line_that_was_typed_may_be_a_command():
    assert read(" /exit " + ENTER) == [Message("/exit", is_typed=True)]
    assert read(pasted("a") + ENTER + "/reset" + ENTER, count=2)[1] == Message("/reset", is_typed=True)


@pytest.mark.parametrize("key", [CTRL_J, ALT_ENTER])
def test_keys_that_break_a_line(key):
    assert read(f"one{key}/exit{ENTER}") == [Message("one\n/exit", is_typed=False)]


def test_a_fence_lets_enter_break_lines_until_it_closes():
    assert read(f'"""one{ENTER}two{ENTER}"""{ENTER}') == [Message("one\ntwo", is_typed=False)]


def test_ctrl_c_and_ctrl_d():
    with pytest.raises(KeyboardInterrupt):
        read("half\x03")
    with pytest.raises(EOFError):
        read("\x04")


def test_bytes_that_are_not_utf_8():
    with create_pipe_input() as terminal:
        terminal.send_bytes(b"ab\xff\r")
        with pytest.raises(UnicodeDecodeError):
            LineEditor(None, keys=terminal, screen=DummyOutput()).read()


def test_history_lasts_and_is_the_users_alone(tmp_path):
    file = tmp_path / "history"
    read(f"first{ENTER}" + pasted("two\nlines") + ENTER, file, count=2)
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    assert [json.loads(line) for line in file.read_text().splitlines()] == ["first", "two\nlines"]
    assert read(UP + UP + UP + ENTER, file)[0].text == "first"


def test_history_that_is_damaged_or_cannot_be_written(tmp_path):
    file = tmp_path / "history"
    file.write_bytes(b'{"no"\n"good"\n3\n\xff\xfe\n')
    assert read(UP + ENTER, file)[0].text == "good"
    assert read("said" + ENTER, tmp_path / "absent" / "history")[0].text == "said"


def test_where_history_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))
    assert history_file() == tmp_path / "home" / "chat-history.jsonl"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "file"))
    assert history_file() is None


def test_without_a_terminal_there_is_no_editor(monkeypatch):
    on_terminal(monkeypatch)
    assert Output().can_edit
    assert not Output(plain=True).can_edit
    monkeypatch.setattr("builtins.input", lambda prompt: f"{prompt}typed")
    assert make_reader(Output(plain=True))() == Message("> typed", is_typed=True)
