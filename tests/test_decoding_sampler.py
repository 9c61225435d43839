"""One rule picks tokens: ties, filters on one row in a fixed order, and noise that belongs to a position."""

import numpy as np
import pytest
from fakes import sampled

from subspec_cli.config import SamplingConfig
from subspec_cli.decoding.sampler import (
    Filters,
    GreedySampler,
    GumbelSampler,
    allowed_tokens,
    derived_seed,
    gumbel_noise,
    make_sampler,
    sample_token,
)

GOLDEN_NOISE = {
    (0, 0, 0): [-1.49545161157695, -0.3511371183614871, -0.7859067841514997],
    (1234, 5, 678): [0.7113407524402847, 1.5600047374442725, 0.065624559650742],
    (2**63 - 1, 1, 4095): [-0.3541162063709355, 1.97909718003255, 0.25880116283148147],
}


def naive_allowed(scaled, top_k, top_p):
    """Sort the whole row by (-logit, id), keep k, then the shortest prefix that reaches p."""
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    if 0 < top_k < len(scaled):
        order = order[:top_k]
    keep = np.zeros(len(scaled), dtype=bool)
    keep[order] = True
    if top_p < 1:
        weights = np.where(keep, np.exp(scaled - scaled.max()), 0.0)
        total = np.cumsum((weights / weights.sum())[order])
        count = next((n for n, mass in enumerate(total, start=1) if mass >= top_p), len(order))
        keep[order[count:]] = False
    return keep


def kept(scaled, top_k=0, top_p=1.0):
    return np.flatnonzero(allowed_tokens(np.array(scaled, dtype=np.float64), Filters(top_k, top_p))).tolist()


def test_greedy_takes_the_lowest_id_of_equals():
    rule = make_sampler(SamplingConfig(), seed=0, choice=0)
    assert isinstance(rule, GreedySampler)
    assert sample_token(rule, np.array([1.0, 7.0, 3.0, 7.0, 7.0]), 5) == 1
    assert sample_token(rule, np.zeros(4), 0) == 0


def test_top_k_breaks_ties_by_token_id():
    assert kept([2.0, 5.0, 5.0, 5.0, 9.0], top_k=3) == [1, 2, 4]
    assert kept([3.0] * 6, top_k=2) == [0, 1]
    assert kept([0.0, -1.0, 0.0], top_k=1) == [0]


def test_top_k_of_nothing_or_everything_keeps_all():
    assert kept([1.0, 2.0, 3.0], top_k=0) == [0, 1, 2]
    assert kept([1.0, 2.0, 3.0], top_k=3) == [0, 1, 2]
    assert kept([1.0, 2.0, 3.0], top_k=99) == [0, 1, 2]


def test_top_p_breaks_ties_by_token_id():
    assert kept([0.0] * 4, top_p=0.5) == [0, 1]
    assert kept(np.log([0.2, 0.2, 0.4, 0.2]), top_p=0.55) == [0, 2]


def test_top_p_keeps_the_shortest_prefix_that_reaches_it():
    # Powers of two: every sum is exact, so a border met exactly is not passed.
    scaled = np.log2([0.5, 0.25, 0.125, 0.125]) * np.log(2)
    assert kept(scaled, top_p=0.5) == [0]
    assert kept(scaled, top_p=0.50001) == [0, 1]
    assert kept(scaled, top_p=0.75) == [0, 1]
    assert kept(scaled, top_p=0.76) == [0, 1, 2]
    assert kept(scaled, top_p=1e-300) == [0]
    assert kept(scaled, top_p=np.nextafter(1.0, 0.0)) == [0, 1, 2, 3]


def test_top_p_counts_the_mass_of_what_top_k_left():
    scaled = np.log([0.4, 0.3, 0.2, 0.1])
    assert kept(scaled, top_k=0, top_p=0.6) == [0, 1]
    assert kept(scaled, top_k=2, top_p=0.57) == [0]


def random_rows():
    """Smooth, peaked, tied, flat and extreme rows."""
    generator = np.random.default_rng(5)
    for size in (1, 2, 3, 7, 64, 301):
        for spread in (0.1, 2.0, 30.0):
            row = generator.normal(0, spread, size)
            yield row
            yield np.round(row)
        yield np.zeros(size)
        yield np.where(generator.random(size) < 0.3, 0.0, -800.0)
        yield generator.normal(0, 1, size) * 1e30
        yield np.linspace(0, -2000, size)


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.03, 1e-12, 1 - 1e-9])
@pytest.mark.parametrize("top_k", [0, 1, 2, 5, 50, 400])
def test_filters_equal_a_full_sort(top_k, top_p):
    for row in random_rows():
        found = allowed_tokens(row, Filters(top_k, top_p))
        assert found.tolist() == naive_allowed(row, top_k, top_p).tolist()
        assert found.any()


def test_sampling_never_takes_a_forbidden_token():
    row = np.array([3.0, 3.0, 3.0, 1.0, 0.0])
    drawn = {sample_token(sampled(choice=n, top_k=2), row, n) for n in range(200)}
    assert drawn == {0, 1}
    assert {sample_token(sampled(choice=n, top_k=1), row, n) for n in range(50)} == {0}
    assert {sample_token(sampled(choice=n, top_p=1e-9), row, n) for n in range(50)} == {0}


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 3}, {"top_k": 3, "top_p": 0.9}])
def test_a_temperature_near_zero_is_greedy(settings):
    row = np.array([-60.0, 1.0, 5.0, 5.5, 5.0])
    for temperature in (1e-9, 1e-300, 5e-324):
        assert sample_token(sampled(temperature=temperature, **settings), row, 3) == 3


def test_scores_do_not_depend_on_what_was_asked_before():
    """Whatever rows of noise are kept, each position gets its own."""
    rule, row = sampled(seed=3, choice=2), np.zeros(6)
    for position in (*range(400), *range(0, 400, 7)):
        assert rule.scores(row, position).tolist() == gumbel_noise(3, 2, position, 6).tolist()
    assert row.tolist() == [0.0] * 6


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.9}, {"top_k": 2, "top_p": 0.9}])
def test_a_row_that_is_not_finite_is_scored_without_a_word(settings, bad):
    """A damaged draft row is no error and no warning: it proposes nothing that looks finite, or little."""
    row = np.array([bad, 1.0, 2.0])
    scores = sampled(**settings).scores(row, 3)
    assert not np.isfinite(scores[0])


def test_noise_is_a_function_of_seed_request_and_position():
    again = [gumbel_noise(7, 2, 11, 5).tolist() for _ in range(2)]
    assert again[0] == again[1]
    others = [gumbel_noise(*key, 5).tolist() for key in ((8, 2, 11), (7, 3, 11), (7, 2, 12), (7, 11, 2))]
    assert len({tuple(row) for row in (again[0], *others)}) == 5


def test_a_longer_vocabulary_begins_with_the_same_noise():
    assert gumbel_noise(1, 2, 3, 40)[:9].tolist() == gumbel_noise(1, 2, 3, 9).tolist()


def test_neighbouring_positions_and_requests_share_no_noise():
    """Trap 1: a counter that the generator itself moves would give shifted copies."""
    rows = [gumbel_noise(9, request, position, 400) for request in range(4) for position in range(12)]
    assert len(np.unique(np.concatenate(rows))) == 48 * 400


@pytest.mark.parametrize("key", GOLDEN_NOISE)
def test_noise_is_pinned(key):
    """Written down once: a stream that drifts with a numpy release would change every seeded answer."""
    assert gumbel_noise(*key, 3).tolist() == pytest.approx(GOLDEN_NOISE[key], rel=1e-13)


def test_noise_is_finite_even_where_the_uniform_is_zero(monkeypatch):
    class Zeros:
        def __init__(self, bits):
            pass

        def random(self, count):
            return np.array([0.0, np.nextafter(1.0, 0.0)])

    monkeypatch.setattr("subspec_cli.decoding.sampler.Generator", Zeros)
    noise = gumbel_noise(0, 0, 0, 2)
    assert np.isfinite(noise).all()
    assert noise[0] < -6
    assert noise[1] > 36


def test_noise_has_the_gumbel_distribution():
    """Mean 0.5772, variance pi^2 / 6 over 200,000 values: five standard errors, odds 6e-7 each."""
    noise = np.concatenate([gumbel_noise(3, 0, position, 1000) for position in range(200)])
    assert abs(noise.mean() - 0.57722) < 5 * noise.std() / len(noise) ** 0.5
    assert abs(noise.var() - np.pi**2 / 6) < 5 * 2.1 * noise.var() / len(noise) ** 0.5


def test_only_a_temperature_makes_a_sampler():
    assert isinstance(make_sampler(SamplingConfig(temperature=0.5), 0, 0), GumbelSampler)
    with pytest.raises(AssertionError):
        GumbelSampler(SamplingConfig(temperature=0.0), 0, 0)


def test_a_derived_seed_is_another_one_for_each_number_and_the_first_is_the_seed_itself():
    assert derived_seed(5, 0) == 5
    seeds = [derived_seed(seed, number) for seed in (0, 5, 2**53 - 1) for number in range(1, 300)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**53 for seed in seeds)
    assert derived_seed(5, 1) == derived_seed(5, 1)


def test_choices_of_a_request_have_noise_of_their_own():
    rows = [tuple(sampled(3, choice=choice).noise(7, 5)) for choice in range(4)]
    assert len(set(rows)) == 4
    assert rows[2] == tuple(gumbel_noise(3, 2, 7, 5))
