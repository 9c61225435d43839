"""Drafting in the shadow of a pass: what was drafted there begins the next tree, and no token changes."""

import numpy as np
import pytest
import torch
from fakes import (
    CPU,
    TARGET_MADE,
    VOCAB,
    FakeDraft,
    FakeTarget,
    LateSteps,
    blended,
    emitted,
    fake_cache,
    fake_engine,
    free_policy,
    grow_tree,
    plain_answer,
    plan_costs,
    policy,
    random_table,
    request_for,
    sampled,
    steps_of,
)

from subspec_cli.checkpoint.layer_description import AttentionShape
from subspec_cli.decoding.sampler import GreedySampler
from subspec_cli.drafting.draft_steps import DirectSteps
from subspec_cli.drafting.frontier import Frontier
from subspec_cli.drafting.growing_tree import ROOT, GrowingTree
from subspec_cli.drafting.history import History
from subspec_cli.drafting.policy import DraftPolicy
from subspec_cli.drafting.tree_drafter import TreeDrafter
from subspec_cli.limits import MOST_ROWS
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.planning.costs import PlanCosts

TABLE = random_table(1)

pytestmark = pytest.mark.usefixtures("checked_trees")

PROMPT = (3, 1, 4, 1, 5)


def circle(prefix):
    return np.eye(VOCAB)[(prefix[-1] + 1) % 4] * 9


def answered(draft_table, plan, *, limit=40, sampler=None, eos_ids=(), ahead=0):
    """(tokens, stats, draft, target) of one answer."""
    kv, target, draft = fake_cache(96, scratch=160), FakeTarget(TABLE), FakeDraft(draft_table)
    drafter = TreeDrafter(steps_of(draft, ahead), plan, eos_ids=eos_ids)
    engine = fake_engine(target, kv, drafter)
    outputs = list(engine.generate(request_for(PROMPT, limit, sampler=sampler, eos_ids=eos_ids)))
    return emitted(outputs), outputs[-1].stats, draft, target


def test_a_draft_that_is_always_right_needs_serial_steps_only_once():
    tokens, stats, _, _ = answered(TABLE, policy(3, 1, 8, fixed_depth=True, shadow_rows=40))
    assert tokens == plain_answer(TABLE, PROMPT, 40)
    assert stats.shadow_hits == stats.passes - 1
    assert stats.draft_steps == 3
    assert stats.shadow_steps > 0


@pytest.mark.parametrize("sampler", [None, sampled(3), sampled(4, temperature=0.7, top_p=0.9)])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
@pytest.mark.parametrize("ahead", [0, 1])
def test_no_token_changes_however_right_the_draft_is(ahead, seed, share, sampler):
    draft = blended(TABLE, random_table(seed + 10), share)
    plan = policy(6, 4, 20, shadow_rows=30)
    tokens, stats, _, _ = answered(draft, plan, sampler=sampler, ahead=ahead)
    assert tokens == plain_answer(TABLE, PROMPT, 40, sampler)
    assert stats.shadow_steps > 0


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_hit_saves_steps_and_costs_no_acceptance(ahead):
    draft = blended(TABLE, random_table(7), 0.15)
    with_shadow = answered(draft, free_policy(4, 3, 14, shadow_rows=60), limit=80, ahead=ahead)[1]
    without = answered(draft, free_policy(4, 3, 14), limit=80, ahead=ahead)[1]
    assert 0 < with_shadow.shadow_hits <= with_shadow.passes
    assert with_shadow.draft_steps < without.draft_steps
    assert without.shadow_steps == without.shadow_hits == 0
    assert with_shadow.tau > 0.8 * without.tau


def leaving(prefix):
    """A target that takes its draft's second choice at every fourth position."""
    row = TABLE(prefix).copy()
    if len(prefix) % 4 == 0:
        best, second = np.argsort(-row, kind="stable")[:2]
        row[[best, second]] = row[[second, best]]
    return row


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_runner_up_that_was_left_out_of_the_tree_begins_the_next_one(ahead):
    """Trees are chains, so every path that leaves one ends in a token that only the shadow has worked below."""
    kv, target, draft = fake_cache(96, scratch=160), FakeTarget(leaving), FakeDraft(TABLE)
    plan = policy(6, 1, 7, fixed_depth=True, fixed_width=True, costs=plan_costs(0.01, 1.0), shadow_rows=40)
    engine = fake_engine(target, kv, TreeDrafter(steps_of(draft, ahead), plan, eos_ids=()))
    outputs = list(engine.generate(request_for(PROMPT, 60)))
    assert emitted(outputs) == plain_answer(leaving, PROMPT, 60)
    stats = outputs[-1].stats
    assert stats.shadow_hits >= 0.5 * (stats.passes - 1)
    assert stats.shadow_levels >= stats.shadow_hits
    assert 0 < stats.useful_shadow_steps < stats.shadow_steps


def grown(table, plan, history=None):
    """A drafter whose first tree is grown and under verification."""
    kv = fake_cache(96, scratch=160)
    for place, token in enumerate(PROMPT[:-1]):
        kv.write(
            0,
            place,
            torch.tensor([[[token, place]]], dtype=torch.float64),
            torch.full((1, 1, 2), 2.0).double(),
        )
        kv.commit([0], [token])
    found = FakeDraft(table)
    drafter = TreeDrafter(DirectSteps(found), plan, eos_ids=(), history=history)
    return drafter, found, grow_tree(drafter, kv, PROMPT[-1], 40)


def test_the_shadow_teaches_nothing_of_steps_before_a_pass():
    """It expands what is unlikely, below which hardly anything is worth a node."""
    history, draft = History(), blended(TABLE, random_table(7), 0.5)
    drafter, found, _ = grown(draft, policy(4, 3, 14, costs=plan_costs(0.01, 2.0), shadow_rows=200), history)
    taught, before = (history.step_yield, history.child_shares), len(found.calls)
    assert taught != (History().step_yield, History().child_shares), "steps before the pass teach"
    drafter.work_in_shadow(0)
    assert len(found.calls) > before + 10
    assert (history.step_yield, history.child_shares) == taught


def test_the_shadow_works_below_many_pairs_before_it_goes_deep():
    """Where all tokens are as likely, every row is of another pair of path end and next token."""

    def even(prefix):
        return np.zeros(VOCAB)

    drafter, found, proposal = grown(even, policy(3, 4, 9, costs=plan_costs(0.05, 2.0), shadow_rows=60))
    tree, verified = proposal.tree, [PROMPT[:-1]]
    for token, parent in zip(tree.token_ids, tree.parents, strict=True):
        verified.append((*verified[parent + 1], token))
    before = len(found.calls)
    drafter.work_in_shadow(0)
    rows = [prefix for call in found.calls[before:] for prefix in call.prefixes]
    assert len(rows) == len(set(rows)) > 8
    pairs = [row for row in rows if row not in verified and row[:-1] in verified]
    assert len(pairs) > 0.8 * len(rows)


def test_a_leaf_under_verification_gives_way_to_a_pair_that_may_end_the_path():
    """Its row alone saves nothing: the pair that comes is below it."""
    kv, tree = fake_cache(96, scratch=160), GrowingTree(7, 20)
    drafter = TreeDrafter(DirectSteps(FakeDraft(TABLE)), policy(shadow_rows=9), eos_ids=())
    frontier = Frontier(tree, drafter.begin(GreedySampler(), kv).context)
    tree.expand(ROOT)
    leaf, pair = tree.add(ROOT, 1, -1.0, 0.3), tree.add(ROOT, 2, -2.0, 0.2)
    assert [row.node for row in frontier.offer(2, 2, 9).rows] == [leaf, pair]
    tree.freeze([leaf])
    rows = frontier.offer(2, 2, 9).rows
    assert [row.node for row in rows] == [pair, leaf]
    assert [frontier.worth(row) for row in rows] == pytest.approx([0.2, 0.3 * 0.8 / 2])
    assert [row.node for row in frontier.offer(1, 1, 9).rows] == [pair]


def test_the_shadow_of_a_pass_takes_no_more_than_its_share_of_the_link_time():
    for compute_s in (0.0, 0.2, 0.6, 0.8):
        plan = policy(4, 3, 14, costs=plan_costs(0.01, 1.0, compute_s=compute_s), shadow_rows=200)
        drafter, found, _ = grown(TABLE, plan)
        before, spent_s = len(found.calls), []
        for layer in range(2):
            drafter.work_in_shadow(layer)
            spent_s.append(sum(plan.step_s(call.batch.rows, 9) for call in found.calls[before:]))
        idle_s = max(0.0, 0.75 - compute_s)
        assert spent_s[0] <= idle_s / 2 + plan.step_s(MOST_ROWS, 9)
        assert spent_s[1] == spent_s[0], "no layer follows"
        assert (spent_s[0] > 0.25 * idle_s) == (idle_s > 0)


@pytest.mark.parametrize("ahead", [0, 1])
def test_shadow_rows_lie_behind_the_tree_and_within_bounds(ahead):
    """Trap 6: the target never sees them, and they never reach into its rows."""
    log, kv = [], fake_cache(96, scratch=160)
    write = kv.write

    def logged(layer, start, keys, values):
        log.append((values[0, 0, 0].item(), kv.committed, start, start + keys.shape[1]))
        write(layer, start, keys, values)

    kv.write = logged
    target, plan = FakeTarget(TABLE), policy(6, 4, 20, shadow_rows=12)
    draft = FakeDraft(blended(TABLE, random_table(7), 0.3))
    engine = fake_engine(target, kv, TreeDrafter(steps_of(draft, ahead), plan, eos_ids=()))
    list(engine.generate(request_for(PROMPT, 40)))
    verified, in_shadow = (-1, 0), 0
    for maker, committed, start, end in log:
        if maker == TARGET_MADE:
            verified = (committed, end)
        elif committed == verified[0]:
            assert verified[1] <= start < end <= verified[1] + 12
            in_shadow += 1
        else:
            assert committed <= start < end <= committed + 20 + 12
    assert in_shadow > 5


@pytest.mark.parametrize("ahead", [0, 1])
def test_steps_are_the_same_in_every_run(ahead):
    draft = blended(TABLE, random_table(5), 0.3)
    runs = [answered(draft, policy(9, 4, 24, shadow_rows=40), ahead=ahead) for _ in range(2)]
    for first, second in zip(runs[0][2].calls, runs[1][2].calls, strict=True):
        assert first.prefixes == second.prefixes
        assert first.batch.start == second.batch.start
    assert len(runs[0][3].calls) == len(runs[1][3].calls)


@pytest.mark.parametrize("ahead", [0, 1])
def test_no_findings_are_taken_into_another_answer(ahead):
    """State of an answer that was left early must not reach into the next one."""
    kv, target = fake_cache(96, scratch=160), FakeTarget(TABLE)
    plan = policy(4, 3, 14, shadow_rows=30)
    engine = fake_engine(target, kv, TreeDrafter(steps_of(FakeDraft(TABLE), ahead), plan, eos_ids=()))
    steps = engine.generate(request_for(PROMPT, 40))
    for _ in range(3):
        next(steps)
    steps.close()
    other = (9, 8, 7)
    assert emitted(list(engine.generate(request_for(other, 30)))) == plain_answer(TABLE, other, 30)


def test_a_step_in_flight_when_the_user_interrupts_is_forgotten():
    class Interrupted(LateSteps):
        count = 0

        def start(self, parts):
            super().start(parts)
            self.count += 1
            if self.count == 5:
                raise KeyboardInterrupt

    kv, target, draft = fake_cache(96, scratch=160), FakeTarget(TABLE), FakeDraft(TABLE)
    plan, steps = policy(4, 3, 14, shadow_rows=30), Interrupted(draft)
    engine = fake_engine(target, kv, TreeDrafter(steps, plan, eos_ids=()))
    with pytest.raises(KeyboardInterrupt):
        list(engine.generate(request_for(PROMPT, 40)))
    assert steps.unread
    other = (9, 8, 7)
    outputs = list(engine.generate(request_for(other, 30)))
    assert emitted(outputs) == plain_answer(TABLE, other, 30)
    assert outputs[-1].stats.tau > 3


@pytest.mark.parametrize("limit", range(1, 14))
@pytest.mark.parametrize("ahead", [0, 1])
def test_nothing_is_drafted_beyond_the_last_wanted_token(ahead, limit):
    tokens, _, draft, _ = answered(TABLE, free_policy(3, 2, 9, shadow_rows=30), limit=limit, ahead=ahead)
    assert tokens == plain_answer(TABLE, PROMPT, limit)
    positions = [int(position) for call in draft.calls for position in call.batch.positions]
    assert all(position < len(PROMPT) + limit for position in positions)


@pytest.mark.parametrize("ahead", [0, 1])
def test_nothing_is_drafted_below_an_end_token(ahead):
    table = random_table(2)
    end = plain_answer(TABLE, PROMPT, 9)[8]
    _, _, draft, _ = answered(blended(TABLE, table, 0.2), policy(5, 4, 16, shadow_rows=30), eos_ids=(end,))
    for call in draft.calls:
        for prefix in call.prefixes:
            assert end not in prefix[len(PROMPT) + 1 :]


def test_a_guess_of_the_lookup_makes_several_nodes_in_one_step():
    """A text that repeats itself: with guesses fewer steps make the same tree."""

    def circle(prefix):
        return np.eye(12)[(prefix[-1] + 1) % 4] * 20

    def run(width):
        kv, target, draft = fake_cache(96, scratch=160), FakeTarget(circle), FakeDraft(circle)
        plan = free_policy(8, width, 9)
        drafter = TreeDrafter(DirectSteps(draft), plan, eos_ids=())
        engine = fake_engine(target, kv, drafter)
        outputs = list(engine.generate(request_for((0, 1, 2, 3, 0, 1, 2, 3), 36)))
        assert emitted(outputs) == plain_answer(circle, (0, 1, 2, 3, 0, 1, 2, 3), 36)
        return outputs[-1].stats

    alone, guessed = run(1), run(4)
    assert guessed.tau == alone.tau
    assert guessed.draft_steps < 0.7 * alone.draft_steps


def test_wrong_guesses_change_no_token_and_leave_no_rows():
    """The prompt promises what the model never says."""
    prompt = (1, 2, 3) * 6
    kv, target, draft = fake_cache(96, scratch=160), FakeTarget(TABLE), FakeDraft(TABLE)
    plan = free_policy(6, 4, 20, shadow_rows=30)
    engine = fake_engine(target, kv, TreeDrafter(DirectSteps(draft), plan, eos_ids=()))
    assert emitted(list(engine.generate(request_for(prompt, 40)))) == plain_answer(TABLE, prompt, 40)


def test_scratch_rows_are_moved_in_order():
    kv = KVCache([AttentionShape(1, 1, 2)] * 2, context=4, scratch=6, dtype=torch.float32, device=CPU)
    kv.commit([0], [7])
    for layer in range(2):
        marks = torch.arange(6.0)[None, :, None].expand(1, 6, 2) + 10 * layer
        kv.write(layer, 1, marks, -marks)
    kv.move_scratch([3, 2, 5])
    for layer in range(2):
        keys, values = kv.read(layer, 4)
        assert keys[0, 1:, 0].tolist() == [3 + 10 * layer, 2 + 10 * layer, 5 + 10 * layer]
        assert values[0, 1:, 1].tolist() == [-3 - 10 * layer, -2 - 10 * layer, -5 - 10 * layer]


class AskedCosts(PlanCosts):
    """Costs that note for how many cached rows each of them was asked."""

    asked = ()

    def compute_s(self, rows, cached_rows):
        AskedCosts.asked[-1].add(("pass", cached_rows))
        return PlanCosts.compute_s(self, rows, cached_rows)

    def step_s(self, rows, cached_rows):
        AskedCosts.asked[-1].add(("step", cached_rows))
        return PlanCosts.step_s(self, rows, cached_rows)


@pytest.mark.parametrize("ahead", [0, 1])
def test_all_decisions_of_a_round_are_at_the_rows_that_were_committed_before_it(ahead, monkeypatch):
    """Serial steps, n-grams, leaves, shadow steps and the history, although the pass commits rows meanwhile."""
    prompt = (0, 1, 2, 3) * 3
    costs = AskedCosts(*(getattr(plan_costs(), name) for name in PlanCosts.__slots__))
    guesses = []
    monkeypatch.setattr(
        DraftPolicy,
        "ngram_pays",
        lambda policy, chance, rows, cached_rows: guesses.append(cached_rows) or True,
    )
    kv, target = fake_cache(96, scratch=160), FakeTarget(circle)
    plan = policy(6, 4, 20, costs=costs, shadow_rows=30)
    engine = fake_engine(target, kv, TreeDrafter(steps_of(FakeDraft(circle), ahead), plan, eos_ids=()))
    AskedCosts.asked, committed = [set()], [len(prompt)]
    for output in engine.generate(request_for(prompt, 40)):
        if output.stats.passes:
            assert {rows for _, rows in AskedCosts.asked[-1]} | set(guesses) == {committed[-1]}
            assert {kind for kind, _ in AskedCosts.asked[-1]} == {"pass", "step"}
            committed.append(kv.committed)
            AskedCosts.asked.append(set())
            guesses.clear()
    assert len(committed) > 3
