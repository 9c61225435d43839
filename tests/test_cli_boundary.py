"""Every way out of the program: its message, its exit status, and nothing else on the terminal."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fakes_cli import FakeSession, on_terminal, use_session

from subspec_cli.__main__ import main
from subspec_cli.cli import boundary
from subspec_cli.errors import (
    AccessError,
    BusyError,
    DamageFoundError,
    ExitCode,
    IntegrityError,
    NetworkError,
    NotIdenticalError,
    ResourceError,
    UnsupportedModelError,
    UsageError,
)
from subspec_cli.versions import __version__

HEAVY = ("torch", "transformers", "numpy", "optimum", "huggingface_hub")


@pytest.fixture(autouse=True)
def no_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))


def run_python(code, *, shell_tail="", cwd=None):
    """Run `code` in a fresh interpreter, perhaps piped into `shell_tail`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    if shell_tail:
        command = ["bash", "-c", f'"$0" -c "$1" {shell_tail}', sys.executable, code]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


LIGHT_CASES = [
    (["--help"], 0),
    (["run", "--help"], 0),
    (["--version"], 0),
    (["run", "--max-new-tokens", "0", "hello"], 2),
    (["run", "--vram-gb", "-1", "hello"], 2),
    (["run", "--vram-gb", "abc", "hello"], 2),
    (["run", "--config", "bad.toml", "hello"], 2),
    (["run", ""], 2),
    (["run"], 2),
    (["run", "--stop", "", "hello"], 2),
    (["run", "--no-such-flag"], 2),
    (["bench", "mt-bench", "--top-p", "0"], 2),
    (["bench", "no-such-suite"], 2),
    (["bench", "compare", "one.json"], 2),
    (["bench", "compare", "one.json", "two.json"], 2),
    (["bench", "sample", "--output", "no/such/dir/out.json"], 2),
    (["bench", "mt-bench", "--questions", "absent.jsonl"], 2),
    (["prepare", "demo", "--bits", "3"], 2),
    (["prepare", " "], 2),
]


def test_help_and_bad_input_load_nothing_heavy(tmp_path):
    """One fresh interpreter for all cases: nothing heavy may be there after any of them."""
    (tmp_path / "bad.toml").write_text("[run\n")
    code = f"""
import io, sys
from subspec_cli.__main__ import main
for argv, expected in {LIGHT_CASES!r}:
    sys.stdin = io.TextIOWrapper(io.BytesIO(b""))
    status = main(argv)
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    assert status == expected and not heavy, (argv, status, heavy)
"""
    result = run_python(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(errors) == len([status for _, status in LIGHT_CASES if status])


def test_every_flag_of_the_issue_is_in_the_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["run", "--help"]) == 0
    text = capsys.readouterr().out
    flags = (
        "model vram-gb memory-gb device config max-new-tokens temperature top-p top-k seed stop system raw "
        "context bits resident-layers depth width no-speculation json plain debug"
    )
    for flag in flags.split():
        assert re.search(rf"--{flag}\b", text), flag
    assert main([]) == 2
    assert "prepare" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"subspec {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "--json", "--vram-gbb", "1", "x"], "No such option: --vram-gbb"),
        (["run", "--json", "x"], "no model is prepared yet"),
        (["models", "verify", "absent/model", "--json"], "absent/model is not prepared"),
        (
            ["bench", "sample", "--json", "--top-p", "0"],
            "--top-p must be a number above 0 and at most 1",
        ),
    ],
)
def test_with_json_an_error_is_the_one_document(capsys, argv, message):
    assert main(argv) == 2
    captured = capsys.readouterr()
    found = json.loads(captured.out)["error"]
    assert message in found["message"]
    assert f"subspec: error: {found['message']}\n" in captured.err
    assert (f" hint: {found['hint']}\n" in captured.err) == bool(found["hint"])
    assert found["exit_code"] == 2
    assert captured.out.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [["run", "--top-p", "0", "--", "--json"], ["bench", "sample", "--output", "x.json", "--top-p", "0"]],
)
def test_without_a_document_on_stdout_an_error_leaves_it_empty(capsys, argv):
    assert main(argv) == 2
    assert capsys.readouterr().out == ""


def test_an_error_that_follows_its_document_adds_none(capsys, monkeypatch):
    def show(*given, **how):
        sys.stdout.write('{"models": []}\n')
        raise DamageFoundError("1 file is damaged", "repair it")

    monkeypatch.setattr(boundary, "_invoke", show)
    assert main(["models", "verify", "--json"]) == ExitCode.INTEGRITY
    assert capsys.readouterr().out == '{"models": []}\n'


@pytest.mark.parametrize(
    ("argv", "message", "hint"),
    [
        (["run", "--vram-gbb", "1", "x"], "No such option: --vram-gbb", "subspec run --help"),
        (
            ["run", "--vram-gb", "8GBB", "x"],
            "'8GBB' is not a size above 0: GiB as a number, such as 8, or with MB, MiB, GB or GiB",
            "subspec run --help",
        ),
        (["run", "a", "b"], "unexpected extra argument", "subspec run --help"),
        (["run", "--depth", "1.5", "x"], "'1.5' is not a whole number", "subspec run --help"),
        (["rnu"], "No such command 'rnu'", "subspec --help"),
        (["prepare"], "Missing argument 'MODEL'", "subspec prepare --help"),
        (
            ["bench", "squad"],
            "Invalid value for 'SUITE': 'squad' is not one of 'sample', 'mt-bench', 'humaneval', 'gsm8k', 'alpaca'",
            "subspec bench --help",
        ),
        (
            ["run", "--vram-gb", "1", "--memory-gb", "2", "x"],
            "--memory-gb: given twice",
            "say the same thing",
        ),
        (["run", "--temperature", "nan", "x"], "--temperature must be a number of at least 0, not NaN", ""),
    ],
)
def test_usage_errors_name_what_is_wrong(capsys, argv, message, hint):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    first, *rest = captured.err.splitlines()
    assert first.startswith("subspec: error: ")
    assert message in first
    assert not hint or hint in rest[0]


def test_nearest_flag_is_suggested(capsys):
    main(["run", "--vram-gbb", "1", "x"])
    assert "--vram-gb" in capsys.readouterr().err.replace("--vram-gbb", "")


ERRORS = [
    (UsageError, 2),
    (UnsupportedModelError, 3),
    (NetworkError, 4),
    (AccessError, 5),
    (IntegrityError, 6),
    (ResourceError, 7),
    (BusyError, 8),
    (NotIdenticalError, 9),
]


@pytest.mark.parametrize(("error", "status"), ERRORS)
def test_our_errors_are_one_line_a_hint_and_a_status(capsys, monkeypatch, error, status):
    use_session(monkeypatch, FakeSession([error("layer \x1b[2J\nbroke \u202e", "run \x07this")]))
    assert main(["run", "hello"]) == status
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2] == "subspec: error: layer \\x1b[2J broke \\x202e"
    assert lines[-1] == " hint: run \\x07this"


def test_on_a_terminal_an_error_is_wrapped_by_words(monkeypatch):
    _, stderr = on_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "40")
    path = "/a/path/longer/than/a/row/of/this/terminal/config.toml"
    assert main(["run", "--config", path, "hi"]) == 2
    rows = stderr.getvalue().splitlines()
    assert rows[0] == "subspec: error: config file"
    assert any(path in row for row in rows)
    assert all(len(row) <= 40 for row in rows if path not in row)


def test_bug_is_one_line_and_a_traceback_only_when_asked(capsys, monkeypatch):
    use_session(monkeypatch, FakeSession([KeyError("bad \x1b]52;key")]))
    assert main(["run", "hello"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "\x1b" not in error
    assert "internal error: KeyError: 'bad \\x1b]52;key'; run again with --debug" in error.splitlines()[-1]
    use_session(monkeypatch, FakeSession([KeyError("bad \x1b]52;key")]))
    assert main(["run", "hello", "--debug"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "\x1b" not in error


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (MemoryError(), 7, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), 7, "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache/x"), 7, "Permission denied: /cache/x"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), 1, "internal error: FileNotFoundError"),
        (KeyboardInterrupt(), 130, "subspec: interrupted"),
        (
            ImportError("x.so: failed to map segment from shared object"),
            7,
            "not enough memory to load a library",
        ),
        (ImportError("cannot import name 'x'"), 1, "internal error: ImportError"),
    ],
)
def test_what_the_machine_refuses(capsys, monkeypatch, error, status, message):
    def open_session(config, reporter, *, count):
        raise error

    use_session(monkeypatch, FakeSession())
    monkeypatch.setattr(sys.modules["subspec_cli.session"], "open_session", open_session)
    assert main(["run", "hello"]) == status
    assert (
        message in capsys.readouterr().err.splitlines()[-1 if status != 7 or "memory" not in message else -2]
    )


def test_sigterm_unwinds_like_ctrl_c(capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)

    class Terminated(FakeSession):
        def generate(self, prompt_ids, **how):
            for delta in super().generate(prompt_ids, **how):
                yield delta
                signal.raise_signal(signal.SIGTERM)

    session = Terminated()
    use_session(monkeypatch, session)
    assert main(["run", "hello"]) == 143
    assert session.closed
    assert session.stopped
    assert capsys.readouterr().out == "Hello \n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_outside_an_answer(capsys, monkeypatch):
    def open_session(config, reporter, *, count):
        signal.raise_signal(signal.SIGTERM)

    use_session(monkeypatch, FakeSession())
    monkeypatch.setattr(sys.modules["subspec_cli.session"], "open_session", open_session)
    assert main(["run", "hello"]) == 143
    assert capsys.readouterr().err.endswith("subspec: terminated\n")


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_during_an_import_ends_the_process_whatever_the_library_makes_of_it(tmp_path, name, status):
    """numpy answers an exception within its import by importing anew, torch goes on without numpy."""
    (tmp_path / "library.py").write_text(f"""
import os, signal, time
try:
    os.kill(os.getpid(), signal.{name})
    time.sleep(5)
except BaseException:
    pass
""")
    code = """
import sys
sys.path.insert(0, ".")
from fakes_cli import module
def open_session(config, reporter, count):
    import library
    raise ImportError("cannot load module more than once per process")
sys.modules["subspec_cli.session"] = module("subspec_cli.session", open_session=open_session)
from subspec_cli.__main__ import main
print("kept", end="")
sys.exit(main(["run", "hello"]))
"""
    result = run_python(code, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (status, "kept")
    says = "interrupted" if status == 130 else "terminated"
    assert result.stderr.splitlines()[1:] == [f"subspec: {says}"]


@pytest.mark.parametrize(
    ("name", "status", "text"),
    [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated"), ("SIGHUP", 129, "terminated")],
)
def test_a_signal_is_reported_whatever_exception_it_has_become(capsys, monkeypatch, name, status, text):
    def open_session(config, reporter, *, count):
        try:
            signal.raise_signal(getattr(signal, name))
        except KeyboardInterrupt:
            raise ImportError("numpy is broken") from None

    use_session(monkeypatch, FakeSession())
    monkeypatch.setattr(sys.modules["subspec_cli.session"], "open_session", open_session)
    assert main(["run", "hello"]) == status
    assert capsys.readouterr().err.endswith(f"\nsubspec: {text}\n")


def test_a_second_ctrl_c_at_once_is_the_same_one(capsys, monkeypatch):
    class Bounced(FakeSession):
        def generate(self, prompt_ids, **how):
            for delta in super().generate(prompt_ids, **how):
                yield delta
                signal.raise_signal(signal.SIGINT)

        def __exit__(self, *error):
            signal.raise_signal(signal.SIGINT)
            super().__exit__(*error)

    session = Bounced()
    use_session(monkeypatch, session)
    assert main(["run", "hello"]) == 130
    assert session.closed
    assert "(interrupted)" in capsys.readouterr().err.splitlines()[-1]


def test_a_signal_that_was_ignored_stays_ignored(capsys, monkeypatch):
    """So `nohup subspec ...` goes on when the terminal closes."""

    class HungUp(FakeSession):
        def __exit__(self, *error):
            signal.raise_signal(signal.SIGHUP)
            super().__exit__(*error)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        use_session(monkeypatch, HungUp())
        assert main(["run", "hello"]) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_no_signal_and_no_exit_handler_comes_after_the_last_line(tmp_path):
    """Libraries print at the interpreter's exit, and a second Ctrl-C there shows a traceback."""
    code = """
import atexit, signal, sys
from subspec_cli import __main__
from subspec_cli.cli import boundary
atexit.register(print, "an exit handler ran")
flush = boundary._flush_or_discard
def interrupted(stream):
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.raise_signal(signum)
    flush(stream)
boundary._flush_or_discard = interrupted
sys.argv[1:] = ["--version"]
__main__.program()
"""
    result = run_python(code, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"subspec {__version__}\n", "")


ENDLESS = """
import sys
from fakes_cli import FakeSession, module
session = FakeSession(["line of text\\n"] * 20000)
name = "subspec_cli.session"
sys.modules[name] = module(name, open_session=lambda config, reporter, count: session)
from subspec_cli.__main__ import main
sys.exit(main(["run", "hello"]))
"""


def test_reader_that_leaves_early_is_no_error(tmp_path):
    result = run_python(ENDLESS, shell_tail="| head -1; exit ${PIPESTATUS[0]}", cwd=tmp_path)
    assert result.returncode == 141
    assert result.stdout == "line of text\n"
    assert "error" not in result.stderr
    assert "Exception ignored" not in result.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_on_stdout(tmp_path):
    result = run_python(ENDLESS, shell_tail="> /dev/full", cwd=tmp_path)
    assert result.returncode == 7
    assert result.stderr.splitlines()[-1] == "subspec: error: No space left on device"
    assert "Exception ignored" not in result.stderr


def test_help_into_a_reader_that_leaves(tmp_path):
    code = "import sys\nfrom subspec_cli.__main__ import main\nsys.exit(main(['run', '--help']))"
    result = run_python(code, shell_tail="| true; exit ${PIPESTATUS[0]}", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (141, "")


def test_closed_streams(tmp_path):
    assert run_python(ENDLESS, shell_tail=">&- 2>&-", cwd=tmp_path).returncode == 0
    assert (
        run_python(ENDLESS, shell_tail="2>&1 | head -1; exit ${PIPESTATUS[0]}", cwd=tmp_path).returncode
        == 141
    )


def test_only_output_writes_and_knows_rich():
    folder = Path(boundary.__file__).parent
    for path in folder.glob("*.py"):
        source = path.read_text()
        if not path.name.startswith("output"):
            assert not re.search(r"^\s*(from|import) rich|\bprint\(|\becho\(", source, re.MULTILINE), (
                path.name
            )
        assert not re.search(r"^\s*(from|import) click", source, re.MULTILINE), path.name


def test_module_runs_as_a_program(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "subspec_cli", "--version"]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60
    )
    assert (result.returncode, result.stdout) == (0, f"subspec {__version__}\n")
