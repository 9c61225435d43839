"""Plans for several answers at a time: their bytes, their nodes, and what all of them are predicted to give."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planning_plan import make_geometry, make_request, requests

from subspec_cli.errors import ResourceError
from subspec_cli.limits import MOST_ROWS, PREFILL_CHUNK
from subspec_cli.planning.costs import RowTimes
from subspec_cli.planning.plan import OffloadPlan, make_plan
from subspec_cli.planning.request import PlanRequest, pass_nodes
from subspec_cli.planning.timing import STEP_ROWS, hidden_prompt_rows, level_s
from subspec_cli.units import GIB

FAST = settings(max_examples=60, deadline=None)
CONTEXT = 1024


def lines_of(plan: OffloadPlan) -> dict[str, int]:
    return {line.label: line.size_bytes for line in plan.lines}


def plan_for(sequences: int, **changes: object) -> OffloadPlan:
    request = make_request(budget_bytes=3 * GIB, context=CONTEXT, resident_layers=4, **changes)
    return make_plan(request.for_parallel(sequences))


def test_one_answer_with_its_own_settings_is_planned_as_one_that_samples() -> None:
    request = make_request()
    assert request.for_parallel(None) is request
    single = replace(request, samples=True, takes_grammars=True)
    assert make_plan(request.for_parallel(1)) == make_plan(single)


@pytest.mark.parametrize("sequences", [2, 4, 8])
def test_each_answer_has_a_context_scratch_rows_and_noise_of_its_own(sequences: int) -> None:
    one, several = plan_for(1), plan_for(sequences)
    for label in ("KV cache", "sampling noise"):
        assert lines_of(several)[label] == sequences * lines_of(one)[label]
    for label in ("resident layers", "substitutes", "embedding and head", "stream slots"):
        assert lines_of(several)[label] == lines_of(one)[label]
    assert several.context == one.context
    assert several.scratch_rows == one.scratch_rows
    assert several.sequences == several.as_dict(reason="", assumptions=[])["parallel"] == sequences


@FAST
@given(requests(), st.integers(1, 64))
def test_several_never_take_more_than_the_budget(request: PlanRequest, sequences: int) -> None:
    several = request.for_parallel(sequences)
    try:
        plan = make_plan(several)
    except ResourceError:
        return
    assert plan.total_bytes <= request.budget_bytes
    assert plan.tree_nodes <= plan.pass_nodes <= max(plan.tree_nodes, PREFILL_CHUNK)
    assert plan.scratch_rows <= several.scratch_rows
    assert plan.company_rows % PREFILL_CHUNK == 0
    assert plan.company_rows <= plan.prompt_rows


def test_one_link_pass_serves_all_so_that_together_they_are_faster() -> None:
    rates = [plan_for(sequences).prediction.tok_per_s for sequences in (1, 2, 4)]
    assert rates[0] < rates[1] < rates[2]
    assert rates[2] < 4 * rates[0], "computing and drafting are each answer's own"
    plain = [plan_for(sequences).prediction.plain_tok_per_s for sequences in (1, 4)]
    assert plain[0] < plain[1] <= 4 * plain[0] * 1.0001


def test_a_pass_has_no_more_nodes_than_a_chunk_has_rows() -> None:
    assert [pass_nodes(64, n) for n in (1, 2, 4, 8)] == [64, 128, 256, 256]
    assert pass_nodes(385, 4) == 385, "a shape that the user fixed"


def test_a_level_of_all_is_drafted_in_steps_of_the_most_rows() -> None:
    step = RowTimes((1, 8), (1.0, 8.0))
    assert level_s(step, 1) == step.at(STEP_ROWS)
    assert level_s(step, 4) == step.at(MOST_ROWS)
    assert level_s(step, 5) == step.at(MOST_ROWS) + step.at(2)


def test_prompt_rows_in_company_are_those_that_hide_behind_the_link() -> None:
    compute = RowTimes((256, 1024), (0.5, 2.0))
    assert hidden_prompt_rows(0.4, compute, 4096) == 0
    assert hidden_prompt_rows(1.1, compute, 4096) == 512
    assert hidden_prompt_rows(9.0, compute, 1000) == 768


def test_a_model_without_room_for_all_contexts_says_so() -> None:
    small = make_request(make_geometry(layers=4), budget_bytes=GIB, context=4_000)
    make_plan(small.for_parallel(1))
    with pytest.raises(ResourceError, match="is the least") as caught:
        make_plan(small.for_parallel(64))
    assert "a smaller --parallel" in caught.value.hint
