"""What to draft next: a pure function of costs and outcomes that are fed in."""

from dataclasses import replace

import numpy as np
import pytest
from fakes import chain_of, plan_costs

from subspec_cli.decoding.verification import VerifyResult
from subspec_cli.drafting.history import Calibration, History, Ranking
from subspec_cli.drafting.policy import DraftPolicy, FixedShape, Outlook, PassUnderWay, TreeLimits
from subspec_cli.planning.costs import RowTimes

LIMITS = TreeLimits(depth=40, width=8, nodes=64)
ROOT_ALONE = (chain_of([0]), VerifyResult((0,), (1,)), [])


CACHED = 256
"""Cached rows at which the plain costs hold."""


def made(step_s=0.01, pass_s=1.0, *, fixed=None, **costs):
    """A policy for these costs."""
    found = plan_costs(step_s, pass_s, **{"row_s": 0.001, "compute_s": 0.0, **costs})
    return DraftPolicy(LIMITS, found, 4, fixed or FixedShape())


def depth_taken(policy, survival, history=None, cached_rows=CACHED):
    """Steps of one row until one more does not pay, when every level keeps `survival` of the chance."""
    history = history or History()
    history.step_yield = 1.0
    expected, chance = 1.0, survival
    for steps in range(LIMITS.depth):
        spent_s = steps * policy.step_s(1, cached_rows)
        outlook = Outlook(expected, steps + 1, spent_s, cached_rows)
        if not policy.serial_rows([chance], outlook, history):
            return steps
        expected += chance
        chance *= survival
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
    assert depth_taken(made(0.01, pass_s), survival) == best_depth(0.01, pass_s, survival)


@pytest.mark.parametrize("node_s", [0.0, 0.02, 0.2])
def test_a_step_is_charged_for_the_nodes_that_it_leaves_to_verify(node_s):
    """Where computing limits the pass, a tree of several answers' nodes costs more than the steps that make it."""
    costs = replace(plan_costs(0.01, 0.1), compute=RowTimes((1, 101), (0.2, 0.2 + 100 * node_s)))
    policy = DraftPolicy(LIMITS, costs, 4)
    rates = [
        sum(0.9**level for level in range(depth + 1))
        / (policy.costs.pass_s(depth + 1, CACHED) + depth * 0.01)
        for depth in range(LIMITS.depth + 1)
    ]
    assert depth_taken(policy, 0.9) == int(np.argmax(rates))


@pytest.mark.parametrize("survival", [0.03, 0.3, 0.6, 0.9, 0.97])
@pytest.mark.parametrize("prefetch_s", [0.055, 0.105, 0.205])
def test_steps_go_on_in_the_time_in_which_the_slots_fill(prefetch_s, survival):
    rates = [
        sum(survival**level for level in range(depth + 1))
        / (0.4 - min(prefetch_s, depth * 0.01) + depth * 0.01)
        for depth in range(LIMITS.depth + 1)
    ]
    depth = depth_taken(made(0.01, 0.4, prefetch_s=prefetch_s), survival)
    assert rates[depth] == pytest.approx(max(rates), rel=1e-9)
    assert depth >= int(prefetch_s / 0.01)


def test_a_step_that_costs_nothing_else_is_as_wide_as_gives_most_chance_a_second():
    """Its time is still that of further levels."""
    wide = [0.03] * 8
    assert rows_taken(made(0.01, 0.1, row_s=0.0), wide) == 0
    assert rows_taken(made(0.01, 0.1, row_s=0.0, prefetch_s=0.05), wide) == 8
    assert rows_taken(made(0.01, 0.1, row_s=0.02, prefetch_s=0.07), wide) == 1
    assert rows_taken(made(0.01, 0.1, row_s=0.0, prefetch_s=0.04), wide) == 0, "the slots are full"


def test_cheap_steps_go_deep_and_expensive_ones_do_not():
    depths = [depth_taken(made(step_s, 1.0), 0.85) for step_s in (0.001, 0.01, 0.1, 0.5, 2.0)]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] > 20
    assert depths[-1] == 0


def test_a_fixed_depth_ignores_cost():
    assert depth_taken(made(100.0, 0.001, fixed=FixedShape(depth=40)), 0.01) == LIMITS.depth


def rows_taken(policy, chances, cached_rows=CACHED):
    return policy.serial_rows(chances, Outlook(4.0, 4, 0.04, cached_rows), History())


def test_rows_are_added_while_each_earns_more_than_it_costs():
    chances = [0.9, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.02]
    taken = [rows_taken(made(row_s=row_s), chances) for row_s in (1e-6, 0.003, 0.02, 0.05, 0.5)]
    assert taken == sorted(taken, reverse=True)
    assert taken[0] == len(chances)
    assert taken[-1] == 1


def test_a_step_dear_beyond_some_rows_is_filled_up_to_them():
    """The CPU's kernels take four rows in hardly more time than one, and five in twice the time."""
    costs = replace(plan_costs(), step=RowTimes((1, 4, 5), (0.010, 0.011, 0.060)))
    assert rows_taken(DraftPolicy(LIMITS, costs, 4), [0.9, 0.1, 0.1, 0.1, 0.1, 0.1]) == 4


def test_a_node_that_is_hardly_possible_is_not_expanded_beside_another():
    assert rows_taken(made(row_s=0.0), [0.5, 0.019, 0.001]) == 1


def test_a_fixed_width_is_kept_while_drafting_pays():
    policy = made(fixed=FixedShape(width=3))
    assert rows_taken(policy, [0.9, 0.001, 0.001, 0.001]) == 3
    assert rows_taken(policy, [0.9, 0.5]) == 2
    assert rows_taken(made(9.0, 0.01, fixed=FixedShape(width=3)), [0.9, 0.5, 0.4]) == 0


def test_recent_passes_count_in_the_rate():
    """What earlier passes made in their time is what a step has to beat."""
    policy, slow, fast = made(0.1, 1.0), History(), History()
    for _ in range(20):
        slow.observe(*ROOT_ALONE, round_s=1.0)
        fast.observe(chain_of([0]), VerifyResult((0,), tuple(range(30))), [], round_s=1.0)
    assert policy.serial_rows([0.3], Outlook(1.0, 1, 0.0, CACHED), slow) == 1
    assert policy.serial_rows([0.3], Outlook(1.0, 1, 0.0, CACHED), fast) == 0


@pytest.mark.parametrize(("chance", "rows", "pays"), [(0.2, 1, True), (0.05, 1, False), (0.9, 3, True)])
def test_a_guess_pays_by_the_step_it_saves(chance, rows, pays):
    assert made(0.01, row_s=0.001).ngram_pays(chance, rows, CACHED) == pays


def test_leaves_are_dearer_where_computing_limits_the_pass():
    costs = replace(plan_costs(pass_s=0.1), compute=RowTimes((1, 64), (0.1, 0.74)))
    limited, outlook = DraftPolicy(LIMITS, costs, 4), Outlook(5.0, 20, 0.0, CACHED)
    assert made().least_leaf_chance(outlook, History()) == pytest.approx(0.02)
    assert limited.least_leaf_chance(outlook, History()) > 0.1


def shadow_steps(policy, chances=(0.5, 0.3), layers=4, drafted_s=0.0, cached_rows=CACHED):
    """Rows of each step, layer by layer, when the same candidates stay."""
    spent_s, taken, under_way = 0.0, [], PassUnderWay(8, drafted_s, cached_rows)
    for layer in range(layers):
        taken.append([])
        while rows := policy.shadow_step_rows(chances, under_way, layer=layer, shadow_s=spent_s):
            spent_s += policy.step_s(rows, cached_rows)
            taken[-1].append(rows)
    return taken, spent_s


def test_the_shadow_fills_what_the_link_leaves_idle_layer_by_layer():
    (*taken, last), spent_s = shadow_steps(made(0.01, 1.0, compute_s=0.2))
    assert 0 <= spent_s - (0.75 - 0.2) * 3 / 4 <= 0.015, "each step is made up for before the next"
    counts = [len(steps) for steps in taken]
    assert max(counts) - min(counts) <= 1
    assert not last, "no weights are waited for after it"


def test_a_shadow_step_begins_where_enough_layers_follow():
    """It is made up for by their idle time; what went by before is lost."""
    taken, _ = shadow_steps(made(0.1, 1.0, row_s=0.0, compute_s=0.35), layers=4)
    assert [len(steps) for steps in taken] == [2, 1, 1, 0]
    assert shadow_steps(made(0.31, 1.0, row_s=0.0, compute_s=0.35))[0] == [[], [], [], []]


def test_no_shadow_step_runs_while_the_slots_are_full():
    """They hold a third of what the link brings, and the draft before the pass has filled them."""
    taken, _ = shadow_steps(made(0.01, 1.0, prefetch_s=0.33))
    assert [bool(steps) for steps in taken] == [False, True, True, False]


def test_there_is_no_shadow_where_computing_takes_all_the_time():
    assert shadow_steps(made(0.01, 0.2, compute_s=0.2)) == ([[], [], [], []], 0.0)


def test_a_shadow_step_is_as_wide_as_gives_most_chance_a_second():
    under_way, at = PassUnderWay(4, 0.0, CACHED), {"layer": 0, "shadow_s": 0.0}
    assert made(0.01, row_s=0.001).shadow_step_rows([0.5, 0.4, 0.3], under_way, **at) == 3
    assert made(0.01, row_s=0.02).shadow_step_rows([0.5, 0.4, 0.3], under_way, **at) == 1
    assert made(0.01).shadow_step_rows([0.001], under_way, **at) == 0
    assert made(0.01).shadow_step_rows([], under_way, **at) == 0


@pytest.mark.parametrize(("drafted_s", "idle_s"), [(0.0, 0.55), (0.2, 0.55), (0.5, 0.3), (2.0, 0.2)])
def test_what_the_link_moved_before_a_pass_leaves_less_shadow(drafted_s, idle_s):
    policy = made(0.01, 1.0, compute_s=0.2, prefetch_s=0.6)
    spent_s = shadow_steps(policy, drafted_s=drafted_s)[1]
    assert 0 <= spent_s - idle_s * 3 / 4 <= 0.015


def test_trees_are_shallower_where_long_contexts_make_steps_dear_and_passes_not():
    policy = made(0.01, 1.0, step_attention_s=0.05)
    depths = [depth_taken(policy, 0.85, cached_rows=rows) for rows in (0, 256, 1024, 6000)]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] == depths[1] > depths[2] > depths[3]
    assert depths[3] == best_depth(0.01 + 0.05 * (6000 - 256) / 1024, 1.0, 0.85)


def test_trees_are_deeper_where_long_contexts_make_passes_dear_and_steps_not():
    policy = made(0.1, 0.2, pass_attention_s=0.5)
    short, long = (depth_taken(policy, 0.85, cached_rows=rows) for rows in (256, 6000))
    assert long > short
    assert long == best_depth(0.1, 0.5 * (6000 - 256) / 1024, 0.85)


def test_a_longer_context_leaves_less_shadow():
    """Steps cost more, and the pass computes while it waited before."""
    for costs in ({"step_attention_s": 0.02}, {"pass_attention_s": 0.05}):
        counts = [
            sum(map(len, shadow_steps(made(0.01, 1.0, **costs), cached_rows=rows)[0])) for rows in (256, 6000)
        ]
        assert counts[1] < counts[0] / 1.5, costs


def test_a_leaf_is_dearer_where_a_long_context_is_computed():
    costs = replace(plan_costs(pass_s=0.1), pass_attention=RowTimes((1, 64), (0.01, 0.2)))
    policy = DraftPolicy(LIMITS, costs, 4)
    short, long = (policy.least_leaf_chance(Outlook(5.0, 20, 0.0, rows), History()) for rows in (256, 6000))
    assert short == pytest.approx(0.02)
    assert long > 0.1


def test_a_guess_in_a_row_of_a_dear_step_saves_more():
    policy = made(0.01, row_s=0.002, step_attention_s=0.01)
    assert not policy.ngram_pays(0.1, 1, 256)
    assert policy.ngram_pays(0.1, 1, 6000)


@pytest.mark.parametrize(("wanted", "depth"), [(1, 0), (2, 1), (17, 16), (41, 40), (500, 40), (0, 0)])
def test_the_bonus_token_counts_as_wanted(wanted, depth):
    limits = made().limits(wanted)
    assert limits.depth == depth
    assert limits.nodes <= LIMITS.nodes
    assert limits.width <= LIMITS.width


def first_step_pays(history):
    return made(0.1, 0.2).serial_rows([1.0], Outlook(1.0, 1, 0.0, CACHED), history) > 0


def test_speculation_switches_off_when_nothing_is_accepted_and_is_probed_again():
    history = History()
    assert first_step_pays(history)
    for _ in range(60):
        history.learn_yield(0.05)
    assert not first_step_pays(history)
    waits = []
    for _ in range(3):
        passes = 0
        while not first_step_pays(history) and passes < 300:
            history.observe(*ROOT_ALONE, round_s=0.2)
            passes += 1
        waits.append(passes)
        history.learn_yield(0.05)
        history.observe(chain_of([0, 1]), VerifyResult((0,), (7,)), [], round_s=0.3)
        assert not first_step_pays(history), "a probe that failed is not repeated at once"
    assert all(1 <= passes < 300 for passes in waits)


def test_a_probe_that_succeeds_switches_speculation_on():
    history = History()
    for _ in range(60):
        history.learn_yield(0.05)
    assert not first_step_pays(history)
    for _ in range(60):
        history.learn_yield(0.95)
    assert first_step_pays(history)


def rankings(sigma, count, seed=0):
    """What a target chose among four tokens of a draft whose scores err by `sigma`, in sharpened guesses."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        scores = generator.normal(0, 2, 4)
        chosen = int(np.argmax(scores + generator.normal(0, sigma, 4)))
        order = np.argsort(-scores)
        guesses = (scores - scores.max()) / 0.2
        guesses -= np.log(np.exp(guesses).sum())
        yield Ranking(tuple(guesses[order].tolist()), order.tolist().index(chosen))


@pytest.mark.parametrize("sigma", [0.1, 0.8])
def test_a_draft_is_believed_as_far_as_it_is_right(sigma):
    """Of a draft that errs by much the runner-up is often right, though the draft is sure of its best token."""
    calibration = Calibration()
    for ranking in rankings(sigma, 300):
        calibration.observe(ranking)
    expected, taken = np.zeros(4), np.zeros(4)
    for ranking in rankings(sigma, 400, seed=1):
        expected += calibration.shares(ranking.log_probs)
        taken[ranking.chosen] += 1
    assert expected / 400 == pytest.approx(taken / 400, abs=0.05)


def test_a_draft_is_believed_at_first():
    guesses = np.log([0.9, 0.09, 0.01])
    assert Calibration().shares(guesses) == pytest.approx(np.exp(guesses), abs=0.15)


@pytest.mark.parametrize("guesses", [[0.0, -800.0], [-800.0], [-0.7, -0.7, -np.inf]])
def test_no_guess_is_impossible(guesses):
    """The target may choose what the draft finds next to impossible."""
    calibration = Calibration()
    calibration.observe(Ranking(tuple(guesses), len(guesses) - 1))
    shares = calibration.shares(guesses)
    assert np.isfinite(shares).all()
    assert sum(shares) == pytest.approx(1)


def test_a_draft_that_does_not_find_the_tokens_is_not_believed():
    calibration = Calibration()
    before = calibration.shares([-0.1, -2.4])
    for _ in range(100):
        calibration.observe(Ranking((-0.1, -2.4), None))
    after = calibration.shares([-0.1, -2.4])
    assert sum(after) < 0.1
    assert after[0] / after[1] == pytest.approx(before[0] / before[1]), "nothing is learned of their order"


def test_the_same_costs_and_outcomes_give_the_same_decisions():
    def run():
        policy, history, generator = made(0.02, 0.4), History(), np.random.default_rng(4)
        depths = []
        for _ in range(40):
            chance = history.calibration.shares(np.log([0.9, 0.1]))[0]
            depths.append(depth_taken(policy, chance, history))
            result = VerifyResult((0, 1)[: (accepted := int(generator.integers(1, 3)))], (1,) * accepted)
            rankings = [Ranking((-0.1, -2.4), accepted - 1)]
            history.observe(chain_of([0, 1, 2]), result, rankings, round_s=0.44)
        return depths

    assert run() == run()
