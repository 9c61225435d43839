"""The check of a GPU: what it makes of results, on dummy ones; the run itself is rehearsed by hand on the CPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from subspec_cli.bench.answers import AnswerPair, ArmAnswer
from subspec_cli.bench.report import BenchReport, LinkFigures
from subspec_cli.cli.documents import bench_document
from subspec_cli.metrics import GenerationStats

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import gpu_check
from gpu_check import FAILED, OK, Arm, Check, Row, arm_rows, exit_status, row_of_tests, table

SERIAL = Arm("serial")
LINK = LinkFigures(2_000_000_000, 40_000_000_000, 2.0, None)


def report(**changes: Any) -> dict[str, Any]:
    """The document of a run: 41 tokens in 2 passes of 2 GB at 20 GB/s and 2 s, plain 4 tokens/s."""
    tokens = tuple(range(41))
    stats = GenerationStats(
        prompt_tokens=9, new_tokens=41, decode_time_s=2.0, passes=2, draft_steps=50, draft_time_s=0.25
    )
    plain = GenerationStats(prompt_tokens=9, new_tokens=9, decode_time_s=2.0, passes=8)
    pair = AnswerPair(
        "1", "writing", 1, ArmAnswer(tokens[:9], "", "length", plain), ArmAnswer(tokens, "", "stop", stats)
    )
    whole = BenchReport(
        suite="sample",
        pairs=(pair,),
        best_plain=(),
        link=LINK,
        exactness="exact",
        speculation=True,
        interrupted=False,
        context={"peak_memory_bytes": 6 << 30, "budget_bytes": 8 << 30},
    )
    return bench_document(replace(whole, **changes))


def rows_of(raw: float = 25.0, reserved: int = 1 << 29, **changes: Any) -> dict[str, Row]:
    return {row.what: row for row in arm_rows(SERIAL, report(**changes), raw, reserved)}


def test_a_good_run_in_figures() -> None:
    rows = rows_of()
    assert {what: (row.figure, row.verdict) for what, row in rows.items()} == {
        "serial: plain": ("4.00 tok/s", ""),
        "serial: tokens": ("20.00 tok/s, 5.00x", ""),
        "serial: identical answers": ("1 of 1 (exact)", OK),
        "serial: link": ("20.00 GB/s, 80% of the link alone", ""),
        "serial: tau": ("20.00", ""),
        "serial: draft step": ("5.00 ms", ""),
        "serial: share of ceiling": ("10% of 200.00 tok/s", ""),
        "serial: memory": ("6.50 of 8.00 GiB", OK),
    }
    assert exit_status(list(rows.values())) == 0


def test_a_draft_step_is_the_ratio_of_totals() -> None:
    """Nodes do not count, nor does what was drafted in the shadow of a pass."""
    (pair,) = make_pairs()
    quick = GenerationStats(new_tokens=3, passes=2, drafted_tokens=90, draft_steps=3, draft_time_s=0.03)
    shadow = {"shadow_steps": 5, "shadow_time_s": 4.0}
    slow = GenerationStats(new_tokens=3, passes=2, draft_steps=1, draft_time_s=0.09, **shadow)
    pairs = [replace(pair, speculative=replace(pair.speculative, stats=stats)) for stats in (quick, slow)]
    assert rows_of(pairs=tuple(pairs))["serial: draft step"].figure == "30.00 ms"


def test_another_answer_fails() -> None:
    (pair,) = make_pairs()
    other = replace(pair, plain=replace(pair.plain, token_ids=(7, *pair.plain.token_ids[1:])))
    rows = rows_of(pairs=(other,))
    assert rows["serial: identical answers"] == Row("serial: identical answers", "0 of 1 (exact)", FAILED)
    assert exit_status(list(rows.values())) == 1


def make_pairs() -> tuple[AnswerPair, ...]:
    arm = ArmAnswer((1, 2, 3), "", "length", GenerationStats(new_tokens=3, decode_time_s=1.0, passes=2))
    return (AnswerPair("1", "writing", 1, arm, arm),)


def test_more_memory_than_the_budget_fails() -> None:
    """What CUDA takes for itself counts: 6 GiB of tensors and 2.5 GiB beside them are no 8."""
    assert rows_of(reserved=5 << 29)["serial: memory"].verdict == FAILED
    assert rows_of(reserved=2 << 30)["serial: memory"].verdict == OK


@pytest.mark.parametrize("link", [None, replace(LINK, read_time_s=0.0)])
def test_a_link_that_moved_nothing_fails(link: LinkFigures | None) -> None:
    assert rows_of(link=link)["serial: link"].verdict == FAILED


def test_nothing_drafted_and_nothing_answered_fail() -> None:
    assert rows_of(pairs=make_pairs())["serial: draft step"].verdict == FAILED
    assert rows_of(pairs=())["serial: answers"].verdict == FAILED


@pytest.mark.parametrize(
    ("output", "status", "wants_gpu", "verdict", "figure"),
    [
        ("..\n13 passed, 700 deselected in 9.1s", 0, True, OK, "13 passed"),
        ("..\n12 passed, 1 failed, 700 deselected in 9.1s", 1, True, FAILED, "12 passed, 1 failed"),
        ("ss\n13 skipped, 700 deselected in 9.1s", 0, True, FAILED, "13 skipped"),
        ("ss\n12 passed, 1 skipped in 9.1s", 0, True, FAILED, "12 passed, 1 skipped"),
        ("ss\n13 skipped, 700 deselected in 9.1s", 0, False, "", "13 skipped"),
        ("1 error in 2s", 2, False, FAILED, "1 error"),
        ("", 4, True, FAILED, "exit status 4"),
    ],
)
def test_what_the_tests_say(output: str, status: int, wants_gpu: bool, verdict: str, figure: str) -> None:
    assert row_of_tests(output, status, wants_gpu=wants_gpu) == Row("CUDA tests", figure, verdict)


def test_the_table_is_in_columns() -> None:
    lines = table([Row("a", "1 GB/s"), Row("longer", "2", FAILED)]).splitlines()
    assert lines[0] == "what    figure  verdict"
    assert set(lines[1]) == {"-"}
    assert lines[2:] == ["a       1 GB/s", "longer  2       FAILED"]


def test_without_a_gpu_nothing_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main(["--work", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "none can be used here" in out
    assert "FAILED" in out
    assert not list(tmp_path.iterdir())


def test_a_step_that_fails_ends_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands that are run, in order; the surrogate's maker fails here."""
    commands: list[str] = []

    def run(self: Check, *command: str) -> SimpleNamespace:
        commands.append(" ".join(command))
        return SimpleNamespace(stdout="1 passed", returncode=int("make_surrogate" in command[0]))

    monkeypatch.setattr(Check, "run", run)
    assert gpu_check.main(["--device", "cpu", "--small", "--work", str(tmp_path)]) == 1
    assert len(commands) == 2
    assert "--feed-forward 1600 --vocab 5000" in commands[1]
    assert "surrogate" in capsys.readouterr().out


def test_the_shape_is_that_of_a_7b_model() -> None:
    shape = gpu_check.SEVEN_B
    assert (shape.hidden, shape.layers, shape.feed_forward, shape.vocab) == (3584, 28, 18944, 152064)
    assert shape.flags[:2] == ("--vram-gb", "8")
