"""OpenMP's settings before PyTorch is loaded: the user's own wins where results stay right."""

import pytest

from subspec_cli.session.openmp import set_openmp_defaults


def test_spins_are_short_and_threads_are_granted():
    environment = {}
    set_openmp_defaults(environment)
    assert environment == {"GOMP_SPINCOUNT": "2000", "OMP_DYNAMIC": "false"}


def test_the_users_spin_count_wins_but_threads_are_granted():
    """With OMP_DYNAMIC, half of a product is left unwritten."""
    environment = {"GOMP_SPINCOUNT": "7", "OMP_DYNAMIC": "true"}
    set_openmp_defaults(environment)
    assert environment == {"GOMP_SPINCOUNT": "7", "OMP_DYNAMIC": "false"}


@pytest.mark.parametrize(
    ("limit", "wanted", "expected"), [("1", "2", "1"), ("3", "2", "2"), ("2", "", None), ("x", "5", "5")]
)
def test_no_more_threads_are_asked_for_than_the_limit(limit, wanted, expected):
    environment = {"OMP_THREAD_LIMIT": limit} | ({"OMP_NUM_THREADS": wanted} if wanted else {})
    set_openmp_defaults(environment)
    if expected is None:
        assert int(environment["OMP_NUM_THREADS"]) <= 2
    else:
        assert environment["OMP_NUM_THREADS"] == expected
