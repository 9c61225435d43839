"""The picture of a benchmark: what it shows of a record, drawn without a display and without a word on stderr."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from test_bench_compare import document
from test_bench_voids import BUSY

from subspec_cli.__main__ import main
from subspec_cli.bench.plotted import part_times, plotted
from subspec_cli.errors import UsageError

STATS = {"decode_time_s": 1.0, "draft_time_s": 0.3, "verify_time_s": 0.6, "shadow_time_s": 0.1}


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib")


def record(tmp_path, **rates):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(document(**rates)))
    return path


def test_parts_of_the_time_add_up_per_token():
    found = part_times([STATS | {"wait_time_s": 0.2, "new_tokens": 11}])
    assert found == pytest.approx({"draft": 30, "shadow": 10, "wait": 20, "compute": 30, "rest": 10})
    assert set(part_times([STATS | {"wait_time_s": 0.2, "new_tokens": 1}]).values()) != {0}


def test_a_question_has_its_ratios_and_its_tau():
    found = plotted(document())
    (question,) = found.questions
    assert (question.question_id, question.category, question.void) == ("1", "writing", 0)
    assert question.median == pytest.approx(4.0)
    assert question.tau == pytest.approx(5.0)
    assert found.speedup == pytest.approx(4.0)
    assert not any(arm.is_void for arm in found.arms)


def test_void_figures_are_marked():
    found = plotted(document(fast_use=BUSY))
    assert (found.questions[0].median, found.questions[0].void, found.speedup) == (None, 1, None)
    assert [arm.is_void for arm in found.arms] == [False, True]
    assert any("busy" in reason for reason in found.void_reasons)


def test_questions_are_kept_together_by_category():
    whole = document()
    (answer,) = whole["answers"]
    whole["answers"] = [
        answer | {"question_id": name, "category": category}
        for name, category in (("1", "a"), ("2", "b"), ("3", "a"), ("1", "a"))
    ]
    assert [(item.question_id, len(item.ratios)) for item in plotted(whole).questions] == [
        ("1", 2),
        ("3", 1),
        ("2", 1),
    ]


@pytest.mark.parametrize("changed", [{"answers": []}, {"answers": [{}]}, {"rows": []}, {"answers": "x"}])
def test_a_record_without_figures_is_refused(changed):
    with pytest.raises(UsageError):
        plotted(document() | changed)


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml")])
def test_a_record_is_drawn(capsys, tmp_path, matplotlib, name, begins):
    drawn = tmp_path / name
    argv = ["bench", "plot", str(record(tmp_path)), "--plot", str(drawn)]
    assert main(argv) == 0
    assert drawn.read_bytes().startswith(begins)
    assert main(argv) == 0, "a picture may be drawn again"
    assert capsys.readouterr().err.splitlines() == [f"drawn as {drawn}"] * 2
    drawn.write_text("mine")
    assert main(argv) == 2
    assert drawn.read_text() == "mine"


def test_a_picture_says_what_is_void(tmp_path, matplotlib):
    drawn = tmp_path / "a.svg"
    assert main(["bench", "plot", str(record(tmp_path, fast=60.0)), "--plot", str(drawn)]) == 0
    text = drawn.read_text()
    assert "void: a ratio above 1.05 tau" in text
    for word in ("Speed-up by question", "milliseconds per token", "share of passes (%)", ">void<"):
        assert word in text


def test_equal_records_give_equal_pictures_whatever_letters_names_have(tmp_path, matplotlib):
    path = record(tmp_path, category="数学 $x$ \\frac")
    for name in ("a.svg", "b.svg"):
        argv = ["bench", "plot", str(path), "--plot", str(tmp_path / name)]
        code = f"from subspec_cli.__main__ import main; main({argv!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stderr == f"drawn as {tmp_path / name}\n"
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_picture_that_could_not_be_written_is_refused_before_measuring(capsys, tmp_path, matplotlib):
    for name, message in [
        ("a.pdf", "must end in .png or .svg"),
        ("absent/a.png", "cannot be written"),
    ]:
        assert main(["bench", "sample", "--plot", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_without_matplotlib_the_command_that_installs_it_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "plot", str(record(tmp_path)), "--plot", str(tmp_path / "a.png")]) == 2
    assert "pip install 'subspec-cli[plot]'" in capsys.readouterr().err


def test_plot_takes_one_record_alone(capsys, tmp_path):
    path = str(record(tmp_path))
    for argv in ([], [path], [path, path, "--plot", "a.png"], [path, "--plot", "a.png", "--limit", "3"]):
        assert main(["bench", "plot", *argv]) == 2
        assert "plot takes one record and --plot" in capsys.readouterr().err
