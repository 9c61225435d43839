"""Token trees as flat arrays: parents, paths and who sees whom."""

import numpy as np
import pytest
import torch
from fakes import tree_of
from test_decoding_verification import random_tree

from subspec_cli.decoding.batches import prompt_batch, tree_batch
from subspec_cli.decoding.tree import TokenTree
from subspec_cli.drafting.growing_tree import GrowingTree, draft_batch
from subspec_cli.modeling.layers import RowRules

CPU = torch.device("cpu")


def trees():
    generator = np.random.default_rng(3)
    return [random_tree(generator, nodes, vocab=30) for nodes in (1, 2, 5, 13, 40) for _ in range(4)]


def brute_path(tree, node):
    return [] if node < 0 else [*brute_path(tree, tree.parents[node]), node]


def test_ancestor_mask_is_the_paths():
    for tree in trees():
        mask = tree.ancestor_mask()
        assert mask.dtype == torch.bool
        for node in range(len(tree)):
            assert torch.nonzero(mask[node]).flatten().tolist() == brute_path(tree, node)


def test_children_are_found_by_token():
    for tree in trees():
        for node, children in enumerate(tree.children()):
            found = {tree.token_ids[n]: n for n in range(1, len(tree)) if tree.parents[n] == node}
            assert children == found


@pytest.mark.parametrize("parents", [(0,), (-1, 1), (-1, -1), (-1, 0, 2), (-1, 0, 5)])
def test_a_parent_comes_before_its_child(parents):
    count = len(parents)
    with pytest.raises(AssertionError):
        TokenTree((0,) * count, parents, (0,) * count, (0.0,) * count)


NO_END = frozenset()


def grown_at_random(seed, nodes=40):
    """A growing tree whose nodes were expanded in random order, and the numbers in the order of their rows."""
    generator = np.random.default_rng(seed)
    tree, order = GrowingTree(7, capacity=96), []
    while len(tree.nodes) < nodes:
        able = tree.best_open(99, max_depth=99, eos_ids=NO_END)
        number = able[int(generator.integers(len(able)))]
        tree.expand(number)
        order.append(number)
        for token in range(int(generator.integers(1, 4))):
            chance = tree.nodes[number].chance * float(generator.random())
            tree.add(number, token, tree.nodes[number].log_prob - 1.0, chance)
    return tree, order


def tokens_to(tree, number):
    node = tree.nodes[number]
    return (*(tokens_to(tree, node.parent) if node.parent >= 0 else ()), node.token_id)


def frozen_tokens(tree, node):
    return (*(frozen_tokens(tree, tree.parents[node]) if node else ()), tree.token_ids[node])


@pytest.mark.parametrize("seed", range(8))
def test_a_frozen_tree_holds_expanded_nodes_in_their_rows_then_leaves(seed):
    growing, order = grown_at_random(seed)
    leaves = growing.best_open(5, max_depth=99, eos_ids=NO_END)
    tree = growing.freeze(leaves)
    assert [frozen_tokens(tree, node) for node in range(len(tree))] == [
        tokens_to(growing, number) for number in (*order, *leaves)
    ]
    assert [growing.nodes[number].row for number in order] == list(range(len(order)))
    assert growing.rows == len(tree)
    rows = len(order)
    assert growing.mask[:rows, :rows].equal(tree.ancestor_mask()[:rows, :rows])


@pytest.mark.parametrize("seed", range(8))
def test_rows_taken_after_freezing_lie_behind_the_tree_and_see_their_ancestors(seed):
    growing, _ = grown_at_random(seed)
    leaves = growing.best_open(5, max_depth=99, eos_ids=NO_END)
    size = len(growing.freeze(leaves))
    growing.expand(leaves[0])
    child = growing.add(leaves[0], 3, -1.0, 0.5)
    growing.expand(child)
    assert [growing.nodes[leaves[0]].row, growing.nodes[child].row] == [size, size + 1]
    above, number = {size + 1}, growing.nodes[child].parent
    while number >= 0:
        above.add(growing.nodes[number].row)
        number = growing.nodes[number].parent
    assert set(torch.nonzero(growing.mask[size + 1]).flatten().tolist()) == above


def test_a_row_that_no_node_took_leaves_nothing_behind():
    growing = GrowingTree(7, capacity=8)
    growing.expand(0)
    growing.take_row(growing.take_row(0, 1), 2)
    growing.give_back()
    assert growing.rows == growing.expanded == 1
    first, second = growing.add(0, 1, -1.0, 0.5), growing.add(0, 2, -2.0, 0.3)
    growing.expand(first)
    growing.expand(second)
    assert growing.mask[2, :3].tolist() == [True, False, True]


def test_rows_of_a_frozen_tree_are_not_given_back():
    growing = GrowingTree(7, capacity=8)
    growing.expand(0)
    growing.freeze([growing.add(0, token, -1.0, 0.5) for token in range(3)])
    growing.take_row(0, 1)
    growing.give_back()
    assert growing.rows == 4


@pytest.mark.parametrize("seed", range(12))
def test_gaps_are_closed_and_nothing_else_changes(seed):
    """Void rows strewn among those of nodes, against the tree without them."""
    generator = np.random.default_rng(seed)
    plain, order = grown_at_random(seed)
    gappy, rows = GrowingTree(7, capacity=96), []
    for number in order:
        for _ in range(int(generator.integers(3))):
            gappy.take_row(int(generator.integers(-1, gappy.rows)), 5)
        rows.append(gappy.rows)
        gappy.expand(number)
        for child in plain.nodes[number].children:
            old = plain.nodes[child]
            assert gappy.add(number, old.token_id, old.log_prob, old.chance) == child
    assert gappy.expanded == len(order) < gappy.rows
    assert gappy.compact() == rows
    assert gappy.compact() == []
    assert gappy.row_depths == plain.row_depths
    assert [node.row for node in gappy.nodes] == [node.row for node in plain.nodes]
    assert gappy.mask[: gappy.rows].equal(plain.mask[: plain.rows])
    assert gappy.freeze([]) == plain.freeze([])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("most_rows", [0, 1, 3, 99])
def test_a_subtree_is_what_was_found_below_a_node(seed, most_rows):
    growing, _ = grown_at_random(seed)
    number = max(
        (n for n, node in enumerate(growing.nodes) if node.parent >= 0 and node.row >= 0),
        key=lambda n: len(growing.nodes[n].children),
    )
    tree, rows = growing.subtree(number, most_rows=most_rows, max_depth=99)
    below = {
        tokens_to(growing, n): node
        for n, node in enumerate(growing.nodes)
        if tokens_to(growing, n)[: growing.nodes[number].depth + 1] == tokens_to(growing, number)
    }
    start = tokens_to(growing, number)[:-1]
    assert tree.nodes[0].token_id == growing.nodes[number].token_id
    for n, node in enumerate(tree.nodes):
        old = below[(*start, *tokens_to(tree, n))]
        assert node.chance == pytest.approx(old.chance / growing.nodes[number].chance)
        assert node.log_prob == pytest.approx(old.log_prob - growing.nodes[number].log_prob)
        if node.row >= 0:
            assert rows[node.row] == old.row
    expanded = [n for n in below.values() if n.row >= 0]
    assert len(rows) == tree.rows == min(most_rows, len(expanded))
    if most_rows == 99:
        assert len(tree.nodes) == len(below)
    kept = sorted(growing.nodes[n].chance for n in range(len(growing.nodes)) if growing.nodes[n].row in rows)
    assert kept == sorted(node.chance for node in expanded)[len(expanded) - len(kept) :]


def test_a_subtree_is_cut_at_a_depth():
    growing, number = GrowingTree(7, capacity=16), 0
    for token in range(6):
        growing.expand(number)
        number = growing.add(number, token, -1.0, 0.5)
    tree, rows = growing.subtree(1, most_rows=99, max_depth=3)
    assert rows == [1, 2, 3]
    assert max(node.depth for node in tree.nodes) == 3


def test_the_outcome_of_a_pass_is_found_by_its_token():
    growing = GrowingTree(7, capacity=16)
    growing.expand(0)
    first, second = growing.add(0, 1, -0.1, 0.9), growing.add(0, 2, -2.0, 0.1)
    growing.expand(first)
    third = growing.add(first, 5, -1.0, 0.5)
    growing.freeze([])
    assert growing.outcome(0, 2) == second
    assert growing.outcome(1, 5) == third
    assert growing.outcome(1, 6) is None


def test_prompt_rows_are_causal_over_what_is_cached():
    batch = prompt_batch([5, 6, 7], 4, RowRules(4))
    assert batch.token_ids.tolist() == [5, 6, 7, 7]
    assert batch.positions.tolist() == [4, 5, 6, 0]
    assert (batch.rows, batch.start) == (3, 4)
    assert batch.allowed.tolist() == [[True] * (5 + row) + [False] * (2 - row) for row in range(3)]
    assert batch.key_positions.tolist() == list(range(7))


def test_a_whole_tree_sees_prefix_ancestors_and_self():
    tree = tree_of([9, 1, 2, 3], [-1, 0, 0, 2])
    batch = tree_batch(tree, 2, RowRules(8))
    assert batch.token_ids.tolist() == [9, 1, 2, 3, 3, 3, 3, 3]
    assert batch.positions[:4].tolist() == [2, 3, 3, 4]
    assert len(batch.positions) == 8
    assert (batch.rows, batch.start) == (4, 2)
    assert batch.key_positions.tolist() == [0, 1, 2, 3, 3, 4]
    prefix = [[True, True]] * 4
    assert batch.allowed.tolist() == [
        a + b for a, b in zip(prefix, tree.ancestor_mask().tolist(), strict=True)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_a_draft_step_is_a_cut_of_the_whole_tree(seed):
    growing, order = grown_at_random(seed)
    whole = tree_batch(growing.freeze([]), 3, RowRules(1))
    first, count = len(order) - 3, 3
    tokens = [growing.nodes[number].token_id for number in order[first:]]
    step = draft_batch(growing, tokens, 3)
    assert (step.rows, step.start) == (count, 3 + first)
    assert step.token_ids.equal(whole.token_ids[first : first + count])
    assert step.positions.equal(whole.positions[first : first + count])
    assert step.allowed.equal(whole.allowed[first : first + count, : 3 + first + count])
    assert step.key_positions.equal(whole.key_positions[: 3 + first + count])
