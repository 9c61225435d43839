"""Costs: snapped to the grid so that noise decides nothing, and read back as they were written."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_planning_plan import make_geometry

from subspec_cli.planning.assumed_costs import assumed_costs
from subspec_cli.planning.costs import MachineCosts, PlanCosts, RowTimes, snapped, weighted_sum

GEOMETRY = make_geometry()


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


def test_a_pass_takes_the_longer_of_link_and_computing():
    costs = PlanCosts(1.0, RowTimes((1, 11), (0.5, 1.5)), RowTimes((1,), (0.1,)))
    assert [costs.pass_s(rows) for rows in (1, 6, 11)] == pytest.approx([1.0, 1.0, 1.5])


def test_costs_are_read_back_as_they_were_written():
    costs = assumed_costs(GEOMETRY, "cpu")
    assert MachineCosts.from_dict(json.loads(json.dumps(costs.as_dict()))) == costs


@pytest.mark.parametrize(
    "damage", [{"link_bytes_per_s": None}, {"target_layer": 3}, {"draft_head": {"rows": [1]}}]
)
def test_damaged_costs_are_refused(damage):
    values = {**assumed_costs(GEOMETRY, "cpu").as_dict(), **damage}
    with pytest.raises((KeyError, TypeError, ValueError, AssertionError)):
        MachineCosts.from_dict(values)
