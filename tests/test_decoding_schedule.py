"""How deep to draft: a pure function of times and outcomes that are fed in."""

import numpy as np
import pytest
from fakes import chain_of, tree_of

from subspec_cli.decoding.schedule import Calibration, RunningTime, Schedule, TreeLimits
from subspec_cli.decoding.verify import VerifyResult

LIMITS = TreeLimits(depth=40, width=3, nodes=64)
ROOT_ALONE = (chain_of([0]), VerifyResult((0,), (1,)))


def timed(step_s, pass_s, **more):
    """A schedule that has seen these durations."""
    schedule = Schedule(limits=LIMITS, fixed_depth=False, **more)
    for _ in range(50):
        schedule.step_time.add(step_s)
        schedule.pass_time.add(pass_s)
    return schedule


def depth_taken(schedule, survival):
    """Steps until one more does not pay, when every level keeps `survival` of the chance."""
    expected, gain = 1.0, survival
    for steps in range(LIMITS.depth):
        if not schedule.pays(expected_tokens=expected, gain=gain, steps=steps):
            return steps
        expected += gain
        gain *= survival
    return LIMITS.depth


def best_depth(step_s, pass_s, survival):
    """By trying all: most expected tokens a second."""
    rates = [
        sum(survival**level for level in range(depth + 1)) / (pass_s + depth * step_s)
        for depth in range(LIMITS.depth + 1)
    ]
    return int(np.argmax(rates))


@pytest.mark.parametrize("survival", [0.03, 0.3, 0.6, 0.9, 0.97])
@pytest.mark.parametrize("pass_s", [0.001, 0.01, 0.2, 3.0])
def test_depth_is_the_one_with_most_tokens_a_second(pass_s, survival):
    assert depth_taken(timed(0.01, pass_s), survival) == best_depth(0.01, pass_s, survival)


def test_cheap_steps_go_deep_and_expensive_ones_do_not():
    depths = [depth_taken(timed(step_s, 1.0), 0.85) for step_s in (0.001, 0.01, 0.1, 0.5, 2.0)]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] > 20
    assert depths[-1] == 0


def test_before_anything_is_measured_drafting_is_tried():
    assert depth_taken(Schedule(limits=LIMITS, fixed_depth=False), 0.9) >= 1


def test_a_fixed_depth_ignores_cost():
    schedule = Schedule(limits=LIMITS, fixed_depth=True)
    schedule.step_time.add(100.0)
    schedule.pass_time.add(0.001)
    assert depth_taken(schedule, 0.01) == LIMITS.depth


@pytest.mark.parametrize(("wanted", "depth"), [(1, 0), (2, 1), (17, 16), (41, 40), (500, 40), (0, 0)])
def test_the_bonus_token_counts_as_wanted(wanted, depth):
    limits = Schedule(limits=LIMITS, fixed_depth=False).limits(wanted)
    assert limits.depth == depth
    assert limits.nodes <= LIMITS.nodes
    assert limits.width <= LIMITS.width


def first_step_pays(schedule, guess=0.9):
    chance = schedule.calibration.probability(guess)
    return schedule.pays(expected_tokens=1.0, gain=chance, steps=0)


def test_speculation_switches_off_when_nothing_is_accepted_and_is_probed_again():
    schedule = timed(0.1, 1.0)
    assert first_step_pays(schedule)
    drafted = chain_of([0, 1, 2])
    sure = tree_of(drafted.token_ids, drafted.parents)
    object.__setattr__(sure, "log_probs", tuple(np.log([1.0, 0.9, 0.81])))
    for _ in range(200):
        schedule.observe(sure, VerifyResult((0,), (7,)))
    assert not first_step_pays(schedule)
    waits = []
    for _ in range(3):
        passes = 0
        while not first_step_pays(schedule) and passes < 300:
            schedule.observe(*ROOT_ALONE)
            passes += 1
        waits.append(passes)
        schedule.observe(sure, VerifyResult((0,), (7,)))
        assert not first_step_pays(schedule), "a probe that failed is not repeated at once"
    assert all(1 <= passes < 300 for passes in waits)


def test_a_probe_that_succeeds_switches_speculation_on():
    schedule = timed(0.1, 1.0)
    for _ in range(200):
        schedule.calibration.observe(0.9, taken=False)
    assert not first_step_pays(schedule)
    for _ in range(200):
        schedule.calibration.observe(0.9, taken=True)
    assert first_step_pays(schedule)


def test_calibration_starts_by_trusting_the_draft():
    calibration = Calibration()
    chances = [calibration.probability(guess) for guess in np.linspace(0, 1, 101)]
    assert chances == sorted(chances)
    assert (
        max(abs(chance - guess) for chance, guess in zip(chances, np.linspace(0, 1, 101), strict=True)) < 0.15
    )


@pytest.mark.parametrize("guess", [0.0, 0.01, 0.3, 0.9, 0.999, 1.0])
def test_calibration_learns_what_the_target_really_takes(guess):
    calibration = Calibration()
    generator = np.random.default_rng(0)
    for _ in range(400):
        calibration.observe(guess, taken=bool(generator.random() < 0.25))
    assert 0.1 < calibration.probability(guess) < 0.45
    for _ in range(400):
        calibration.observe(guess, taken=True)
    assert calibration.probability(guess) > 0.9


def test_calibration_of_one_guess_leaves_distant_ones_alone():
    calibration = Calibration()
    before = calibration.probability(0.3)
    for _ in range(100):
        calibration.observe(0.95, taken=False)
    assert calibration.probability(0.3) == before


def observed(tree, nodes):
    """Edges that `observe` records, as (guess, taken)."""
    schedule = Schedule(limits=LIMITS, fixed_depth=False)
    seen = []
    schedule.calibration.observe = lambda guess, *, taken: seen.append((round(guess, 6), taken))
    schedule.observe(tree, VerifyResult(nodes, (0,) * len(nodes)))
    return seen


def test_only_edges_whose_parent_was_reached_are_evidence():
    tree = tree_of([0, 1, 2, 3, 4, 5], [-1, 0, 0, 1, 2, 2])
    assert observed(tree, (0, 2)) == [(0.5, False), (0.5, True), (0.5, False), (0.5, False)]
    assert observed(tree, (0,)) == [(0.5, False), (0.5, False)]
    assert observed(tree, (0, 1, 3)) == [(0.5, True), (0.5, False), (0.5, True)]
    assert observed(chain_of([0]), (0,)) == []


def test_running_time_follows_and_shrugs_off_an_outlier():
    time = RunningTime()
    assert time.get(7.0) == 7.0
    time.add(2.0)
    assert time.get(7.0) == 2.0
    time.add(1000.0)
    assert time.get(7.0) <= 3.0 + 1e-9
    for _ in range(60):
        time.add(0.5)
    assert time.get(7.0) == pytest.approx(0.5, rel=0.01)


def test_the_same_times_and_outcomes_give_the_same_decisions():
    def run():
        schedule, generator = timed(0.02, 0.4), np.random.default_rng(4)
        depths = []
        for _ in range(40):
            depths.append(depth_taken(schedule, schedule.calibration.probability(0.9)))
            schedule.observe(chain_of([0, 1, 2]), VerifyResult((0, 1)[: int(generator.integers(1, 3))], (1,)))
            schedule.step_time.add(float(generator.random()))
        return depths

    assert run() == run()
