"""Arithmetic of an answer's figures."""

import dataclasses
import itertools

import pytest

from subspec_cli.metrics import (
    GenerationStats,
    PassStats,
    PrefillProgress,
    ranges_of_totals,
    rate_of_totals,
    tau_of_totals,
)

PREFILLED = GenerationStats().after_prefill(
    prompt_tokens=20, prefilled_tokens=12, prefill_passes=1, ttft_s=0.5
)


def step(accepted, emitted=None, drafted=6):
    return PassStats(
        drafted=drafted,
        accepted=accepted,
        emitted=accepted + 1 if emitted is None else emitted,
        decode_time_s=1.0,
        draft_time_s=0.25,
        verify_time_s=0.5,
        wait_time_s=0.125,
        streamed_bytes=1_000_000,
    )


def after(*accepted):
    stats = PREFILLED
    for count in accepted:
        stats = stats.after_pass(step(count))
    return stats


def test_nothing_yet_divides_by_nothing():
    for stats in (GenerationStats(), PREFILLED):
        assert (stats.tau, stats.decode_tok_per_s, stats.link_gb_per_s) == (0, 0, 0)


def test_progress_of_a_prompt_extrapolates_its_rate():
    halfway = PrefillProgress(done_tokens=50.0, tokens=100, elapsed_s=4.0)
    assert (halfway.tok_per_s, halfway.left_s) == (12.5, 4.0)
    for nothing in (PrefillProgress(0, 100, 0.0), PrefillProgress(0, 100, 1.0)):
        assert (nothing.tok_per_s, nothing.left_s) == (0, None)


def test_the_prefill_gives_the_first_token():
    assert (PREFILLED.prompt_tokens, PREFILLED.prefilled_tokens, PREFILLED.ttft_s) == (20, 12, 0.5)
    assert (PREFILLED.new_tokens, PREFILLED.passes, PREFILLED.decode_time_s) == (1, 0, 0)


def test_a_step_adds_to_every_total():
    stats = after(4, 0, 4)
    assert stats.new_tokens == 1 + 5 + 1 + 5
    assert stats.passes == 3
    assert stats.drafted_tokens == 18
    assert stats.accepted_histogram == (1, 0, 0, 0, 2)
    assert (stats.draft_time_s, stats.verify_time_s, stats.wait_time_s) == (0.75, 1.5, 0.375)
    assert stats.streamed_bytes == 3_000_000
    assert (stats.decode_time_s, stats.ttft_s) == (3.0, 0.5)
    assert stats.recent_accepted == (4, 0, 4)


def test_tau_counts_the_bonus_token_but_not_the_first():
    assert after(4, 0, 4).tau == 11 / 3
    assert after(0, 0).tau == 1
    assert after(7).tau == 8


def test_rates_are_per_second_after_the_first_token():
    stats = after(4, 0, 4)
    assert stats.decode_tok_per_s == 11 / 3
    assert stats.link_gb_per_s == pytest.approx(0.001)


def test_tokens_cut_by_a_stop_are_not_counted():
    stats = PREFILLED.after_pass(step(5, emitted=2))
    assert stats.new_tokens == 3
    assert stats.tau == 2
    assert stats.accepted_histogram == (0, 0, 0, 0, 0, 1)


def test_the_live_display_gets_the_latest_passes():
    stats = after(*(n % 7 for n in range(60)))
    assert stats.recent_accepted == tuple(n % 7 for n in range(20, 60))
    assert sum(stats.accepted_histogram) == 60


def test_stats_are_values():
    before = dataclasses.asdict(PREFILLED)
    PREFILLED.after_pass(step(1))
    assert dataclasses.asdict(PREFILLED) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        PREFILLED.new_tokens = 3


def test_totals_are_ratios_of_sums_not_means_of_ratios():
    fast = dataclasses.replace(PREFILLED, new_tokens=101, decode_time_s=1.0, passes=10)
    slow = dataclasses.replace(PREFILLED, new_tokens=11, decode_time_s=9.0, passes=10)
    assert rate_of_totals([fast, slow]) == 11
    assert tau_of_totals([fast, slow]) == 5.5
    assert rate_of_totals(iter([fast])) == fast.decode_tok_per_s


def test_totals_of_nothing_are_zero():
    assert rate_of_totals([]) == tau_of_totals([]) == 0
    for stats in itertools.combinations([GenerationStats(), PREFILLED], 2):
        assert rate_of_totals(stats) == tau_of_totals(stats) == 0
    unfinished = dataclasses.replace(GenerationStats(), decode_time_s=2.0, passes=1)
    assert rate_of_totals([unfinished]) == tau_of_totals([unfinished]) == 0


def test_acceptance_by_depth_counts_passes_that_could_have_gone_on():
    """Of passes that reached a depth and whose tree went deeper, the share whose target went on."""
    stats = GenerationStats(new_tokens=1)
    for depth, accepted in ((3, 3), (3, 1), (2, 0), (5, 2), (0, 0)):
        stats = stats.after_pass(PassStats(depth=depth, accepted=accepted, emitted=accepted + 1))
    assert stats.reached_by_depth == (4, 3, 2, 0, 0)
    assert stats.acceptance_by_depth == (3 / 4, 2 / 3, 1 / 2, 0, 0)


def test_steps_and_link_time_add_up():
    stats = GenerationStats(new_tokens=1)
    for ready in (0, 4):
        step = PassStats(
            emitted=2,
            draft_steps=3,
            ready_nodes=ready,
            shadow_steps=5,
            useful_shadow_steps=ready // 2,
            shadow_levels=ready - ready // 4,
            draft_cost_s=0.3,
            shadow_time_s=0.2,
            link_time_s=0.5,
            decode_time_s=1.0,
        )
        stats = stats.after_pass(step)
    assert (stats.draft_steps, stats.shadow_steps, stats.shadow_hits) == (6, 10, 1)
    assert (stats.shadow_levels, stats.as_dict()["wasted_shadow_steps"]) == (3, 8)
    assert (stats.draft_cost_s, stats.shadow_time_s, stats.link_busy_share) == (0.6, 0.4, 0.5)


def test_the_record_holds_every_total_but_the_live_displays():
    values = GenerationStats(new_tokens=3).as_dict()
    assert "recent_accepted" not in values
    assert {"tau", "acceptance_by_depth", "reached_by_depth", "link_busy_share", "shadow_hits"} <= set(values)


def in_range(cached_rows, *, accepted=2, drafted=10, depth=4, emitted=3):
    return PassStats(
        cached_rows=cached_rows, accepted=accepted, drafted=drafted, depth=depth, emitted=emitted
    )


def test_acceptance_is_counted_by_the_cached_rows_of_each_pass():
    stats = PREFILLED
    for cached_rows in (0, 511, 512, 2047, 2048, 8191, 8192, 100_000, 100_000):
        stats = stats.after_pass(in_range(cached_rows))
    assert [(item.least_rows, item.most_rows, item.passes) for item in stats.by_cached_rows] == [
        (0, 511, 2),
        (512, 2047, 2),
        (2048, 8191, 2),
        (8192, None, 3),
    ]
    assert stats.cached_rows == 0 + 511 + 512 + 2047 + 2048 + 8191 + 8192 + 200_000
    assert sum(item.tokens for item in stats.by_cached_rows) == stats.new_tokens - 1
    assert sum(item.drafted for item in stats.by_cached_rows) == stats.drafted_tokens


def test_shares_of_a_range_are_ratios_of_its_totals():
    stats = PREFILLED
    # Rejected at the third of four levels, taken to the end of three, nothing drafted.
    for change in ({}, {"accepted": 3, "depth": 3, "emitted": 4}, {"accepted": 0, "drafted": 0, "depth": 0}):
        stats = stats.after_pass(in_range(600, **change))
    (found,) = (item for item in stats.by_cached_rows if item.passes)
    assert (found.passes, found.tokens, found.drafted, found.accepted) == (3, 10, 20, 5)
    assert found.levels == 3 + 3 + 0
    assert found.tokens_per_pass == 10 / 3
    assert found.accepted_share == 5 / 20
    assert found.level_acceptance == 5 / 6
    (values,) = stats.as_dict()["by_cached_rows"]
    assert values["level_acceptance"] == 5 / 6
    assert (values["least_rows"], values["most_rows"], values["passes"]) == (512, 2047, 3)


def test_ranges_of_answers_add_up_and_those_without_a_pass_are_left_out():
    one = PREFILLED.after_pass(in_range(100)).after_pass(in_range(9000))
    other = PREFILLED.after_pass(in_range(9000, accepted=0, emitted=1))
    found = ranges_of_totals([one, other, PREFILLED])
    assert [(item.least_rows, item.passes, item.tokens, item.accepted) for item in found] == [
        (0, 1, 3, 2),
        (8192, 2, 4, 2),
    ]
    assert ranges_of_totals([PREFILLED]) == ()
