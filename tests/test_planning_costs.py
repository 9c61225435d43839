"""Costs: snapped to the grid so that noise decides nothing, and read back as they were written."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_planning_plan import make_geometry

from subspec_cli.planning.assumed_costs import assumed_costs
from subspec_cli.planning.costs import (
    MachineCosts,
    PlanCosts,
    RowTimes,
    attention_times,
    overlapped_s,
    snapped,
    weighted_sum,
)
from subspec_cli.planning.timing import DepthOption, RoundTiming, shadow_levels

GEOMETRY = make_geometry()
COSTS = PlanCosts(
    link_s=1.0,
    compute=RowTimes((1, 11), (0.5, 1.5)),
    step=RowTimes((1,), (0.1,)),
    pass_attention=RowTimes((1, 11), (0.1, 0.5)),
    step_attention=RowTimes((1, 5), (0.01, 0.03)),
)


@given(st.floats(1e-9, 1e12))
def test_quantised_values_lie_on_a_grid_of_a_few_per_cent(value):
    found = snapped(value)
    assert abs(found / value - 1) < 0.023
    assert snapped(found) == found


def test_small_noise_decides_nothing():
    assert len({snapped(0.01632 * (1 + noise)) for noise in (-0.005, 0.0, 0.005)}) == 1
    assert snapped(0.0) == snapped(-1.0) == 0.0


def test_times_lie_on_straight_lines_between_what_was_timed():
    times = RowTimes((1, 4, 8), (1.0, 4.0, 4.4))
    assert [times.at(rows) for rows in (0, 1, 2, 4, 6, 8)] == pytest.approx([1.0, 1.0, 2.0, 4.0, 4.2, 4.4])
    assert times.at(16) == pytest.approx(5.2), "and go on as the last two"
    assert RowTimes((1,), (3.0,)).at(50) == 3.0


def test_more_rows_never_take_less():
    assert RowTimes((1, 2, 3), (2.0, 1.0, 4.0)).snapped().seconds == (2.0, 2.0, 4.0)


def test_pieces_one_after_another_add_up():
    whole = weighted_sum([(2, RowTimes((1, 4), (1.0, 4.0))), (1, RowTimes((1, 2), (10.0, 20.0)))])
    assert whole.rows == (1, 2, 4)
    assert whole.seconds == pytest.approx((12.0, 24.0, 48.0))


def test_a_pass_takes_the_longer_of_link_and_computing_and_a_part_of_the_other():
    for rows, longer in ((1, 1.0), (6, 1.0), (11, 1.5)):
        assert longer < COSTS.pass_s(rows, 256) <= 1.26 * longer
    assert COSTS.pass_s(6, 256) == pytest.approx(2 ** (1 / 3)), "1 s each"
    assert COSTS.pass_s(11, 256 + 2048) > 2.5
    by_rows = [COSTS.pass_s(rows, 256) for rows in range(1, 12)]
    assert by_rows == sorted(by_rows)


@pytest.mark.parametrize("seconds", [0.1, 0.3, 1.7])
def test_what_is_alone_is_not_rounded(seconds):
    assert overlapped_s(seconds, 0.0) == overlapped_s(0.0, seconds) == seconds


@pytest.mark.parametrize(("link_s", "computed_s", "measured_s"), [(1.455, 0.58, 1.49), (0.83, 0.75, 1.03)])
def test_overlap_is_as_measured(link_s, computed_s, measured_s):
    """Raw layers and residuals of a model of 2.08 GB with the disk held to 1.2 GB/s."""
    assert overlapped_s(link_s, computed_s) == pytest.approx(measured_s, rel=0.05)


def test_costs_are_a_line_over_the_cached_rows():
    def all_at(cached_rows):
        return [COSTS.compute_s(11, cached_rows), COSTS.step_s(1, cached_rows), COSTS.step_s(5, cached_rows)]

    base = all_at(256)
    assert base == pytest.approx([1.5, 0.1, 0.1])
    assert all_at(0) == base, "a shorter prefix is not timed"
    for cached_rows in (257, 1280, 6000, 100_000):
        more = (cached_rows - 256) / 1024
        assert all_at(cached_rows) == pytest.approx([1.5 + 0.5 * more, 0.1 + 0.01 * more, 0.1 + 0.03 * more])


def test_what_cached_rows_add_is_the_difference_of_two_times_and_never_negative():
    short, long = RowTimes((1, 4, 8), (1.0, 2.0, 3.0)), RowTimes((1, 4, 8), (1.5, 1.9, 5.0))
    assert attention_times(short, long, 512) == RowTimes((1, 4, 8), (1.0, 0.0, 4.0))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_assumed_attention_reads_keys_and_values_and_computes_for_each_row(device):
    costs = assumed_costs(GEOMETRY, device)
    wider = assumed_costs(make_geometry(kv_heads=12), device)
    for name in ("target_attention", "draft_attention"):
        found, more = getattr(costs, name), getattr(wider, name)
        assert 0 < found.at(1) < found.at(64)
        assert more.at(1) == pytest.approx(6 * found.at(1)), "bytes of six times as many kv heads"
        assert more.at(64) - more.at(1) == pytest.approx(found.at(64) - found.at(1)), "as many queries"


def test_costs_are_read_back_as_they_were_written():
    costs = assumed_costs(GEOMETRY, "cpu")
    assert MachineCosts.from_dict(json.loads(json.dumps(costs.as_dict()))) == costs


@pytest.mark.parametrize(
    "damage",
    [
        {"link_bytes_per_s": None},
        {"target_layer": 3},
        {"draft_head": {"rows": [1]}},
        {"origin": "guessed"},
        {"draft_attention": None},
        {"target_attention": {"rows": [1, 2], "seconds": [0.1]}},
        {"target_attention": {"rows": [1], "seconds": [-0.1]}},
        {"target_attention": {"rows": [1], "seconds": [float("nan")]}},
        {"target_attention": {"rows": [1], "seconds": [float("inf")]}},
    ],
)
def test_damaged_costs_are_refused(damage):
    values = {**assumed_costs(GEOMETRY, "cpu").as_dict(), **damage}
    with pytest.raises((KeyError, TypeError, ValueError, AssertionError)):
        MachineCosts.from_dict(values)


@pytest.mark.parametrize("missing", ["target_attention", "draft_attention", "target_layer"])
def test_costs_of_which_a_part_is_missing_are_refused(missing):
    values = assumed_costs(GEOMETRY, "cpu").as_dict()
    del values[missing]
    with pytest.raises(KeyError):
        MachineCosts.from_dict(values)


def timing(link_s: float, **more: float) -> RoundTiming:
    """A round whose draft steps take 60 ms, 74 with more rows."""
    return RoundTiming(
        **{
            "link_s": link_s,
            "prefetch_s": 0.05,
            "step_s": 0.06,
            "shadow_step_s": 0.074,
            "slot_s": 0.1,
            "shadow_slots": 1,
            "most_shadow_slots": 6,
            **more,
        }
    )


def levels(link_s: float, survival: float = 0.875, **more: float) -> float:
    """Levels that the shadow is expected to give a tree of depth 10."""
    option = DepthOption(10, 21, tau=6.0, survival=survival, compute_s=0.68)
    found = timing(link_s, **more)
    return shadow_levels(found, option)


def test_a_slower_link_and_a_better_draft_leave_more_to_the_shadow() -> None:
    by_link = [levels(link_s) for link_s in (0.5, 0.87, 1.1, 1.59, 3.82, 9.0)]
    assert by_link == sorted(by_link)
    assert by_link[0] == by_link[1] == 0 < by_link[2] < by_link[3] < by_link[4]
    by_survival = [levels(3.82, survival) for survival in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert by_survival == sorted(by_survival)
    assert by_survival[-1] == 10


def test_the_shadow_gives_nothing_without_its_share_or_time_of_its_own() -> None:
    assert levels(3.82, shadow_slots=0) == 0
    assert levels(1.2) > 0
    assert levels(3.82, slot_s=0.01) < levels(3.82), "the link stands still while a step fills its one slot"
    assert levels(1.2, prefetch_s=1.0) == 0, "the weights were there before the pass began"


def test_the_levels_of_the_shadow_are_those_that_were_measured() -> None:
    """SmolLM2 with 4-bit substitutes, 10 and 6 answers at two links; tau 7.5 and 6.9."""
    assert levels(1.59) == pytest.approx(0.9, abs=0.45)
    assert levels(3.82) == pytest.approx(2.6, abs=0.4)
