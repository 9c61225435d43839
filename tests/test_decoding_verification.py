"""Walking a tree by the target's own choices: what is accepted, what is emitted, and from which law."""

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from fakes import GreedySampler, chain_of, random_table, sampled, tree_of

from subspec_cli.decoding.sampler import sample_token
from subspec_cli.decoding.tree import TokenTree
from subspec_cli.decoding.verification import host_row, verify
from subspec_cli.errors import ExitCode, IntegrityError

V = 8


def picks(*tokens):
    """Logits `[N, V]` by which node n chooses `tokens[n]`."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), V).to(torch.bfloat16)


CASES = {
    "root only": (chain_of([0]), picks(5), (0,), (5,)),
    "never": (chain_of([0, 1, 2]), picks(7, 2, 3), (0,), (7,)),
    "always": (chain_of([0, 1, 2]), picks(1, 2, 3), (0, 1, 2), (1, 2, 3)),
    "first only": (chain_of([0, 1, 2, 3]), picks(1, 7, 3, 4), (0, 1), (1, 7)),
    "second branch only": (tree_of([0, 1, 2, 3], [-1, 0, 0, 2]), picks(2, 6, 3, 5), (0, 2, 3), (2, 3, 5)),
    "second branch, then not": (tree_of([0, 1, 2, 3], [-1, 0, 0, 1]), picks(2, 3, 5, 6), (0, 2), (2, 5)),
    "same token at another place": (tree_of([0, 1, 2, 5], [-1, 0, 0, 1]), picks(2, 5, 5, 6), (0, 2), (2, 5)),
    "root's own token again": (chain_of([4, 4, 4]), picks(4, 4, 4), (0, 1, 2), (4, 4, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_path_and_the_bonus_token(name):
    tree, logits, nodes, token_ids = CASES[name]
    result = verify(tree, logits, GreedySampler(), root_position=9)
    assert result.accepted_nodes == nodes
    assert result.token_ids == token_ids
    assert result.accepted == len(nodes) - 1


def random_tree(generator, nodes, vocab):
    """Parents anywhere before, siblings of different tokens."""
    parents, tokens = [-1], [0]
    for node in range(1, nodes):
        parent = int(generator.integers(node))
        taken = {tokens[n] for n in range(1, node) if parents[n] == parent}
        left = [token for token in range(vocab) if token not in taken]
        if left:
            parents.append(parent)
            tokens.append(int(generator.choice(left)))
        else:
            parents.append(0 if node == 1 else node - 1)
            tokens.append(int(generator.integers(vocab)))
    return tree_of(tokens, parents)


def walk(tree: TokenTree, node, logits, rule, position):
    """The definition, naively: choose, look for a child with that token, go on there."""
    token = sample_token(rule, logits[node].double().numpy(), position + 1)
    child = [n for n in range(len(tree)) if tree.parents[n] == node and tree.token_ids[n] == token]
    if not child:
        return [node], [token]
    nodes, tokens = walk(tree, child[0], logits, rule, position + 1)
    return [node, *nodes], [token, *tokens]


@pytest.mark.parametrize("rule", [GreedySampler(), sampled(4), sampled(5, temperature=0.6, top_p=0.9)])
def test_equals_a_naive_walk_on_random_trees(rule):
    generator = np.random.default_rng(1)
    lengths = set()
    for case in range(150):
        tree = random_tree(generator, int(generator.integers(1, 25)), vocab=3)
        logits = torch.from_numpy(generator.integers(0, 4, (len(tree), 3))).to(torch.bfloat16)
        result = verify(tree, logits, rule, root_position=case)
        nodes, tokens = walk(tree, 0, logits, rule, case)
        assert (list(result.accepted_nodes), list(result.token_ids)) == (nodes, tokens)
        lengths.add(len(nodes))
    assert len(lengths) >= 4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_on_the_path_that_is_not_finite_is_an_integrity_error(bad):
    logits = picks(1, 2, 3)
    logits[1, 6] = bad
    with pytest.raises(IntegrityError, match="position 41") as caught:
        verify(chain_of([0, 1, 2]), logits, GreedySampler(), root_position=40)
    assert caught.value.exit_code == ExitCode.INTEGRITY


def test_a_row_off_the_path_may_hold_anything():
    logits = picks(2, 0, 3, 5)
    logits[1] = torch.nan
    result = verify(tree_of([0, 1, 2, 3], [-1, 0, 0, 2]), logits, GreedySampler(), root_position=0)
    assert result.token_ids == (2, 3, 5)


def test_host_rows_are_float64():
    row = host_row(torch.tensor([0.1, 0.2], dtype=torch.bfloat16), 0)
    assert row.dtype == np.float64
    assert row.tolist() == torch.tensor([0.1, 0.2], dtype=torch.bfloat16).double().tolist()


# --- the law of what is emitted ---------------------------------------------------------------------------------

SIX = 6
DRAWS = 20_000
TABLE = cache(random_table(2, SIX, spread=0.9))
PROMPT = (3,)


def law(prefix, temperature, top_p):
    """The filtered softmax, written out."""
    logits = TABLE(prefix) / temperature
    weights = np.exp(logits - logits.max())
    order = np.lexsort((np.arange(SIX), -logits))
    mass = np.cumsum(weights[order] / weights.sum())
    weights[order[int((mass < top_p - 1e-12).sum()) + 1 :]] = 0
    return weights / weights.sum()


def good_draft(root, rule, position):
    """The tree's tokens are the target's own draws, two deep."""
    first = sample_token(rule, TABLE((*PROMPT, root)), position + 1)
    return chain_of([root, first, sample_token(rule, TABLE((*PROMPT, root, first)), position + 2)])


def wrong_draft(root, rule, position):
    """A tree of the two tokens the target likes least, and one it likes below each."""
    worst = np.argsort(TABLE((*PROMPT, root)))[:2].tolist()
    best = [int(np.argmax(TABLE((*PROMPT, root, token)))) for token in worst]
    return tree_of([root, *worst, *best], [-1, 0, 0, 1, 2])


def no_draft(root, rule, position):
    return chain_of([root])


@cache
def paths_logits(tree):
    rows = [TABLE((*PROMPT, *tokens_to(tree, node))) for node in range(len(tree))]
    return torch.from_numpy(np.stack(rows))


def tokens_to(tree, node):
    return () if node < 0 else (*tokens_to(tree, tree.parents[node]), tree.token_ids[node])


@cache
def after_one(token):
    return torch.from_numpy(TABLE((*PROMPT, 0, token)))[None]


def two_tokens(draft, seed, request, settings):
    """The first two tokens after root 0: from one pass if the draft was taken, else from two."""
    rule, root = sampled(seed, request, **settings), 0
    tree = draft(root, rule, 1)
    tokens = list(verify(tree, paths_logits(tree), rule, root_position=1).token_ids[:2])
    if len(tokens) < 2:
        tokens += verify(chain_of(tokens), after_one(tokens[0]), rule, root_position=2).token_ids
    return tuple(tokens)


def chi_square_limit(freedom, z=4.7534):
    """Upper point of the chi-square law that a right sampler passes once in a million seeds (Wilson-Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + z * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize(
    ("draft", "top_p"),
    [
        (good_draft, 1.0),
        (wrong_draft, 1.0),
        pytest.param(no_draft, 1.0, marks=pytest.mark.slow),
        pytest.param(good_draft, 0.8, marks=pytest.mark.slow),
        (wrong_draft, 0.8),
    ],
)
def test_emitted_tokens_follow_the_softmax_whatever_the_draft(draft, top_p):
    """20,000 pairs of tokens against 36 cells: a right sampler fails with odds 1e-6 per seed; the seed is fixed.

    The pair, not the token, so that noise shared by two positions shows.
    """
    settings = {"temperature": 0.8, "top_p": top_p}
    counts = dict.fromkeys(itertools.product(range(SIX), repeat=2), 0)
    for request in range(DRAWS):
        counts[two_tokens(draft, 11, request, settings)] += 1
    first = law((*PROMPT, 0), 0.8, top_p)
    expected = {}
    for token in range(SIX):
        second = law((*PROMPT, 0, token), 0.8, top_p)
        expected |= {(token, after): DRAWS * first[token] * second[after] for after in range(SIX)}
    assert all(counts[pair] == 0 for pair, count in expected.items() if count == 0)
    cells = [(counts[pair], count) for pair, count in expected.items() if count > 0]
    assert min(count for _, count in cells) >= 5
    statistic = sum((count - right) ** 2 / right for count, right in cells)
    assert statistic < chi_square_limit(len(cells) - 1)


def test_a_good_draft_is_taken_and_a_wrong_one_is_not():
    """The arms of the test above are what they are called."""
    taken = {}
    for draft in (good_draft, wrong_draft):
        results = []
        for request in range(200):
            rule = sampled(11, request, temperature=0.8)
            tree = draft(0, rule, 1)
            results.append(verify(tree, paths_logits(tree), rule, root_position=1).accepted)
        taken[draft] = sum(results) / len(results)
    assert taken[good_draft] == 2
    assert taken[wrong_draft] < 0.5
