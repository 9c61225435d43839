"""What runs learn of acceptance: predictions from it beside the real policy, fading, and files that several share."""

from __future__ import annotations

import json
import multiprocessing
import random

import pytest
from fakes import plan_costs
from test_planning_plan import make_request

from subspec_cli.config import SamplingConfig
from subspec_cli.drafting.history import History
from subspec_cli.drafting.policy import DraftPolicy, Outlook, TreeLimits
from subspec_cli.metrics import GenerationStats, PassStats
from subspec_cli.planning.acceptance import Acceptance, acceptance_of
from subspec_cli.planning.assumed_costs import assumed_survival
from subspec_cli.planning.plan import make_plan
from subspec_cli.planning.timing import DEPTHS, RoundTiming, depth_options, fastest_depth
from subspec_cli.probe.kept_acceptance import acceptance_subject, keep_acceptance, kept_acceptance
from subspec_cli.substitutes.settings import SubstituteSettings

CACHED = 256
LIMITS = TreeLimits(depth=48, width=8, nodes=64)
SOME = Acceptance(100.0, (20.0, 18.0), (18.0, 17.0))


def simulate(policy, easiness, passes, noise):
    """Rounds of the real policy over a chain whose every level has one of these chances, which the policy sees."""
    history, stats, ease = History(), GenerationStats(new_tokens=1), easiness[0]
    for _ in range(passes):
        chances, expected, chance, at = [], 1.0, 1.0, ease
        while len(chances) < LIMITS.depth:
            at = noise.choice(easiness) if noise.random() < 0.15 else at
            steps = len(chances)
            outlook = Outlook(expected, steps + 1, steps * policy.step_s(2, CACHED), CACHED)
            if not policy.serial_rows([chance * at], outlook, history):
                break
            chance *= at
            expected += chance
            chances.append(at)
            history.learn_yield(at)
        accepted = next((n for n, each in enumerate(chances) if noise.random() >= each), len(chances))
        ease = at if accepted == len(chances) else noise.choice(easiness)
        steps = len(chances)
        round_s = policy.costs.pass_s(steps + 1, CACHED) + steps * policy.step_s(2, CACHED)
        last = PassStats(
            decode_time_s=round_s, drafted=steps, accepted=accepted, emitted=accepted + 1, depth=steps
        )
        stats = stats.after_pass(last)
    return stats


@pytest.mark.parametrize("easiness", [[0.974], [0.9], [0.8], [0.99, 0.9], [0.99, 0.7], [0.995, 0.85, 0.5]])
@pytest.mark.parametrize(("pass_s", "step_s"), [(1.1, 0.046), (0.1, 0.018), (0.5, 0.01)])
def test_three_runs_predict_the_fourth(easiness, pass_s, step_s):
    policy = DraftPolicy(LIMITS, plan_costs(step_s, pass_s, row_s=0.0, compute_s=0.0), 4)
    noise = random.Random(1)
    before = [simulate(policy, easiness, 100, noise) for _ in range(3)]
    last = simulate(policy, easiness, 400, noise)
    request = make_request().after_runs(acceptance_of(before))
    timing = RoundTiming(pass_s, 0.0, step_s, step_s, slot_s=1.0, shadow_slots=0, most_shadow_slots=6)
    options = [option._replace(compute_s=0.0) for option in depth_options(request)]
    rate, option = fastest_depth(timing, options)
    assert rate == pytest.approx(last.decode_tok_per_s, rel=0.2)
    if len(easiness) == 1:  # among easy and hard levels the policy stops earlier, at nearly the same speed
        assert option.tau == pytest.approx(last.tau, rel=0.25)


def test_acceptance_counts_the_levels_that_were_put_to_the_target():
    stats = GenerationStats(new_tokens=1)
    for accepted, depth in ((3, 3), (1, 4), (0, 2), (0, 0)):
        stats = stats.after_pass(PassStats(accepted=accepted, emitted=accepted + 1, depth=depth))
    found = acceptance_of([stats, stats])
    assert (found.tokens, found.tried, found.taken) == (16.0, (6.0, 4.0, 2.0, 0.0), (4.0, 2.0, 2.0, 0.0))
    assert found.survival(0.5) == pytest.approx((8 + 16) / (12 + 32))
    assert acceptance_of([GenerationStats(new_tokens=9, passes=8)]) == Acceptance(8.0)


def test_old_runs_fade():
    total = Acceptance()
    for _ in range(400):
        total = total.then(Acceptance(1000.0, (100.0,), (90.0,)))
    for _ in range(400):
        total = total.then(Acceptance(1000.0, (100.0,), (50.0,)))
    assert total.survival(0.9) == pytest.approx(0.5, abs=0.01)
    assert sum(total.tried) <= 4_000


def test_a_plan_goes_by_what_was_learned_and_shows_a_range_before():
    request = make_request()
    assumed = make_plan(request).prediction
    low, middle, high = assumed_survival(request.substitute_bits)
    assert (assumed.low.survival, assumed.survival, assumed.high.survival) == (low, middle, high)
    assert assumed.low.tok_per_s < assumed.tok_per_s < assumed.high.tok_per_s
    assert assumed.low.tau < assumed.tau < assumed.high.tau
    few = make_plan(request.after_runs(Acceptance(8.0, (8.0,), (8.0,)))).prediction
    assert few == assumed
    learned = make_plan(request.after_runs(Acceptance(1824.0, (1000.0,), (700.0,)))).prediction
    assert learned.survival == pytest.approx(0.7, abs=0.01)
    assert (learned.learned_tokens, learned.low, learned.high) == (1824, None, None)
    assert learned.tok_per_s < assumed.low.tok_per_s


def test_no_depth_is_predicted_that_no_run_drafts():
    assert max(DEPTHS) == LIMITS.depth


def subject(temperature=0.0, bits=4, commit="c0ffee"):
    settings = SubstituteSettings(bits, "minmax", (("mlp.down_proj", 8),))
    return acceptance_subject("demo", commit, settings, SamplingConfig(temperature=temperature))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path))
    return tmp_path


def test_counts_are_kept_by_model_substitutes_and_temperature(home):
    keep_acceptance(subject(), SOME)
    keep_acceptance(subject(), SOME)
    assert kept_acceptance(subject()) == SOME.then(SOME)
    others = [subject(0.7), subject(bits=8), subject(commit="0ther")]
    assert [kept_acceptance(other) for other in others] == [None] * 3
    keep_acceptance(subject(0.7), SOME)
    assert kept_acceptance(subject(0.6)) == SOME
    assert kept_acceptance(subject(1.0)) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.update(about={}),
        lambda document: document.pop("acceptance"),
        lambda document: document["acceptance"].update(tokens="100"),
        lambda document: document["acceptance"].update(tokens=float("nan")),
        lambda document: document["acceptance"].update(taken=[1e9, 1]),
        lambda document: document["acceptance"].update(tried=[1] * 9),
        lambda document: document["acceptance"].update(tried=5),
    ],
)
def test_a_file_with_anything_else_counts_as_nothing(home, change):
    keep_acceptance(subject(), SOME)
    [path] = (home / "acceptance").glob("*.json")
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    assert kept_acceptance(subject()) is None
    path.write_text('{"a": 1, "a": 2}')
    assert kept_acceptance(subject()) is None
    keep_acceptance(subject(), SOME)
    assert kept_acceptance(subject()) == SOME


def keep_some():
    for _ in range(5):
        keep_acceptance(subject(), SOME)


def test_processes_that_end_at_once_lose_nothing(home):
    processes = [multiprocessing.get_context("fork").Process(target=keep_some) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = kept_acceptance(subject())
    assert found is not None
    assert found.tokens == 20 * SOME.tokens
    assert found.tried == tuple(20 * count for count in SOME.tried)
