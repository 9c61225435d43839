"""`subspec run` on a pipe and as JSON: what goes to stdout, what to stderr, and with which settings."""

import json
import os
import sys
import threading
import time

import pytest
from fakes_cli import FakeDescription, FakeSession, on_terminal, opened_in, pipe_in, use_session
from fakes_store import manifest_of, write_prepared

from subspec_cli.__main__ import main
from subspec_cli.cli import prompts
from subspec_cli.planning.request import WantedTokens
from subspec_cli.substitutes.last_use import mark_used
from subspec_cli.units import counted


@pytest.fixture(autouse=True)
def no_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))


@pytest.fixture
def session(monkeypatch):
    session = FakeSession()
    session.configs = use_session(monkeypatch, session)
    return session


def test_plain_text_on_stdout_and_figures_on_stderr(capsys, session, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["run", "What is it?"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "Hello world\nbye\n"
    assert "\x1b" not in captured.out + captured.err
    banner, model, plan, beside, summary = captured.err.splitlines()
    assert banner == "subspec 0.1.0 · loading the model prepared last …"
    assert model == ("model demo · cpu bfloat16 · context 256 tokens · exact (rows checked in blocks of 2)")
    assert plan == (
        "plan: 1 resident + 3 streamed layers · speculation on · 3.00 MiB of 1.00 GiB planned"
        " · as many resident layers as pay: 5.00 MiB to spare, a layer takes 9.00 MiB · acceptance assumed"
    )
    compared = "predicted (assumed costs) | measured with 200 tokens in the cache: "
    assert beside.startswith(f"{compared}pass 416 ms | 300 ms · ")
    assert summary == (
        "7 tokens (stop) at 4.0 tok/s · tau 3.00 · first token 250 ms"
        " · prompt 5 (4 prefilled) · context 12 of 256 · 953.7 MiB at 0.67 GB/s"
        " · memory 400.0 MiB of 1.00 GiB (whole process 700.0 MiB) · exact"
    )
    assert session.calls == [("encode", "What is it?", None, False), ("generate", 5, 512, ())]
    assert session.closed
    assert session.stopped


def test_a_prompt_that_is_a_models_name_is_remarked_on(capsys, session):
    write_prepared(manifest_of("org/tiny"))
    for prompt, model in (("tiny", []), ("org/tiny", []), ("tiny", ["--model", "demo"]), ("tin", [])):
        assert main(["run", prompt, *model]) == 0
        said = f"{prompt} is taken as the prompt; subspec run --model {prompt} talks to that model"
        assert (said in capsys.readouterr().err) == (prompt != "tin" and not model)
    assert main(["run", "tiny", "hi there"]) == 2
    assert 'subspec run --model MODEL "…"' in capsys.readouterr().err


def test_the_first_line_names_the_model_used_last(capsys, session):
    mark_used(write_prepared(manifest_of("org/tiny")).directory)
    write_prepared(manifest_of("demo"))
    assert main(["run", "What is it?"]) == 0
    assert "loading org/tiny, the model used last …" in capsys.readouterr().err.splitlines()[0]


def test_an_answer_of_one_token_has_no_rate(capsys, monkeypatch):
    use_session(monkeypatch, FakeSession(["x"]))
    assert main(["run", "hello"]) == 0
    summary = capsys.readouterr().err.splitlines()[-1]
    assert summary.startswith("1 token (stop) · first token 250 ms · ")
    assert "tok/s" not in summary


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [(1, "token", "1 token"), (0, "token", "0 tokens"), (2, "pass", "2 passes"), (1, "pass", "1 pass")],
)
def test_nouns_follow_their_counts(count, noun, text):
    assert counted(count, noun) == text


def test_every_flag_reaches_the_session(capsys, session):
    argv = (
        "run hello --model m/x --revision r1 --bits 8 --memory-gb 1.5 --ram-gb 6 --device cpu --context 99 "
        "--resident-layers 0 --no-residual --reprobe --depth 3 --width 2 --no-shadow --no-speculation "
        "--temperature 0.7 --top-p 0.9 --top-k 4 --seed 12 "
        "--max-new-tokens 33 --stop END --stop . --system Be_brief --raw --plain"
    )
    assert main(argv.split()) == 0
    config = session.configs[0].as_dict()
    assert config["model"] == {"model": "m/x", "revision": "r1", "bits": 8}
    assert config["memory"] == {
        "vram_gb": 1.5,
        "ram_gb": 6.0,
        "device": "cpu",
        "context": 99,
        "resident_layers": 0,
        "no_residual": True,
        "reprobe": True,
    }
    assert config["draft"] == {"depth": 3, "width": 2, "no_shadow": True, "no_speculation": True}
    given = {"temperature": 0.7, "top_p": 0.9, "top_k": 4, "seed": 12}
    assert {name: config["sampling"][name] for name in given} == given
    assert config["run"] == {
        "max_new_tokens": 33,
        "system": "Be_brief",
        "stop": ["END", "."],
        "raw": True,
        "plain": True,
    }
    assert session.calls == [("encode", "hello", "Be_brief", True), ("generate", 5, 33, ("END", "."))]
    error = capsys.readouterr().err
    assert "loading m/x" in error
    assert "most recently" not in error
    assert "seed 77 (fresh)" in error


def test_the_prompt_is_counted_as_it_will_be_asked(capsys, session):
    class Tokenizer:
        def encode_prompt(self, text, *, system, raw):
            assert (text, system, raw) == ("hello", "Be brief", True)
            return [0] * 40

    assert main(["run", "hello", "--system", "Be brief", "--raw", "--max-new-tokens", "7"]) == 0
    assert session.count(Tokenizer()) == WantedTokens(40, 7)


def test_settings_file_is_used_and_said(capsys, session, tmp_path):
    (tmp_path / "subspec.toml").write_text("[run]\nmax_new_tokens = 3\nraw = true\n[model]\nmodel = 'demo'\n")
    assert main(["run", "hello", "--no-raw"]) == 0
    assert session.calls[1] == ("generate", 5, 3, ())
    assert session.calls[0] == ("encode", "hello", None, False)
    assert "loading demo … (settings from subspec.toml)" in capsys.readouterr().err


def test_json_is_one_document_with_the_promised_keys(capsys, session):
    assert main(["run", "hello", "--json", "--seed", "5"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    document = json.loads(out)
    assert list(document) == [
        *("text", "token_ids", "prompt_tokens", "prefilled_tokens", "new_tokens", "finish_reason"),
        *("end_ids", "exactness", "exactness_reason", "speculation", "seed", "model", "revision"),
        *("stats", "predicted_beside_measured", "plan", "costs", "config", "versions"),
    ]
    assert {
        "peak_memory_bytes",
        "budget_bytes",
        "process_peak_bytes",
        "acceptance_by_depth",
        "link_busy_share",
    } <= set(document["stats"])
    assert document["costs"]["link_s"] == 0.4
    assert document["end_ids"] == [2, 7]
    assert (document["stats"]["tau"], document["stats"]["accepted_histogram"]) == (3.0, [0, 0, 2])
    assert document["config"]["sampling"]["seed"] == 5
    reason = "as many resident layers as pay: 5.00 MiB to spare, a layer takes 9.00 MiB"
    assert document["plan"] == {"resident_layers": 1, "streamed_layers": 3, "reason": reason}
    beside = document["predicted_beside_measured"]
    assert (beside["predicted_pass_s"], beside["pass_s"]) == (
        pytest.approx(0.416, abs=1e-3),
        pytest.approx(0.3),
    )


def test_json_keeps_foreign_text_in_ascii(capsys, monkeypatch):
    use_session(monkeypatch, FakeSession(["caf\u00e9 \u202e\x1b[2J"]))
    assert main(["run", "hello", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out)["text"] == "caf\u00e9 \u202e\x1b[2J"


def test_pipe_keeps_bytes_and_terminal_escapes_them(capsys, monkeypatch):
    nasty = "a\x1b[2J\x1b]52;c;\x07\r\x9b\u202eb\tc\n"
    use_session(monkeypatch, FakeSession([nasty, nasty]))
    assert main(["run", "hello"]) == 0
    assert capsys.readouterr().out == nasty * 2
    stdout, stderr = on_terminal(monkeypatch)
    use_session(monkeypatch, FakeSession([nasty]))
    assert main(["run", "hello", "--plain"]) == 0
    assert stdout.getvalue() == "a\\x1b[2J\\x1b]52;c;\\x07\\x0d\\x9b\\x202eb\tc\n"
    assert "\x1b" not in stderr.getvalue()


def test_prompt_from_a_pipe(capsys, session, monkeypatch):
    pipe_in(monkeypatch, "What is caf\u00e9?\n".encode())
    assert main(["run"]) == 0
    assert session.calls[0] == ("encode", "What is caf\u00e9?", None, False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the prompt is empty"),
        (b" \n", "the prompt is empty"),
        (b"abc\xff", "standard input is not UTF-8 at byte 3"),
        (b"\xef\xbb\xbfab\xff", "standard input is not UTF-8 at byte 5"),
        ("\ufeffab".encode("utf-16-le") + b"c", "standard input is not UTF-16 at byte 6"),
        ("ab".encode("utf-16-le"), "standard input is not text: character 1 is NUL"),
        (b"a" * ((16 << 20) + 1), "standard input is longer than 16 MiB"),
    ],
)
def test_bad_piped_prompt(capsys, session, monkeypatch, content, message):
    pipe_in(monkeypatch, content)
    assert main(["run"]) == 2
    assert message in capsys.readouterr().err
    assert not session.configs


@pytest.mark.parametrize("argv", [["run"], ["run", "-"]])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be"])
def test_a_piped_prompt_is_text_however_it_was_written(session, monkeypatch, argv, encoding):
    """A byte order mark and Windows' line ends are no part of the question."""
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    pipe_in(monkeypatch, f"{mark}What\r\nis caf\u00e9?\r\n".encode(encoding))
    assert main(argv) == 0
    assert session.calls[0] == ("encode", "What\nis caf\u00e9?", None, False)


def test_an_argument_and_a_pipe_are_both_asked(capsys, session, monkeypatch, tmp_path):
    (tmp_path / "notes").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    with opened_in(monkeypatch, tmp_path / "notes"):
        assert main(["run", "Sum\r\nup"]) == 0
    assert session.calls[0] == ("encode", "Sum\nup\n\none\ntwo", None, False)
    assert "the prompt is the argument and 7 B of standard input" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b" \r\n"])
def test_an_empty_pipe_beside_an_argument_changes_nothing(capsys, session, monkeypatch, tmp_path, content):
    (tmp_path / "empty").write_bytes(content)
    with opened_in(monkeypatch, tmp_path / "empty"):
        assert main(["run", "Why?"]) == 0
    assert session.calls[0] == ("encode", "Why?", None, False)
    assert "standard input" not in capsys.readouterr().err


@pytest.mark.parametrize("device", [None, "/dev/null", "/dev/zero"])
def test_nothing_is_read_beside_an_argument_where_nothing_is_piped(session, monkeypatch, device):
    with opened_in(monkeypatch, device or os.devnull):
        if device is None:
            monkeypatch.setattr(sys, "stdin", None)
        assert main(["run", "Why?"]) == 0
    assert session.calls[0] == ("encode", "Why?", None, False)


def test_a_pipe_that_stays_open_is_waited_for_aloud(capsys, session, monkeypatch):
    monkeypatch.setattr(prompts, "_PATIENCE_S", 0.01)
    reading, writing = os.pipe()
    os.set_blocking(reading, False)

    def answer():
        time.sleep(0.1)
        os.write(writing, b"late")
        os.close(writing)

    threading.Thread(target=answer).start()
    with opened_in(monkeypatch, reading):
        assert main(["run", "Sum up"]) == 0
    assert session.calls[0] == ("encode", "Sum up\n\nlate", None, False)
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("waiting for the end of standard input")
    assert "< /dev/null" in first


def test_bad_prompt_argument(capsys, session):
    assert main(["run", " "]) == 2
    assert "the prompt is empty" in capsys.readouterr().err
    assert main(["run", "caf\udce9"]) == 2
    assert "the prompt argument is not valid UTF-8" in capsys.readouterr().err


def test_no_prompt_and_no_way_to_chat(capsys, session, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["run"]) == 2
    assert "no prompt" in capsys.readouterr().err
    _, stderr = on_terminal(monkeypatch)
    assert main(["run", "--json"]) == 2
    assert main(["run", "--raw"]) == 2
    assert "--json needs a prompt" in stderr.getvalue()
    assert "--raw needs a prompt" in stderr.getvalue()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert main(["run"]) == 2
    assert "a chat needs standard output on the terminal too" in stderr.getvalue()


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_is_there(capsys, monkeypatch, as_json):
    session = FakeSession(["Hello ", "wor", KeyboardInterrupt()])
    use_session(monkeypatch, session)
    assert main(["run", "hello", *(["--json"] if as_json else [])]) == 130
    captured = capsys.readouterr()
    if as_json:
        document = json.loads(captured.out)
        assert (document["text"], document["finish_reason"]) == ("Hello wor", "interrupted")
    else:
        assert captured.out == "Hello wor\n"
    assert "4 tokens (interrupted)" in captured.err.splitlines()[-1]
    assert session.closed


def test_ctrl_c_while_writing_stops_the_generation(capsys, monkeypatch):
    session = FakeSession(["a", "b", "c"])
    use_session(monkeypatch, session)

    def interrupted(self, text, stats):
        assert not session.stopped
        raise KeyboardInterrupt

    monkeypatch.setattr("subspec_cli.cli.live.PlainView.feed", interrupted)
    assert main(["run", "hello"]) == 130
    assert session.stopped


def test_banner_says_when_the_model_fits_or_is_only_numeric(capsys, monkeypatch):
    description = FakeDescription(
        fits=True, speculation=False, exactness="numeric", exactness_reason="float32 rows differ"
    )
    use_session(monkeypatch, FakeSession(description=description))
    assert main(["run", "hello"]) == 0
    error = capsys.readouterr().err
    assert "numeric (float32 rows differ)" in error
    assert "fits in the budget · plain decoding" in error
    assert "seed" not in error


def test_what_did_not_go_as_planned_stays_on_the_screen(capsys, monkeypatch):
    note = "pinned 1.00 GiB of 9.00 GiB"
    use_session(monkeypatch, FakeSession(description=FakeDescription(notes=(note,))))
    assert main(["run", "hello"]) == 0
    assert f"note: {note}" in capsys.readouterr().err.splitlines()


def test_files_follow_the_argument_under_their_names_and_the_pipe_comes_last(
    capsys, session, monkeypatch, tmp_path
):
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfx = 1\r\ny = 2\r\n")
    (tmp_path / "b.txt").write_bytes("caf\u00e9\n".encode("utf-16"))
    (tmp_path / "piped").write_bytes(b"last\n")
    argv = ["run", "Compare", "--file", str(tmp_path / "a.py"), "--file", "b.txt"]
    with opened_in(monkeypatch, tmp_path / "piped"):
        assert main(argv) == 0
    text = "Compare\n\na.py:\nx = 1\ny = 2\n\nb.txt:\ncaf\u00e9\n\nlast"
    assert session.calls[0] == ("encode", text, None, False)
    assert "the prompt is the argument, the files and 4 B of standard input" in capsys.readouterr().err


def test_a_file_alone_is_a_prompt_on_a_terminal(session, monkeypatch, tmp_path):
    on_terminal(monkeypatch)
    (tmp_path / "a.txt").write_text("What?")
    assert main(["run", "--file", "a.txt", "--plain"]) == 0
    assert session.calls[0] == ("encode", "a.txt:\nWhat?", None, False)


@pytest.mark.parametrize("option", ["--file", "--system-file"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"ab\xff", "is not UTF-8 at byte 2"),
        (b"a\0", "is not text: character 1 is NUL"),
    ],
)
def test_a_file_that_is_no_text(capsys, session, tmp_path, option, content, message):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    assert main(["run", "Why?", option, "a.txt"]) == 2
    error = capsys.readouterr().err
    assert "a.txt" in error
    assert message in error
    assert session.calls == []


def test_the_system_message_may_be_a_file(capsys, session, tmp_path):
    (tmp_path / "system.txt").write_bytes(b"Be\r\nbrief.\r\n")
    assert main(["run", "Why?", "--system-file", "system.txt"]) == 0
    assert session.calls[0] == ("encode", "Why?", "Be\nbrief.", False)
    assert main(["run", "Why?", "--system-file", "system.txt", "--system", "S"]) == 2
    assert "--system and --system-file are both given" in capsys.readouterr().err
