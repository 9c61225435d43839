"""Figures that mean nothing: each rule on made-up measurements, and what the table and the document show of them."""

from __future__ import annotations

import csv
import io
import json

import pytest

from subspec_cli.bench.answers import AnswerPair, ArmAnswer, BestPlainAnswer
from subspec_cli.bench.figures import FIGURES, Spread
from subspec_cli.bench.report import BenchReport
from subspec_cli.bench.voids import PlainRates, pair_reasons, row_voids
from subspec_cli.cli.bench import Outputs, show_report
from subspec_cli.cli.bench_table import table_cells
from subspec_cli.cli.comparison_text import prediction_note, summary_lines
from subspec_cli.cli.documents import bench_document
from subspec_cli.cli.output import Output
from subspec_cli.metrics import GenerationStats
from subspec_cli.planning.comparison import Comparison
from subspec_cli.probe.machine_use import MachineUse, cpu_times, total_use

IDLE = MachineUse(core_s=10.0, own_s=8.0, busy_s=8.5)
BUSY = MachineUse(core_s=10.0, own_s=5.0, busy_s=8.0)
STOLEN = MachineUse(core_s=10.0, own_s=5.0, busy_s=5.0, steal_s=2.0)
SHORT = MachineUse(core_s=0.2, own_s=0.0, busy_s=0.2)
RATES = PlainRates(1.2, 1.0)
ROW = {"plain_tok_per_s": 1.0, "speculative_tok_per_s": 6.0, "speedup_same_plan": 6.0, "speedup": 5.0}


def voids(*, tau=7.0, load=0.0, rates=RATES, figures=ROW, **uses):
    measured = {figure: Spread(value, value, value) for figure, value in figures.items()}
    found = {"plain": IDLE, "speculative": IDLE, "best_plain": IDLE} | uses
    return row_voids(measured, tau, found, rates, load)


def figures_of(found):
    return [void.figure for void in found]


def answer(rate, use=IDLE, passes=10):
    """Eleven tokens at this rate."""
    return ArmAnswer(
        (1,), "a", "stop", GenerationStats(new_tokens=11, decode_time_s=10 / rate, passes=passes), use
    )


def report(*, plain=1.0, fast=4.0, best=1.2, fast_use=IDLE, best_use=IDLE, load=0.0, category="writing"):
    pair = AnswerPair("1", category, 1, answer(plain), answer(fast, fast_use, passes=2))
    best_plain = tuple(BestPlainAnswer("1", when, answer(best, best_use)) for when in ("before", "after"))
    return BenchReport(
        "sample", (pair,), best_plain, None, "exact", True, False, {"model": "m"}, load_per_core=load
    )


def test_an_idle_machine_voids_nothing():
    assert voids() == ()
    assert voids(figures=ROW | {"speedup_same_plan": 7.3}) == ()


def test_a_ratio_above_tau_is_impossible():
    (void,) = voids(figures=ROW | {"speedup_same_plan": 7.4})
    assert void.figure == "speedup_same_plan"
    assert "above 1.05 tau" in void.reason
    both = voids(figures=ROW | {"speedup_same_plan": 68.2, "speedup": 93.0})
    assert figures_of(both) == ["speedup_same_plan", "speedup"]


def test_one_impossible_repetition_voids_the_row():
    measured = {"speedup_same_plan": Spread(6.0, 5.0, 68.2)}
    uses = dict.fromkeys(("plain", "speculative", "best_plain"), IDLE)
    assert figures_of(row_voids(measured, 7.0, uses, PlainRates(None, None), None)) == ["speedup_same_plan"]


@pytest.mark.parametrize(("best", "found"), [(0.94, ["speedup"]), (0.96, []), (None, [])])
def test_a_best_plan_is_not_slower_than_another(best, found):
    assert figures_of(voids(rates=PlainRates(best, 1.0))) == found


@pytest.mark.parametrize("use", [BUSY, STOLEN])
@pytest.mark.parametrize(
    ("arm", "found"),
    [
        ("plain", ["plain_tok_per_s", "speedup_same_plan"]),
        ("speculative", ["speculative_tok_per_s", "speedup_same_plan", "speedup"]),
        ("best_plain", ["speedup"]),
    ],
)
def test_others_on_the_cores_void_what_the_arm_gave(use, arm, found):
    assert figures_of(voids(**{arm: use})) == found


@pytest.mark.parametrize(("load", "busy"), [(0.6, True), (0.4, False), (None, False)])
def test_the_load_before_decides_for_what_is_too_short_to_tell(load, busy):
    assert bool(voids(load=load, plain=SHORT)) is busy
    assert voids(load=load, plain=IDLE) == ()


def test_shares_are_of_all_spans_together():
    assert IDLE.others_share == pytest.approx(0.05)
    assert STOLEN.others_share == pytest.approx(0.2)
    assert SHORT.others_share is SHORT.own_share is None
    both = total_use([IDLE, BUSY])
    assert (both.own_share, both.others_share) == (pytest.approx(0.65), pytest.approx(0.175))
    assert both.since(IDLE).others_share == BUSY.others_share


def test_processor_time_is_read_of_the_usable_cores_alone():
    stat = (
        "cpu  9 9 9 9 9 9 9 9 0 0\n"
        "cpu0 100 10 20 700 50 3 7 40 0 0\n"
        "cpu1 200 0 0 800 0 0 0 0 0 0\n"
        "cpu10 900 0 0 0 0 0 0 0 0 0\n"
        "intr 5\n"
    )
    assert cpu_times(stat, {0, 1}, 100) == (pytest.approx(3.4), pytest.approx(0.4))
    assert cpu_times("cpu0 100 0 0 0 0 0 0\n", {0}, 100) == (1.0, 0.0)


def test_an_answer_is_void_by_itself():
    assert pair_reasons(AnswerPair("1", "c", 1, answer(1.0), answer(4.0, passes=2)), 0.0) == ()
    impossible = AnswerPair("1", "c", 1, answer(1.0), answer(40.0, BUSY, passes=2))
    assert ["busy" in reason for reason in pair_reasons(impossible, 0.0)] == [True, False]


def test_void_figures_are_never_shown():
    found = report(fast=60.0)
    assert found.rows[-1].measured["speedup_same_plan"].median == pytest.approx(60.0)
    assert table_cells(found.rows[-1], FIGURES)[3:7] == ["1.00", "60.00", "void", "void"]
    lines = summary_lines(found)
    assert lines[0].startswith("void: speedup same plan, speedup of writing, all: a ratio above 1.05 tau")
    assert not any("60.00x" in line for line in lines)
    document = json.loads(json.dumps(bench_document(found)))
    row = document["rows"][-1]
    assert row["speedup_same_plan"] is row["speedup"] is document["answers"][0]["speedup_same_plan"] is None
    assert [len(row["void"][figure]) for figure in ("speedup_same_plan", "speedup")] == [1, 1]
    assert row["spread"].keys() == {"plain_tok_per_s", "speculative_tok_per_s"}
    assert len(document["answers"][0]["void"]) == 1


def test_a_busy_machine_is_named_with_its_shares():
    lines = summary_lines(report(fast_use=BUSY, load=1.5))
    assert "others took more than 10% of the cores during speculative decoding" in lines[0]
    assert lines[-1] == (
        "share of the cores, subspec | others: plain 80% | 5% · speculative 50% | 30% · "
        "best plain 80% | 5%; load before 1.50 a core"
    )


def test_a_best_plan_that_was_slower_shows_both_rates():
    lines = summary_lines(report(fast=3.0, best=0.7))
    assert lines[0] == (
        "void: speedup of writing, all: plain decoding's own best plan was slower than the plan of both arms: "
        "0.70 and 1.00 tok/s for the same turns"
    )


@pytest.mark.parametrize(
    ("measured", "note"),
    [(1.5, "3.1 times slower"), (11.0, "2.4 times faster"), (2.4, None), (9.0, None), (None, None)],
)
def test_a_prediction_that_was_far_off_is_noted(measured, note):
    found = prediction_note(Comparison(None, 1.0, 1.0, 1.0, 1.0, 4.62, measured, None, 1.0, "measured"))
    assert found is None if note is None else note in found
    assert note is None or f"({measured:.3g} tok/s, predicted 4.62): --reprobe" in found


def test_low_acceptance_alone_is_no_reason_to_time_the_machine_anew():
    low = Comparison(None, 1.0, 1.0, 1.0, 1.0, 9.0, 2.0, 1.9, 1.0, "measured")
    assert prediction_note(low) is None
    slow = Comparison(None, 1.0, 1.0, 1.0, 1.0, 9.0, 2.0, 8.0, 1.0, "measured")
    assert (
        "4.0 times slower than predicted (2 tok/s, predicted 8 for this tau): --reprobe"
        in prediction_note(slow)
    )


def test_a_best_plan_on_a_busy_machine_has_no_rate():
    found = report(best_use=BUSY)
    assert not any(
        line.startswith("plain decoding under its own best plan:") for line in summary_lines(found)
    )
    document = bench_document(found)
    assert "busy" in document["best_plain_void"]
    assert document["best_plain_tok_per_s"] is document["best_plain_after_tok_per_s"] is None
    assert bench_document(report())["best_plain_before_tok_per_s"] == pytest.approx(1.2)
    assert bench_document(report())["best_plain_void"] is None


@pytest.mark.parametrize(("use", "shown"), [(BUSY, "void"), (IDLE, "4.00x")])
@pytest.mark.parametrize("shape", ["table", "markdown", "csv", "json"])
def test_a_busy_machine_voids_the_ratio_in_every_format_and_an_idle_one_leaves_it(use, shown, shape):
    out, err = io.StringIO(), io.StringIO()
    show_report(report(fast_use=use), Output(stdout=out, stderr=err), Outputs(shape, None))
    text = out.getvalue()
    assert ("the machine was busy" in text) == (use is BUSY)
    if shape in ("table", "markdown"):
        assert (shown in text, "4.00x" in text) == (True, use is IDLE)
    elif shape == "csv":
        rows = list(csv.DictReader(io.StringIO(text)))
        assert [row["speedup_same_plan"] for row in rows] == (["4.0"] if use is IDLE else [""]) * 2
    else:
        rates = [row["speedup_same_plan"] for row in json.loads(text)["rows"]]
        assert rates == ([pytest.approx(4.0)] if use is IDLE else [None]) * 2
