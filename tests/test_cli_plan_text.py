"""The words of a plan: every reason and every advice has its sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_planning_plan import make_request

from subspec_cli.cli.documents import plan_document
from subspec_cli.cli.plan_text import advice_text, assumptions, range_lines, reason_text
from subspec_cli.planning.advice import Advice, Change, Gain, advise
from subspec_cli.planning.plan import make_plan
from subspec_cli.planning.reason import (
    ContextCost,
    FasterBits,
    GivenLayers,
    LayersThatPay,
    NoRoomToDraft,
    PlanReason,
    ResidentDraft,
    ShorterContext,
    WholeModel,
)
from subspec_cli.units import GIB, MIB

PAY = LayersThatPay(3, 5 * MIB, 90 * MIB)


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (PlanReason(GivenLayers(5)), "5 resident layers, as asked for"),
        (PlanReason(WholeModel(3 * GIB, 4 * GIB)), "the whole model fits: 3.00 GiB of 4.00 GiB"),
        (PlanReason(PAY), "as many resident layers as pay: 5.00 MiB to spare, a layer takes 90.0 MiB"),
        (
            PlanReason(replace(PAY, resident=0)),
            "no layer resident: 5.00 MiB to spare, a layer takes 90.0 MiB",
        ),
        (
            PlanReason(GivenLayers(1), ResidentDraft(shares=True, gain=None)),
            "1 resident layers, as asked for; the draft runs them too",
        ),
        (
            PlanReason(GivenLayers(1), ResidentDraft(shares=True, gain=0.001)),
            (
                "1 resident layers, as asked for; the draft runs them too, predicted about as fast as with "
                "substitutes beside them"
            ),
        ),
        (
            PlanReason(GivenLayers(1), ResidentDraft(shares=False, gain=0.1)),
            (
                "1 resident layers, as asked for; the draft keeps its substitutes, predicted 10% faster than without "
                "substitutes beside them"
            ),
        ),
        (
            PlanReason(GivenLayers(1), context=ShorterContext(512, 4096, None)),
            "1 resident layers, as asked for; context cut to 512 tokens to fit",
        ),
        (
            PlanReason(GivenLayers(1), context=ShorterContext(512, 4096, 0.25)),
            "1 resident layers, as asked for; context 512, as 4096 would cost 25% of the speed",
        ),
        (
            PlanReason(GivenLayers(1), context=ShorterContext(512, 4096, 0.004)),
            "1 resident layers, as asked for; context 512, as 4096 would cost 0.4% of the speed",
        ),
        (
            PlanReason(GivenLayers(1), context_cost=ContextCost(6528, 256, 0.12)),
            "1 resident layers, as asked for; a context of 6528 costs 12% of the speed with 256",
        ),
        (
            PlanReason(GivenLayers(1), no_draft=NoRoomToDraft(6000)),
            (
                "1 resident layers, as asked for; no draft, as the substitutes do not fit beside 6000 tokens of "
                "prompt"
            ),
        ),
        (
            PlanReason(GivenLayers(1), substitutes=FasterBits(4, (2, 8))),
            "1 resident layers, as asked for; 4-bit substitutes, predicted faster than 2-bit and 8-bit",
        ),
    ],
)
def test_every_reason_has_its_sentence(reason: PlanReason, text: str) -> None:
    assert reason_text(reason) == text


def test_a_plans_document_has_the_sentence_in_it() -> None:
    plan = make_plan(make_request())
    ends = [f"{name}: {text}" for name, text in range_lines(plan.prediction)]
    assert [end.partition(":")[0] for end in ends] == ["low", "high"]
    assert plan_document(plan) == plan.as_dict(
        reason=reason_text(plan.reason), assumptions=(*assumptions(plan.prediction), *ends)
    )


REQUEST = replace(make_request(), budget_bytes=3 * GIB, context=512, ram_bytes=16 * GIB, substitute_bits=8)
GPU = replace(make_request(device="cuda"), budget_bytes=5 * GIB)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (Change("budget", REQUEST, GIB), "1 GiB more (--memory-gb 3)"),
        (Change("budget", GPU, 2 * GIB), "2 GiB more (--vram-gb 5)"),
        (Change("link", REQUEST), "a disk twice as fast"),
        (Change("link", GPU), "a link twice as fast"),
        (Change("context", REQUEST), "a smaller --context 512"),
        (Change("ram", REQUEST, 8 * GIB), "8 GiB more host memory (--ram-gb 16)"),
        (Change("bits", REQUEST), "substitutes of 8 bits (--bits 8)"),
    ],
)
def test_every_change_has_its_words(change: Change, text: str) -> None:
    advice = Advice(2.0, needs_nothing=False, best=Gain(change, 3.0))
    assert advice_text(advice) == f"{text}: 3.0 tok/s predicted, 50% more"


def test_hardware_is_advised_beside_the_best_setting() -> None:
    disk, budget = Gain(Change("link", REQUEST), 4.0), Gain(Change("budget", REQUEST, GIB), 3.0)
    assert advice_text(Advice(2.0, needs_nothing=False, best=disk, best_setting=budget)) == (
        "a disk twice as fast: 4.0 tok/s predicted, 100% more; "
        "of the settings, 1 GiB more (--memory-gb 3): 3.0 tok/s"
    )


def test_where_nothing_helps_that_is_said() -> None:
    assert advice_text(Advice(2.0, needs_nothing=False)) == "no change tried here helps by 3 % or more"
    assert advice_text(Advice(2.0, needs_nothing=True)) == "the whole model fits: nothing is needed"


def test_more_budget_is_advised_for_a_budget_that_is_scarce() -> None:
    request = make_request()
    advice = advise(request, make_plan(request))
    assert advice.best is not None
    assert advice.best.tok_per_s > 1.03 * advice.tok_per_s
    assert advice.best_setting is None or advice.best.change.is_hardware
