"""Growing trees with a draft that is a table: what is asked of it, what is in the tree, and its bounds."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import (
    VOCAB,
    FakeDraft,
    FakeTarget,
    GreedySampler,
    LateSteps,
    fake_cache,
    free_policy,
    grow_tree,
    plain_answer,
    plan_costs,
    policy,
    random_table,
    sampled,
    steps_of,
)

from subspec_cli.decoding.drafter import PlainDrafter
from subspec_cli.decoding.sampler import sample_token
from subspec_cli.drafting.draft_steps import DirectSteps, likeliest, rank, sampling_of
from subspec_cli.drafting.tree_drafter import TreeDrafter
from subspec_cli.modeling.decoder import DraftLogits
from subspec_cli.modeling.row_group import chunk_group

pytestmark = pytest.mark.usefixtures("checked_trees")

PROMPT = (1, 2, 3)
ROOT = 4


def prompted_cache(**size):
    """A cache with the prompt's rows."""
    kv, target = fake_cache(**size), FakeTarget(random_table(0))
    target.forward(chunk_group(PROMPT, 0), kv)
    kv.commit(range(len(PROMPT)), PROMPT)
    return kv


def grown(table, plan, *, sampler=None, wanted=99, eos_ids=(), ahead=0):
    """A tree under ROOT after PROMPT, and the calls that made it."""
    kv, draft = prompted_cache(), FakeDraft(table)
    drafter = TreeDrafter(steps_of(draft, ahead), plan, eos_ids=eos_ids)
    tree = grow_tree(drafter, kv, ROOT, wanted, sampler).tree
    assert kv.token_ids == PROMPT
    return tree, draft.calls


def tokens_of(tree, node):
    return () if node < 0 else (*tokens_of(tree, tree.parents[node]), tree.token_ids[node])


def paths(tree):
    return {tokens_of(tree, node) for node in range(len(tree))}


def chain(table, length, sampler=None, eos_ids=()):
    """What the draft alone would answer, up to an end token."""
    tokens = plain_answer(table, (*PROMPT, ROOT), length, sampler)
    ends = [n for n, token in enumerate(tokens, start=1) if token in eos_ids]
    return (ROOT, *tokens[: ends[0] if ends else length])


SHAPES = [
    (1, 1, 2),
    (5, 1, 6),
    (5, 1, 40),
    (6, 2, 7),
    (8, 3, 9),
    (8, 3, 20),
    (12, 3, 64),
    (12, 8, 64),
    (9, 4, 5),
]


@pytest.mark.parametrize("fixed_width", [False, True])
@pytest.mark.parametrize(("depth", "width", "nodes"), SHAPES)
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_tree_holds_its_own_chain_within_its_bounds(ahead, depth, width, nodes, fixed_width):
    """A tree must never lose to the chain it could have been, however few nodes there are."""
    for seed in range(12):
        table = random_table(seed, spread=(0.3, 1.0, 4.0)[seed % 3])
        sampler = sampled(seed) if seed % 2 else GreedySampler()
        plan = free_policy(depth, width, nodes, fixed_width=fixed_width)
        tree, calls = grown(table, plan, sampler=sampler, ahead=ahead)
        length = min(depth, nodes - 1)
        assert chain(table, length, sampler) in paths(tree)
        assert max(tree.depths) == length
        assert len(tree) <= nodes
        assert all(call.batch.rows <= width for call in calls)
        assert len(calls) <= length
        if width == 1:
            assert len(calls) == length


def test_a_draft_read_late_takes_no_more_steps_for_its_chain():
    """Every step but the first takes the token that the one before has found, and none waits to be started."""
    table = random_table(3, spread=20.0)
    for width in (1, 3):
        kv = prompted_cache()
        steps = LateSteps(FakeDraft(table))
        drafter = TreeDrafter(steps, free_policy(9, width, 40), eos_ids=())
        tree = grow_tree(drafter, kv, ROOT, 99).tree
        assert steps.behind == [1] * 8 + [0]
        assert max(tree.depths) == 9
        assert chain(table, 9) in paths(tree)


@pytest.mark.parametrize("seed", range(6))
def test_an_expanded_node_lies_in_the_row_of_its_number(seed):
    """Scratch rows, positions and masks: every row sees prompt, ancestors and itself."""
    tree, calls = grown(random_table(seed, spread=1.0), free_policy(7, 3, 30))
    assert tree.token_ids[0] == ROOT
    seen = {}
    for call in calls:
        first = call.batch.start - len(PROMPT)
        assert first <= max(seen, default=-1) + 1, "rows are handed out without gaps"
        seen |= dict(enumerate(call.prefixes, start=first))
    for node in set(tree.parents[1:]):
        assert seen[node] == PROMPT + tokens_of(tree, node)


@pytest.mark.parametrize("seed", range(6))
def test_siblings_are_the_drafts_best_tokens_each_once(seed):
    table = random_table(seed, spread=1.0)
    tree, _ = grown(table, free_policy(6, 3, 40))
    for parent, children in enumerate(tree.children()):
        count = sum(n == parent for n in tree.parents)
        assert len(children) == count, "two siblings with the same token"
        row = table(PROMPT + tokens_of(tree, parent))
        best = np.lexsort((np.arange(VOCAB), -row))[:count].tolist()
        assert set(children) == set(best)


@pytest.mark.parametrize("seed", range(6))
def test_log_probs_accumulate_along_paths(seed):
    table = random_table(seed, spread=1.0)
    tree, _ = grown(table, free_policy(6, 3, 40))
    assert tree.log_probs[0] == 0
    for parent, children in enumerate(tree.children()):
        if not children:
            continue
        row = table(PROMPT + tokens_of(tree, parent))
        shares = {
            token: math.exp(tree.log_probs[n] - tree.log_probs[parent]) for token, n in children.items()
        }
        assert all(0 < share <= 1 + 1e-12 for share in shares.values())
        assert sum(shares.values()) <= 1 + 1e-9
        ranked = sorted(children, key=lambda token: -row[token])
        assert all(shares[a] >= shares[b] for a, b in itertools.pairwise(ranked))
        assert all(row[a] != row[b] or shares[a] == shares[b] for a in ranked for b in ranked)


@pytest.mark.parametrize("wanted", [1, 2, 3, 6, 50])
def test_never_deeper_than_tokens_still_wanted(wanted):
    """Trap 12: the last wanted token is the bonus token, which needs no node."""
    for limits in (free_policy(8, 2, 40), policy(8, 2, 40)):
        tree, calls = grown(random_table(1), limits, wanted=wanted)
        assert max(tree.depths) <= wanted - 1
        assert len(calls) <= wanted - 1


def test_one_wanted_token_needs_no_draft():
    tree, calls = grown(random_table(1), free_policy(), wanted=1)
    assert tree == grow_tree(PlainDrafter(), fake_cache(), ROOT, 1).tree
    assert not calls


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("ahead", [0, 1])
def test_nothing_hangs_below_an_end_token(ahead, seed):
    table, eos_ids = random_table(seed, spread=0.8), (0, 5, 7)
    tree, _ = grown(table, free_policy(9, 3, 50), eos_ids=eos_ids, ahead=ahead)
    assert all(tree.token_ids[parent] not in eos_ids for parent in tree.parents[1:] if parent)
    assert chain(table, 9, eos_ids=eos_ids) in paths(tree)


def test_a_draft_that_only_ends_gives_one_level():
    def always_ends(prefix):
        return np.eye(VOCAB)[5] * 90

    tree, calls = grown(always_ends, free_policy(8, 1, 30), eos_ids=(5,))
    assert (ROOT, 5) in paths(tree)
    assert all(tree.token_ids[parent] != 5 for parent in tree.parents[1:])
    assert len(calls) <= 8


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "sampler", [GreedySampler(), sampled(1), sampled(1, top_p=0.9), sampled(1, top_k=3, top_p=0.9)]
)
def test_a_damaged_draft_proposes_nothing(sampler, bad):
    tree, calls = grown(lambda prefix: np.full(VOCAB, bad), free_policy(), sampler=sampler)
    assert len(tree) == 1
    assert len(calls) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_damaged_row_ends_its_branch_only(bad):
    table = random_table(3, spread=1.0)

    def partly_bad(prefix):
        return np.full(VOCAB, bad) if len(prefix) > len(PROMPT) + 3 else table(prefix)

    tree, _ = grown(partly_bad, free_policy(8, 3, 40))
    assert max(tree.depths) == 3
    assert np.isfinite(tree.log_probs).all()


def test_tokens_that_a_filter_forbids_are_not_drafted():
    table = random_table(5, spread=1.0)
    shape = free_policy(5, 3, 40, fixed_width=True)
    tree, _ = grown(table, shape, sampler=sampled(2, top_k=1))
    assert tree.token_ids == (ROOT, *plain_answer(table, (*PROMPT, ROOT), 5))


def test_the_noise_of_the_next_position_decides_the_ranking():
    """The child of a node at position p is the token of position p + 1, so it is ranked with that noise."""
    table = random_table(6, spread=1.0)
    sampler = sampled(8, choice=2)
    tree, _ = grown(table, free_policy(1, 1, 2), sampler=sampler)
    row = table((*PROMPT, ROOT))
    assert tree.token_ids[1] == sample_token(sampler, row, len(PROMPT) + 1)


def test_a_fixed_shape_is_kept_whatever_the_draft_thinks():
    for spread in (0.1, 8.0):
        shape = free_policy(depth=6, width=2, nodes=40, fixed_width=True)
        tree, calls = grown(random_table(1, spread=spread), shape)
        assert max(tree.depths) == 6
        assert [call.batch.rows for call in calls] == [1, 2, 2, 2, 2, 2]


def test_a_sure_draft_is_not_branched():
    """Side paths of a draft that is certain would only cost rows."""

    def sure(prefix):
        return np.eye(VOCAB)[len(prefix) % VOCAB] * 50

    tree, _ = grown(sure, free_policy(8, 3, 40))
    assert len(tree) == 9
    assert list(tree.parents) == list(range(-1, 8))


def test_the_root_alone_is_plain_decoding():
    tree = grow_tree(PlainDrafter(), fake_cache(), 7, 100).tree
    assert (tree.token_ids, tree.parents, tree.depths, tree.log_probs) == ((7,), (-1,), (0,), (0.0,))


def test_draft_logits_may_be_of_any_float_dtype():
    class HalfDraft(FakeDraft):
        def forward(self, rows):
            return DraftLogits(super().forward(rows).logits.to(torch.bfloat16))

    kv = fake_cache()
    draft = HalfDraft(random_table(1))
    drafter = TreeDrafter(DirectSteps(draft), free_policy(3, 2, 9), eos_ids=())
    assert grow_tree(drafter, kv, ROOT, 9, sampled(1)).tree.depth == 3


FILTERS = [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 300, "top_p": 0.9}, {"top_k": 5, "top_p": 0.7}]


def ranked(logits, sampler, positions):
    """What the drafter makes of draft rows, by way of the steps' own sampling rule."""
    batch = SimpleNamespace(positions=torch.tensor(positions) - 1)
    ids, scores = rank(DraftLogits(logits), sampling_of(sampler, batch, logits))
    return [likeliest(*row) for row in zip(ids.numpy(), scores.double().numpy(), strict=True)]


@pytest.mark.parametrize(
    "sampler",
    [
        GreedySampler(),
        sampled(1),
        sampled(2, temperature=0.3),
        sampled(2, temperature=1e-300),
        sampled(4, temperature=50.0, top_k=399),
        *(sampled(1, **filters) for filters in FILTERS),
        *(sampled(3, temperature=0.6, **filters) for filters in FILTERS),
    ],
)
def test_ranking_where_the_logits_are_agrees_with_ranking_whole_rows(sampler):
    logits = torch.randn((5, 400), generator=torch.Generator().manual_seed(0)) * 3
    positions = [7, 8, 8, 9, 30]
    for row, found, position in zip(logits, ranked(logits, sampler, positions), positions, strict=True):
        scaled = row.double().numpy() / sampler.temperature
        whole = sampler.scores(row.double().numpy(), position)
        kept = np.flatnonzero(np.isfinite(whole))
        # A token that is all but as likely as the last one that a filter keeps may slip in.
        slipped = [token for token, _ in found if token not in kept]
        assert all(scaled[token] > scaled[kept].min() - 1 / 32 for token in slipped)
        best = [int(token) for token in np.argsort(-whole)[:8] if token in kept]
        assert [token for token, _ in found if token in kept] == best[: len(found) - len(slipped)]
        if slipped:
            continue
        shares, exact = (
            [math.exp(share) for _, share in pairs]
            for pairs in (found, likeliest(np.array(best), whole[best]))
        )
        assert shares == pytest.approx(exact, abs=1e-4)


def circle(prefix):
    """A text that goes round in four tokens, all but one of its turns certain."""
    return np.eye(VOCAB)[(prefix[-1] + 1) % 4] * 20


def test_rows_of_a_tree_read_late_hold_what_its_nodes_say():
    """N-grams and placeholders leave gaps; what the pass gets has none, and every row its node's path."""
    gaps = 0
    for seed, nodes in itertools.product(range(12), (7, 16, 40)):
        table = circle if seed % 2 else random_table(seed, spread=1.5)
        kv = fake_cache(scratch=200)
        target, steps = FakeTarget(random_table(0)), LateSteps(FakeDraft(table))
        target.forward(chunk_group((0, 1, 2, 3, 0, 1, 2, 3, 0), 0), kv)
        kv.commit(range(9), (0, 1, 2, 3, 0, 1, 2, 3, 0))
        # Space for unused rows beside those of the tree.
        make = free_policy if seed % 3 else policy
        plan = make(30, 6, nodes, costs=plan_costs(0.001, row_s=1e-6), shadow_rows=60)
        tree = grow_tree(TreeDrafter(steps, plan, eos_ids=()), kv, 1, 99).tree
        taken = sum(call.batch.rows for call in steps.draft.calls)
        inner = set(tree.parents[1:])
        gaps += taken > len(tree)
        assert steps.fed
        assert len(tree) <= nodes
        keys = kv.read(0, kv.capacity)[0][0, 9:]
        mask = tree.ancestor_mask()
        for node in sorted(inner):
            assert keys[node].tolist() == [tree.token_ids[node], 9 + tree.depths[node]]
            assert mask[node].sum() == tree.depths[node] + 1
    assert gaps > 3


def test_what_cannot_have_children_is_not_looked_below():
    """An end token may be a placeholder, and its row computed in vain; once it is known, nothing below it is."""
    plan = policy(8, 3, 30, costs=plan_costs(1e-6, row_s=1e-9))
    _, calls = grown(lambda prefix: np.eye(VOCAB)[5] * 90, plan, eos_ids=(5,), ahead=1)
    assert len(calls) > 1
    assert all(5 not in prefix[:-1] for call in calls for prefix in call.prefixes)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_tree_goes_by_the_costs_at_its_committed_rows(ahead):
    """The same model and prices: below many cached rows a dear step is taken less often."""
    plan = policy(12, 1, 40, costs=plan_costs(0.01, 0.3, step_attention_s=0.2))
    table = random_table(3, spread=4.0)
    steps = {}
    for rows in (100, 1200):
        kv, draft, target = fake_cache(1500), FakeDraft(table), FakeTarget(random_table(0))
        target.forward(chunk_group([1] * rows, 0), kv)
        kv.commit(range(rows), [1] * rows)
        proposal = grow_tree(TreeDrafter(steps_of(draft, ahead), plan, eos_ids=()), kv, ROOT, 99)
        widths = [call.batch.rows for call in draft.calls]
        assert proposal.cost_s == pytest.approx(sum(plan.step_s(width, rows) for width in widths))
        steps[rows] = proposal.draft_steps
    assert 0 < steps[1200] < steps[100]
