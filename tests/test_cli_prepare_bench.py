"""`subspec prepare` and `subspec bench`: what they show, write and return."""

import io
import json
import shlex
import sys
from pathlib import Path

import pytest
from fakes_cli import (
    FakeBenchProgress,
    FakeDownload,
    FakePrepareProgress,
    FakePrepareReport,
    bench_report,
    module,
    on_terminal,
)

from subspec_cli.__main__ import main
from subspec_cli.cli.bench import _Keeper
from subspec_cli.cli.output import Output
from subspec_cli.cli.prepare import progress_share, progress_text


@pytest.fixture(autouse=True)
def no_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))


@pytest.fixture
def preparing(monkeypatch):
    """Let `prepare` give this report; gives what it was called with."""

    def use(report):
        calls = []

        def prepare(model, wanted, *, revision, force, follow_links, progress, reporter):
            calls.append((model, wanted.bits, wanted.optimizer, wanted.overrides, revision, force))
            reporter.note("waiting: another process (pid 7) is preparing it")
            for layer in range(1, 5):
                progress(FakePrepareProgress(layer, 4, layer << 20, 4 << 20, layer * 0.5))
            return report

        monkeypatch.setitem(
            sys.modules, "subspec_cli.session.prepare", module("subspec_cli.session.prepare", prepare=prepare)
        )
        monkeypatch.setattr("subspec_cli.cli.prepare._TUNED_BYTES", 1 << 60)
        return calls

    return use


def test_prepare_shows_progress_summary_and_next_command(capsys, preparing):
    calls = preparing(FakePrepareReport())
    assert main(["prepare", "demo"]) == 0
    captured = capsys.readouterr()
    assert calls == [("demo", 4, "minmax", (), None, False)]
    assert captured.err.splitlines()[:2] == [
        "preparing demo …",
        "waiting: another process (pid 7) is preparing it",
    ]
    assert captured.err.splitlines()[-1] == "layer 4/4 · 4.00 MiB of 4.00 MiB · 2.1 MB/s"
    made = "4 layers, 800.0 MiB of substitutes for 3.00 GiB of weights"
    assert [" ".join(line.split()) for line in captured.out.splitlines() if line.strip(" ─")] == [
        f"prepared demo in 1:01: {made}, 4.25 bits per weight at 21.5 dB",
        "matrix bits bits/weight SQNR",
        "q 4 4.25 21.2 dB",
        "down 8 8.01 no loss",
        "all mixed 4.25 21.5 dB",
        "head 4 4.50 20.5 dB",
        "in /cache/demo-int4",
        'next: subspec run --model demo --memory-gb 1.5 "…"',
    ]


@pytest.mark.parametrize(("gpu", "flag"), [(False, "--memory-gb"), (True, "--vram-gb")])
def test_the_next_command_has_the_budget_of_the_device(capsys, preparing, monkeypatch, gpu, flag):
    monkeypatch.setattr("subspec_cli.cli.prepare.has_gpu", lambda: gpu)
    preparing(FakePrepareReport())
    assert main(["prepare", "demo"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f'next: subspec run --model demo {flag} 1.5 "…"'


def test_prepare_shows_the_download_while_there_is_one():
    state = FakePrepareProgress(1, 4, 1 << 30, 4 << 30, 9.0, FakeDownload())
    assert progress_text(state) == "file 2/5 · 6.00 GiB of 14.0 GiB · 21.5 MB/s · 6:40 left · layer 1/4"
    assert progress_share(state) == (6 << 30, 14 << 30)
    state = FakePrepareProgress(4, 4, 3 << 30, 4 << 30, 9.0)
    assert progress_text(state).startswith("head · 3.00 GiB of 4.00 GiB")
    state = FakePrepareProgress(1, 4, 1 << 30, 4 << 30, 9.0, FakeDownload(done_files=5))
    assert progress_text(state).startswith("layer 1/4 · 1.00 GiB of 4.00 GiB")
    assert progress_share(state) == (1 << 30, 4 << 30)


def test_prepare_passes_flags_on_and_says_when_nothing_was_to_do(capsys, preparing):
    calls = preparing(FakePrepareReport(already_prepared=True, sqnr_db=None))
    assert main(["prepare", "a/b", "--bits", "8", "--optimizer", "hqq", "--revision", "v1", "--force"]) == 0
    assert calls == [("a/b", 8, "hqq", (), "v1", True)]
    out = capsys.readouterr().out
    assert "weight at" not in out
    assert out.startswith("demo is already prepared; --force does it again: 4 layers")


def test_prepare_takes_its_settings_from_a_file_and_flags_win(capsys, preparing, tmp_path):
    calls = preparing(FakePrepareReport())
    overrides = "[substitute.overrides]\n'*.down_proj' = 8\n"
    (tmp_path / "own.toml").write_text(f"[substitute]\nbits = 2\noptimizer = 'hqq'\n{overrides}")
    (tmp_path / "subspec.toml").write_text("[model]\nbits = 8\n")
    assert main(["prepare", "demo", "--config", "own.toml"]) == 0
    assert capsys.readouterr().err.startswith("preparing demo with own.toml …")
    assert main(["prepare", "demo", "--config", "own.toml", "--bits", "4", "--optimizer", "minmax"]) == 0
    assert main(["prepare", "demo"]) == 0
    assert calls == [
        ("demo", 2, "hqq", (("*.down_proj", 8),), None, False),
        ("demo", 4, "minmax", (("*.down_proj", 8),), None, False),
        ("demo", 8, "minmax", (), None, False),
    ]
    (tmp_path / "subspec.toml").write_text("[substitute]\nbit = 8\n")
    assert main(["prepare", "demo"]) == 2
    assert "substitute.bit = 8: unknown key" in capsys.readouterr().err


def test_prepare_json(capsys, preparing):
    preparing(FakePrepareReport())
    assert main(["prepare", "demo", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    report = {"model_id": "demo", "directory": "/cache/demo-int4", "sqnr_db": None}
    assert document == report | {"residuals": None}


def test_prepare_on_a_terminal_has_a_bar_with_rate_and_time_left(preparing, monkeypatch):
    _, stderr = on_terminal(monkeypatch)
    preparing(FakePrepareReport())
    assert main(["prepare", "demo"]) == 0
    shown = stderr.getvalue()
    assert "━" in shown
    assert "layer 4/4" in shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")


def test_prepare_refuses_before_loading(capsys, preparing):
    calls = preparing(FakePrepareReport())
    assert main(["prepare", "demo", "--bits", "5"]) == 2
    assert "--bits must be 2, 4 or 8, not 5" in capsys.readouterr().err
    assert main(["prepare", "demo", "--optimizer", "adam"]) == 2
    assert "'adam' is not one of 'minmax', 'hqq'" in capsys.readouterr().err
    assert main(["prepare", ""]) == 2
    assert "MODEL is empty" in capsys.readouterr().err
    assert not calls


@pytest.fixture
def benching(monkeypatch):
    """Let `bench` give this report; gives what it was called with."""

    def use(report):
        calls = []

        def run_bench(config, suite, *, progress, on_question):
            calls.append((config, suite))
            progress(FakeBenchProgress(1, 4, 10.0, "writing, question 1"))
            progress(FakeBenchProgress(4, 4, 40.0, "done"))
            return report

        def atomic_write(path, content):
            Path(path).write_bytes(content)

        runner, files = "subspec_cli.bench.runner", "subspec_cli.files.atomic_write"
        monkeypatch.setitem(sys.modules, runner, module(runner, run_bench=run_bench))
        monkeypatch.setitem(sys.modules, files, module(files, atomic_write=atomic_write))
        return calls

    return use


def test_bench_table_and_json_file(capsys, benching, tmp_path):
    calls = benching(bench_report())
    argv = "bench sample --limit 2 --max-new-tokens 48 --plain-tokens 16 --vram-gb 1 --output out.json"
    assert main(argv.split()) == 0
    config, suite = calls[0]
    assert suite == "sample"
    assert config.as_dict()["bench"] == {
        "limit": 2,
        "max_new_tokens": 48,
        "plain_tokens": 16,
        "peer": None,
        "plot": None,
        "questions": None,
        "repeat": 1,
        "resume": None,
    }
    captured = capsys.readouterr()
    header, _, row, total, *_ = [line for line in captured.out.splitlines() if line.strip()]
    columns = "category answers identical plain tok/s subspec tok/s speedup same plan speedup tau prefilled"
    assert header.split() == columns.split()
    assert row.split() == ["writing", "4", "4", "1.50", "9.15", "6.10x", "-", "7.25", "92"]
    assert total.split()[0] == "all"
    assert captured.out.splitlines()[-3:-1] == [
        "4 of 4 answers token for token identical (exact)",
        "speedup over the same plan by answer: median 6.10x, 6.10x to 6.10x",
    ]
    assert captured.err.splitlines()[0] == "subspec 0.1.0 · bench sample · loading the model prepared last …"
    assert "4/4 · done" in captured.err
    assert "written to out.json" in captured.err
    document = json.loads((tmp_path / "out.json").read_text())
    assert [answer["identical"] for answer in document["answers"]] == [True] * 4
    assert document["summary"] == captured.out.splitlines()[-3:]
    assert "\x1b" not in captured.out + captured.err


def test_bench_json_on_stdout_is_alone_there(capsys, benching):
    benching(bench_report())
    assert main(["bench", "sample", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["interrupted"] is False
    assert "writing" in captured.err
    assert "median 6.10x" in captured.err


def test_bench_overwrites_only_the_record_of_the_same_command(capsys, benching, tmp_path, monkeypatch):
    calls = benching(bench_report())
    target = tmp_path / "out.json"
    argv = ["bench", "sample", "--output", str(target)]
    monkeypatch.setattr(sys, "argv", ["subspec", *argv])
    for content in ("mine", "{}", '{"record": {"kind": "subspec bench", "command": "subspec bench x"}}'):
        target.write_text(content)
        assert main(argv) == 2
        assert target.read_text() == content
        assert "exists and is not a record of the same command" in capsys.readouterr().err
    assert not calls
    assert main([*argv, "--force"]) == 0
    record = {"record": {"kind": "subspec bench", "command": shlex.join(["subspec", *argv])}}
    target.write_text(json.dumps(record))
    assert main(argv) == 0
    assert json.loads(target.read_text())["model"] == "demo"


def test_bench_does_not_throw_an_interrupted_record_away(capsys, benching, tmp_path, monkeypatch):
    calls = benching(bench_report())
    target = tmp_path / "out.json"
    argv = ["bench", "sample", "--output", str(target)]
    monkeypatch.setattr(sys, "argv", ["subspec", *argv])
    record = {"kind": "subspec bench", "command": shlex.join(["subspec", *argv])}
    target.write_text(json.dumps({"record": record, "interrupted": True, "answers": [{}, {}]}))
    assert main(argv) == 2
    assert "holds 2 answers of an interrupted run" in capsys.readouterr().err
    assert not calls
    assert main([*argv, "--force"]) == 0


def test_a_record_that_cannot_be_written_is_told_once_and_the_run_goes_on(capsys, tmp_path):
    report, errors = bench_report(), io.StringIO()
    keeper = _Keeper(Output(stderr=errors), tmp_path / "absent" / "out.json")
    keeper.keep(report)
    keeper.keep(report)
    assert errors.getvalue().count("not written before the end") == 1


def test_bench_updates_the_record_that_it_resumes(capsys, benching, tmp_path):
    calls = benching(bench_report())
    target = tmp_path / "out.json"
    assert main(["bench", "sample", "--resume", str(target)]) == 2
    assert "no such file" in capsys.readouterr().err
    target.write_text("an interrupted record")
    assert main(["bench", "sample", "--resume", str(target)]) == 0
    assert calls[0][0].bench.resume == str(target)
    assert json.loads(target.read_text())["model"] == "demo"


def test_bench_interrupted_shows_what_is_done(capsys, benching, tmp_path):
    benching(bench_report(interrupted=True))
    assert main(["bench", "mt-bench", "--output", "out.json"]) == 130
    captured = capsys.readouterr()
    assert "writing" in captured.out
    assert "interrupted: these are the answers that were done" in captured.err
    assert (tmp_path / "out.json").exists()


@pytest.mark.parametrize(("exactness", "status"), [("exact", 9), ("numeric", 0)])
def test_bench_fails_when_exact_answers_differ(capsys, benching, exactness, status):
    benching(bench_report(identical=3, exactness=exactness, interrupted=status == 9))
    assert main(["bench", "sample"]) == status
    message = "subspec: error: 1 of 4 answers differ from plain decoding"
    assert (message in capsys.readouterr().err) == (status == 9)


def test_bench_refuses_what_would_be_lost_later(capsys, benching, tmp_path):
    calls = benching(bench_report())
    assert main(["bench", "sample", "--output", "absent/out.json"]) == 2
    assert main(["bench", "sample", "--output", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["bench", "mt-bench", "--questions", "absent.jsonl"]) == 2
    assert "--questions absent.jsonl: no such file" in capsys.readouterr().err
    assert not calls
