"""Plans for a prompt that is known: its tokens and its answer's are the context, as far as anything can hold them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_planning_plan import FAST, make_geometry, make_request, min_bytes, plan_or_none, refusal, requests

from subspec_cli.errors import ResourceError, UsageError
from subspec_cli.planning.layer_sizes import LayerSizes
from subspec_cli.planning.plan import fastest_plan, make_plan
from subspec_cli.planning.reason import ContextCost, NoRoomToDraft, ShorterContext
from subspec_cli.planning.request import PlanRequest, WantedTokens, check_prompt_fits
from subspec_cli.substitutes.settings import SubstituteSettings, substitute_layer_bytes
from subspec_cli.units import GIB, MIB, parse_size_gib

WANTED = st.builds(WantedTokens, st.integers(1, 32_767), st.integers(1, 40_000))


def least_bytes(request: PlanRequest, context: int) -> int:
    return min_bytes(replace(request, context=context))


@pytest.mark.parametrize(
    ("prompt", "answer", "context"),
    [
        (1, 1, 64),
        (40, 24, 64),
        (40, 25, 128),
        (6000, 512, 6528),
        (32_000, 512, 32_512),
        (32_700, 512, 32_768),
    ],
)
def test_the_context_holds_prompt_and_answer_in_round_numbers(prompt: int, answer: int, context: int) -> None:
    plan = make_plan(make_request(budget_bytes=16 * GIB, wanted=WantedTokens(prompt, answer)))
    assert plan.context == context
    assert plan.reason.context is None


@FAST
@given(requests(context=None), WANTED)
def test_a_prompt_is_refused_only_if_no_layout_holds_it(request: PlanRequest, wanted: WantedTokens) -> None:
    request = replace(request, wanted=wanted)
    whole = min(wanted.context, request.model_context)
    plan = plan_or_none(request)
    if plan is None:
        assert plan_or_none(replace(request, wanted=None, context=wanted.prompt + 1)) is None
        return
    assert plan.total_bytes <= request.budget_bytes
    assert wanted.prompt < plan.context <= whole
    if plan.context < whole:
        assert plan_or_none(replace(request, wanted=None, context=whole)) is None
        assert plan_or_none(replace(request, wanted=None, context=plan.context + 1)) is None


@FAST
@given(requests(context=None), WANTED, st.integers(0, 4 * GIB))
def test_a_larger_budget_never_holds_or_predicts_less(
    request: PlanRequest, wanted: WantedTokens, more_bytes: int
) -> None:
    request = replace(request, wanted=wanted)
    plan = plan_or_none(request)
    if plan is not None:
        richer = make_plan(replace(request, budget_bytes=request.budget_bytes + more_bytes))
        assert richer.context >= plan.context
        if richer.context > plan.context:
            # More of the answer comes before speed: a longer context may take the memory of a resident layer.
            richer = make_plan(
                replace(
                    request, wanted=None, context=plan.context, budget_bytes=request.budget_bytes + more_bytes
                )
            )
        assert richer.prediction.tok_per_s >= plan.prediction.tok_per_s


def test_a_slower_layout_holds_a_long_prompt_and_its_price_is_said() -> None:
    request = make_request(budget_bytes=int(1.6 * GIB))
    short = make_plan(replace(request, wanted=WantedTokens(100, 100)))
    long = make_plan(replace(request, wanted=WantedTokens(4000, 512)))
    assert (short.context, long.context) == (256, 4544)
    assert short.reason.context_cost is None
    loss = 1 - long.prediction.tok_per_s / short.prediction.tok_per_s
    assert loss > 0.03
    assert long.reason.context_cost == ContextCost(4544, 256, pytest.approx(loss))
    plan_json = long.as_dict(reason="", assumptions=())
    assert plan_json["context_cost"] == pytest.approx(loss)
    assert short.as_dict(reason="", assumptions=())["context_cost"] == 0


def test_the_answer_is_cut_to_what_the_budget_holds_and_that_is_said() -> None:
    wanted = WantedTokens(5000, 2000)
    request = make_request(wanted=wanted)
    plan = make_plan(replace(request, budget_bytes=least_bytes(request, 6016)))
    assert plan.context == 6016
    assert plan.reason.context == ShorterContext(6016, wanted.context, None)


def test_a_prompt_that_the_budget_cannot_hold_is_told_what_would_do() -> None:
    request = make_request(wanted=WantedTokens(5000, 512))
    small = replace(request, budget_bytes=least_bytes(request, 4000))
    with pytest.raises(
        ResourceError, match=r"the prompt has 5000 tokens, a budget of .* holds 4032"
    ) as caught:
        make_plan(small)
    enough = re.search(r"--memory-gb ([\d.]+) holds the prompt and 512 tokens", caught.value.hint)
    assert enough is not None
    assert make_plan(replace(request, budget_bytes=int(float(enough[1]) * GIB))).context == 5568
    nothing = refusal(replace(request, budget_bytes=100 * MIB))
    assert nothing is not None
    assert "is too small" in nothing.message
    assert "with a context of 5568" in nothing.hint


def test_a_text_that_is_wanted_whole_is_not_cut_by_a_small_budget() -> None:
    request = make_request(wanted=WantedTokens(1, 2047, is_whole=True))
    error = refusal(replace(request, budget_bytes=100 * MIB))
    assert error is not None
    stated = re.match(r".* too small: (.*) is the least", error.message)
    assert stated is not None
    least = round(parse_size_gib(stated[1]) * GIB)
    assert make_plan(replace(request, budget_bytes=least)).context == 2048
    error = refusal(replace(request, budget_bytes=least * 98 // 100))
    assert error is not None
    assert "would fit" not in error.message
    longer = replace(request, budget_bytes=4 * least, model_context=1024)
    assert make_plan(longer).context == 1024


def test_a_context_of_the_users_that_does_not_fit_is_told_which_one_would() -> None:
    request = make_request(context=6000, wanted=WantedTokens(10, 10))
    error = refusal(replace(request, budget_bytes=least_bytes(request, 4000)))
    assert error is not None
    assert "a context of 4032 would fit" in error.message


def test_a_context_of_the_users_wins() -> None:
    assert make_plan(make_request(context=2048, wanted=WantedTokens(100, 100))).context == 2048


def of_bits(bits: int, budget_bytes: int, wanted: WantedTokens | None) -> PlanRequest:
    settings = SubstituteSettings(bits, "minmax")
    size = LayerSizes(substitute_layer_bytes(make_geometry(), settings))
    return make_request(budget_bytes=budget_bytes, substitute_bytes=size, substitute_bits=bits, wanted=wanted)


def test_of_two_sets_the_one_that_holds_the_whole_answer_wins() -> None:
    wanted = WantedTokens(9000, 9000)
    budget_bytes = least_bytes(of_bits(4, GIB, wanted), wanted.context)
    number, plan = fastest_plan([of_bits(8, budget_bytes, wanted), of_bits(4, budget_bytes, wanted)])
    assert (number, plan.context) == (1, wanted.context)


def test_a_prompt_that_leaves_no_room_for_substitutes_is_decoded_plainly() -> None:
    wanted = WantedTokens(9000, 512)
    drafted = of_bits(4, GIB, wanted)
    budget_bytes = least_bytes(replace(drafted, substitute_bytes=None), wanted.context)
    assert refusal(replace(drafted, budget_bytes=budget_bytes)) is not None
    _, plan = fastest_plan([replace(drafted, budget_bytes=budget_bytes)])
    assert (plan.context, plan.drafts) == (wanted.context, False)
    assert plan.reason.no_draft == NoRoomToDraft(9000)
    for kept in (replace(drafted, wanted=None, context=9000), replace(drafted, context=9500)):
        with pytest.raises(ResourceError, match="too small"):
            fastest_plan([replace(kept, budget_bytes=budget_bytes)])


def test_a_prompt_longer_than_the_models_positions_is_refused_with_figures() -> None:
    with pytest.raises(UsageError, match="the prompt has 512 tokens, the model was made for 512 positions"):
        check_prompt_fits(WantedTokens(512, 9), None, 512)
    check_prompt_fits(WantedTokens(511, 9), None, 512)
    check_prompt_fits(WantedTokens(99, 900), 100, 512)


def test_a_prompt_longer_than_the_users_context_is_refused_with_both_numbers_and_the_flag() -> None:
    with pytest.raises(UsageError, match="the prompt has 100 tokens, --context 100 holds 100") as caught:
        check_prompt_fits(WantedTokens(100, 60), 100, 512)
    assert "--context 192" in caught.value.hint
