"""Trees while they are drafted: rows, unused rows, freezing, subtrees, and the batch of one draft step."""

import numpy as np
import pytest
import torch
from fakes import as_batch

from subspec_cli.decoding.row_groups import tree_group
from subspec_cli.drafting.growing_tree import GrowingTree, draft_batch

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
        tree.check_integrity()
    return tree, order


def tokens_to(tree, number):
    node = tree.nodes[number]
    return (*(tokens_to(tree, node.parent) if node.parent is not None else ()), node.token_id)


def frozen_tokens(tree, node):
    return (*(frozen_tokens(tree, tree.parents[node]) if node else ()), tree.token_ids[node])


@pytest.mark.parametrize("seed", range(8))
def test_a_frozen_tree_holds_expanded_nodes_in_their_rows_then_leaves(seed):
    growing, order = grown_at_random(seed)
    leaves = growing.best_open(5, max_depth=99, eos_ids=NO_END)
    tree = growing.freeze(leaves)
    growing.check_integrity()
    assert [frozen_tokens(tree, node) for node in range(len(tree))] == [
        tokens_to(growing, number) for number in (*order, *leaves)
    ]
    assert [growing.nodes[number].row for number in order] == list(range(len(order)))
    assert growing.rows == len(tree)
    rows = len(order)
    assert growing.mask[:rows, :rows].equal(tree.ancestor_mask()[:rows, :rows])


def test_rankings_say_which_child_the_target_chose_in_the_tree_or_not():
    growing = GrowingTree(7, capacity=8)
    growing.expand(0)
    first, second, _ = (growing.add(0, token, -1.0 - token, 0.3) for token in (1, 2, 3))
    growing.expand(first)
    growing.add(first, 4, -4.0, 0.1)
    growing.freeze([second])
    assert growing.levels == 2
    assert growing.leaves == {second}
    assert growing.rankings([0, 1], [1, 9]) == [((-2.0, -3.0, -4.0), 0), ((-2.0,), None)]
    assert growing.rankings([0], [3]) == [((-2.0, -3.0, -4.0), 2)]
    assert growing.rankings([0, 2], [2, 5]) == [((-2.0, -3.0, -4.0), 1)], "nothing was found below a leaf"


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
    while number is not None:
        above.add(growing.nodes[number].row)
        number = growing.nodes[number].parent
    assert set(torch.nonzero(growing.mask[size + 1]).flatten().tolist()) == above


def test_a_row_that_no_node_took_leaves_nothing_behind():
    growing = GrowingTree(7, capacity=8)
    growing.expand(0)
    growing.take_row(growing.take_row(0, 1), 2)
    growing.release_unused()
    growing.check_integrity()
    assert growing.rows == growing.expanded == 1
    first, second = growing.add(0, 1, -1.0, 0.5), growing.add(0, 2, -2.0, 0.3)
    growing.expand(first)
    growing.expand(second)
    assert growing.mask[2, :3].tolist() == [True, False, True]


def test_rows_of_a_frozen_tree_are_not_released():
    growing = GrowingTree(7, capacity=8)
    growing.expand(0)
    growing.freeze([growing.add(0, token, -1.0, 0.5) for token in range(3)])
    growing.take_row(0, 1)
    growing.release_unused()
    growing.check_integrity()
    assert growing.rows == 4


@pytest.mark.parametrize("seed", range(12))
def test_gaps_are_closed_and_nothing_else_changes(seed):
    """Unused rows strewn among those of nodes, against the tree without them."""
    generator = np.random.default_rng(seed)
    plain, order = grown_at_random(seed)
    gappy, rows = GrowingTree(7, capacity=96), []
    for number in order:
        for _ in range(int(generator.integers(3))):
            parent = int(generator.integers(-1, gappy.rows))
            gappy.take_row(None if parent < 0 else parent, 5)
        rows.append(gappy.rows)
        gappy.expand(number)
        for child in plain.nodes[number].children:
            old = plain.nodes[child]
            assert gappy.add(number, old.token_id, old.log_prob, old.chance) == child
    assert gappy.expanded == len(order) < gappy.rows
    gappy.check_integrity()
    assert gappy.compact() == rows
    gappy.check_integrity()
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
        (n for n, node in enumerate(growing.nodes) if node.parent is not None and node.row is not None),
        key=lambda n: len(growing.nodes[n].children),
    )
    tree, rows = growing.subtree(number, most_rows=most_rows, max_depth=99)
    tree.check_integrity()
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
        if node.row is not None:
            assert rows[node.row] == old.row
    expanded = [n for n in below.values() if n.row is not None]
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


@pytest.mark.parametrize("seed", range(4))
def test_a_draft_step_is_a_cut_of_the_whole_tree(seed):
    growing, order = grown_at_random(seed)
    whole = as_batch(tree_group(growing.freeze([]), 3))
    first, count = len(order) - 3, 3
    tokens = [growing.nodes[number].token_id for number in order[first:]]
    step = draft_batch(growing, tokens, 3)
    assert (step.rows, step.start) == (count, 3 + first)
    assert step.token_ids.equal(whole.token_ids[first : first + count])
    assert step.positions.equal(whole.positions[first : first + count])
    assert step.allowed.equal(whole.allowed[first : first + count, : 3 + first + count])
    assert step.key_positions.equal(whole.key_positions[: 3 + first + count])


def break_mask(tree):
    tree.mask[3, 0] ^= True


def break_row(tree):
    tree.nodes[1].row = 4


def break_open(tree):
    tree._open.add(0)


def break_depth(tree):
    tree.nodes[-1].depth += 1


@pytest.mark.parametrize("damage", [break_mask, break_row, break_open, break_depth])
def test_the_integrity_check_sees_damage(damage):
    tree, _ = grown_at_random(0)
    damage(tree)
    with pytest.raises(AssertionError):
        tree.check_integrity()
