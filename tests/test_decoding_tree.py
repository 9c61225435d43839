"""Token trees as flat arrays: parents, paths and who sees whom."""

import numpy as np
import pytest
import torch
from fakes import tree_of
from test_decoding_verification import random_tree

from subspec_cli.decoding.row_groups import tree_group
from subspec_cli.decoding.tree import TokenTree
from subspec_cli.modeling.row_group import chunk_group

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


def test_prompt_rows_are_in_the_cache_rows_of_their_positions():
    group = chunk_group([5, 6, 7], 4)
    assert group.token_ids.tolist() == [5, 6, 7]
    assert group.positions.tolist() == [4, 5, 6]
    assert (group.rows, group.start, group.path) == (3, 4, None)


def test_a_whole_tree_sees_prefix_ancestors_and_self():
    tree = tree_of([9, 1, 2, 3], [-1, 0, 0, 2])
    group = tree_group(tree, 2)
    assert group.token_ids.tolist() == [9, 1, 2, 3]
    assert group.positions.tolist() == [2, 3, 3, 4]
    assert (group.rows, group.start) == (4, 2)
    assert group.path.equal(tree.ancestor_mask())
