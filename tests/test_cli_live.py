"""The terminal: text that scrolls up, statistics that are redrawn, progress, and nothing left behind."""

import io
import sys

import pytest
from fakes_cli import FakeSession, Terminal, on_terminal, use_session
from rich.cells import cell_len

from subspec_cli.__main__ import main
from subspec_cli.cli.live import LiveView, PlainView, sparkline, statistics_lines
from subspec_cli.cli.output import LiveArea, Output, as_json
from subspec_cli.cli.output_progress import ProgressLine, prefill_text, time_left
from subspec_cli.metrics import GenerationStats, PassStats, PrefillProgress


@pytest.fixture(autouse=True)
def no_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("NO_COLOR", raising=False)


def ticking(step_s=1.0):
    """A clock that moves by `step_s` at every look."""
    now = [0.0]

    def clock():
        now[0] += step_s
        return now[0]

    return clock


def some_stats():
    stats = GenerationStats().after_prefill(prompt_tokens=9, prefilled_tokens=9, prefill_passes=1, ttft_s=0.1)
    times = {"draft_time_s": 0.5, "verify_time_s": 1.5, "wait_time_s": 1.0, "streamed_bytes": 10**9}
    times["decode_time_s"] = 2.0
    for accepted in (0, 8, 4):
        step = PassStats(drafted=8, accepted=accepted, emitted=accepted + 1, **times)
        stats = stats.after_pass(step)
    return stats


def test_statistics_say_speed_time_and_memory():
    assert statistics_lines(some_stats(), 512 << 20, 1 << 30) == [
        "2.5 tok/s · 16 tokens · tau 5.00 · accepted ▁█▅",
        "draft 25% · verify 25% · waiting 50% · link 0.50 GB/s",
        "memory 512.0 MiB of 1.00 GiB · 2.79 GiB moved",
    ]
    first = GenerationStats().after_prefill(prompt_tokens=9, prefilled_tokens=9, prefill_passes=1, ttft_s=0.1)
    assert statistics_lines(first, 0, 1 << 30) == ["1 token", "memory 0 B of 1.00 GiB"]


def test_statistics_fit_the_usual_terminal():
    stats = some_stats()
    for _ in range(60):
        times = {"draft_time_s": 0.5, "verify_time_s": 9.5, "wait_time_s": 9.0, "streamed_bytes": 10**11}
        times["decode_time_s"] = 1.5
        stats = stats.after_pass(PassStats(drafted=8, accepted=9, emitted=10, **times))
    assert max(len(line) for line in statistics_lines(stats, 100 << 30, 111 << 30)) <= 80


def test_sparkline_grows_with_what_is_accepted():
    assert sparkline(()) == ""
    assert sparkline((0, 8)) == "▁█"
    assert sparkline((0, 8, 16)) == "▁▅█"


def test_live_terminal_shows_statistics_and_leaves_the_text(monkeypatch):
    stdout, stderr = on_terminal(monkeypatch)
    use_session(monkeypatch, FakeSession(["Hello ", "wor\x1b[2Jld\n", "by", "e\u202e"]))
    assert main(["run", "hello"]) == 0
    shown = stdout.getvalue()
    assert "reading the prompt" in shown
    assert "1 token" in shown
    assert "Hello wor\\x1b[2Jld\n" in shown
    assert "\x1b[2Jld" not in shown
    assert shown.endswith("bye\\x202e\n")
    assert "\u202e" not in shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0, "the cursor is shown again"
    assert "10 tokens (stop)" in stderr.getvalue()


def test_live_area_redraws_partial_line_above_statistics():
    stream = Terminal()
    output = Output(stdout=stream, stderr=Terminal())
    view = LiveView(output.area(), memory_bytes=lambda: 256 << 20, budget_bytes=1 << 30, clock=ticking())
    with view:
        view.feed("first\nsec", some_stats())
        view.feed("ond", some_stats())
    shown = stream.getvalue()
    for text in (
        "2.5 tok/s",
        "tau 5.00",
        "▁█▅",
        "waiting 50%",
        "link 0.50 GB/s",
        "memory 256.0 MiB",
    ):
        assert text in shown
    assert shown.index("first") < shown.index("2.5 tok/s")
    assert shown.endswith("second\n")


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_long_line_is_written_once_and_wrapped_by_words(monkeypatch, size):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "10")
    rows = []
    monkeypatch.setattr(
        LiveArea, "write_row", lambda self, row: rows.append("".join(span.text for span in row).rstrip())
    )
    output = Output(stdout=Terminal(), stderr=Terminal())
    text = " ".join(f"word{number:03d}" for number in range(90)) + " \u65e5\u672c" * 9 + "\n    indented"
    with LiveView(output.area(), memory_bytes=lambda: 0, budget_bytes=1, clock=ticking()) as view:
        for at in range(0, len(text), size):
            view.feed(text[at : at + size], some_stats())
    assert max(cell_len(row) for row in rows) <= 20
    assert " ".join(rows).split() == text.split()
    assert rows[-1] == "    indented"
    assert rows[0] == "word000 word001"


def test_notes_are_wrapped_by_words_and_paths_left_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    terminal = Terminal()
    path = "/a/very/long/path/of/a/model"
    Output(stderr=terminal, plain=True).note(f"one two three four five {path} six")
    assert [line.rstrip() for line in terminal.getvalue().splitlines()] == [
        "one two three four",
        "five",
        path,
        "six",
    ]


def test_ctrl_c_restores_the_terminal(monkeypatch):
    stdout, stderr = on_terminal(monkeypatch)
    use_session(monkeypatch, FakeSession(["partial", KeyboardInterrupt()]))
    assert main(["run", "hello"]) == 130
    shown = stdout.getvalue()
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")
    assert shown.endswith("partial\n")
    assert "(interrupted)" in stderr.getvalue()


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("TERM", "unknown")])
def test_dumb_terminal_gets_plain_text(monkeypatch, name, value):
    stdout, stderr = on_terminal(monkeypatch)
    monkeypatch.setenv(name, value)
    use_session(monkeypatch, FakeSession())
    assert main(["run", "hello"]) == 0
    assert stdout.getvalue() == "Hello world\nbye\n"
    assert "\x1b" not in stderr.getvalue()


def test_no_color_leaves_no_colour(monkeypatch):
    _, stderr = on_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    use_session(monkeypatch, FakeSession())
    assert main(["run", "hello"]) == 0
    assert not any(f"\x1b[{colour}m" in stderr.getvalue() for colour in range(30, 48))


def test_progress_is_one_line_on_a_terminal_and_rare_lines_elsewhere():
    stderr = Terminal()
    with ProgressLine(Output(stdout=io.StringIO(), stderr=stderr)) as progress:
        progress.update("loading [red] 1/2 \x1b[2J", 1, 2)
    assert "loading [red] 1/2 \\x1b[2J" in stderr.getvalue()
    stderr = io.StringIO()
    with ProgressLine(Output(stdout=io.StringIO(), stderr=stderr), clock=ticking()) as progress:
        for number in range(1, 13):
            progress.update(f"layer {number}/12", number, 12)
    assert stderr.getvalue().splitlines() == ["layer 5/12", "layer 10/12", "layer 12/12"]


READ = [PrefillProgress(done, 6000, done / 500) for done in (256, 3072, 5888, 6000)]
"""A prompt of 6,000 tokens at 500 a second."""


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (PrefillProgress(0, 600, 0.0), "reading the prompt 0/600 tokens"),
        (PrefillProgress(1536, 6000, 2.0), "reading the prompt 1,536/6,000 tokens · 768 tok/s · 5.8 s left"),
        (PrefillProgress(0.5, 20, 0.25), "reading the prompt 0/20 tokens · 2.0 tok/s · 9.8 s left"),
        (PrefillProgress(600, 60_000, 6.0), "reading the prompt 600/60,000 tokens · 100 tok/s · 9:54 left"),
    ],
)
def test_progress_of_a_prompt_says_rate_and_time_left(progress, text):
    assert prefill_text(progress) == text


def test_a_live_terminal_redraws_the_progress_of_the_prompt(monkeypatch):
    stdout, stderr = on_terminal(monkeypatch)
    use_session(monkeypatch, FakeSession([*READ, "Hello"]))
    assert main(["run", "hello"]) == 0
    shown = stdout.getvalue()
    assert "reading the prompt 256/6,000 tokens · 500 tok/s · 11.5 s left" in shown
    assert shown.endswith("Hello\n")
    assert "reading" not in stderr.getvalue()


def test_progress_of_the_prompt_is_redrawn_on_stderr_if_only_that_is_a_terminal(monkeypatch):
    _, stderr = on_terminal(monkeypatch)
    monkeypatch.setattr(sys, "stdout", stdout := io.StringIO())
    use_session(monkeypatch, FakeSession([*READ, "Hello"]))
    assert main(["run", "hello"]) == 0
    shown = stderr.getvalue()
    assert "reading the prompt 3,072/6,000 tokens" in shown
    assert "6,000/6,000" not in shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0, "the cursor is shown again"
    assert stdout.getvalue() == "Hello\n"


def test_a_pipe_gets_a_line_on_the_prompt_now_and_then():
    stdout, stderr = io.StringIO(), io.StringIO()
    # Each look at the clock is a second: the first line comes after five.
    progress = ProgressLine(Output(stdout=stdout, stderr=stderr), clock=ticking())
    with PlainView(stdout, progress, escape=False) as view:
        for done in range(1, 11):
            view.show_prefill(PrefillProgress(600 * done, 6000, float(done)))
        view.feed("Hello", some_stats())
    assert stderr.getvalue().splitlines() == [
        "reading the prompt 2,400/6,000 tokens · 600 tok/s · 6.0 s left",
        "reading the prompt 5,400/6,000 tokens · 600 tok/s · 1.0 s left",
    ]
    assert stdout.getvalue() == "Hello\n"


def test_a_short_prompt_and_a_document_tell_no_progress(capsys, monkeypatch):
    for argv in (["run", "hello"], ["run", "hello", "--json"]):
        use_session(monkeypatch, FakeSession([*READ, "Hello"]))
        assert main(argv) == 0
        assert "reading" not in "".join(capsys.readouterr())


def test_ctrl_c_while_the_prompt_is_read_restores_the_terminal(monkeypatch):
    stdout, stderr = on_terminal(monkeypatch)
    use_session(monkeypatch, FakeSession([READ[0], KeyboardInterrupt()]))
    assert main(["run", "hello"]) == 130
    shown = stdout.getvalue()
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")
    assert "0 tokens (interrupted)" in stderr.getvalue()


def test_time_left():
    assert time_left(0, 10, 1.0) == ""
    assert time_left(10, 10, 1.0) == ""
    assert time_left(1, 5, 30.0) == "2:00 left"


def test_json_has_no_nan():
    assert as_json({"a": [float("nan"), (1.5, float("inf"))]}) == '{"a": [null, [1.5, null]]}'
