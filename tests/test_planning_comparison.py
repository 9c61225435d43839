"""Predicted beside measured: totals, and what is not known."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes_cli import COSTS, PASS_S, PREDICTION

from subspec_cli.cli.comparison_text import comparison_line
from subspec_cli.metrics import GenerationStats
from subspec_cli.planning.comparison import compare
from subspec_cli.planning.costs import RowTimes, overlapped_s


def stats(**changes):
    usual = {
        "new_tokens": 31,
        "passes": 10,
        "decode_time_s": 5.0,
        "draft_time_s": 0.8,
        "verify_time_s": 4.0,
        "draft_steps": 40,
        "draft_cost_s": 1.2,
        "cached_rows": 1000,
    }
    return GenerationStats(**(usual | changes))


def test_times_are_ratios_of_totals():
    found = compare(PREDICTION, COSTS, [stats(), stats(passes=30, verify_time_s=20.0)], drafted=True)
    assert found.pass_s == pytest.approx(24.0 / 40)
    assert found.step_s == pytest.approx(1.6 / 80)
    assert found.tok_per_s == pytest.approx(60 / 10.0)
    assert (found.predicted_pass_s, found.predicted_step_s) == (PASS_S, 0.03)
    assert found.predicted_tok_per_s_given_tau == pytest.approx((60 / 40) / (PASS_S + 2.4 / 40))


def test_the_line_names_both_and_the_costs_origin():
    line = comparison_line(compare(PREDICTION, COSTS, [stats()], drafted=True))
    assert line == (
        "predicted (assumed costs) | measured with 100 tokens in the cache: pass 416 ms | 400 ms · "
        "draft step 30 ms | 20 ms · tok/s 6.78 | 6.00 · 5.60 predicted for this tau"
    )


def test_plain_decoding_is_set_beside_the_plain_prediction():
    found = compare(PREDICTION, COSTS, [stats(draft_steps=0, draft_time_s=0.0)], drafted=False)
    assert found.predicted_pass_s == PREDICTION.plain_pass_s
    assert found.predicted_tok_per_s == pytest.approx(1 / found.predicted_pass_s)
    assert (found.step_s, found.predicted_tok_per_s_given_tau) == (None, None)
    assert "draft step 25 ms | -" in comparison_line(found)


def test_nothing_measured_is_nothing_known():
    found = compare(PREDICTION, COSTS, [GenerationStats()], drafted=True)
    assert (found.pass_s, found.step_s, found.tok_per_s) == (None, None, None)
    assert comparison_line(found).endswith("tok/s 7.00 | -")


def test_the_prediction_is_for_the_cached_rows_of_the_run():
    """Long prompts make passes slower; that is no error of the costs."""
    slope = RowTimes((1,), (0.1,))
    costs = replace(COSTS, pass_attention=slope, step_attention=slope)
    answers = [stats(cached_rows=10 * (256 + 4096)), stats(cached_rows=10 * (256 + 8192))]
    found = compare(PREDICTION, costs, answers, drafted=True)
    more_s = 0.1 * 6144 / 1024
    assert found.cached_rows == 256 + 6144
    pass_s = overlapped_s(0.4, 0.2 + more_s)
    assert found.predicted_pass_s == pytest.approx(pass_s)
    assert found.predicted_tok_per_s == pytest.approx(3.5 / (pass_s + 4 * (0.025 + more_s)))
    plain = compare(PREDICTION, costs, [stats(draft_steps=0)], drafted=False)
    assert plain.predicted_pass_s == PREDICTION.plain_pass_s, "as planned below the base"
