"""OpenMP's settings before PyTorch is loaded: the user's own wins where results stay right."""

import pytest

from subspec_cli.session.openmp import set_openmp_defaults
from subspec_cli.streaming.processors import Processors, usable_processors

FREE = Processors(cores=8, physical_cores=4, quota=None)


def test_spins_are_short_and_threads_are_granted():
    environment = {}
    set_openmp_defaults(environment, FREE)
    assert environment == {"GOMP_SPINCOUNT": "2000", "OMP_DYNAMIC": "false"}


def test_the_users_spin_count_wins_but_threads_are_granted():
    """With OMP_DYNAMIC, half of a product is left unwritten."""
    environment = {"GOMP_SPINCOUNT": "7", "OMP_DYNAMIC": "true"}
    set_openmp_defaults(environment, FREE)
    assert environment == {"GOMP_SPINCOUNT": "7", "OMP_DYNAMIC": "false"}


@pytest.mark.parametrize(
    ("limit", "wanted", "expected"),
    [("1", "2", "1"), ("3", "2", "2"), ("2", "", "2"), ("12", "", "4"), ("x", "5", "5"), ("2", "3,2", "2")],
)
def test_no_more_threads_are_asked_for_than_the_limit(limit, wanted, expected):
    environment = {"OMP_THREAD_LIMIT": limit} | ({"OMP_NUM_THREADS": wanted} if wanted else {})
    set_openmp_defaults(environment, FREE)
    assert environment["OMP_NUM_THREADS"] == expected


@pytest.mark.parametrize(
    ("quota", "wanted", "expected"),
    [
        (1.0, None, "1"),
        (1.5, None, "2"),
        (0.1, None, "1"),
        (7.0, None, "4"),
        (1.0, "3", "3"),
        (1.0, "0", "1"),
    ],
)
def test_a_quota_of_processor_time_counts_as_cores(quota, wanted, expected):
    """With more threads than that, each waits for the others to be let on."""
    environment = {} if wanted is None else {"OMP_NUM_THREADS": wanted}
    for _ in range(2):
        set_openmp_defaults(environment, Processors(cores=8, physical_cores=4, quota=quota))
        assert environment["OMP_NUM_THREADS"] == expected


def test_cores_that_share_their_units_are_one(tmp_path):
    for number, siblings in enumerate(["0,4", "1,5", "2,6", "3,7"] * 2):
        path = tmp_path / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"
        path.parent.mkdir(parents=True)
        path.write_text(f"{siblings}\n")
    assert usable_processors(tmp_path, {0, 1, 4, 5, 6}) == Processors(5, 3, None)
    assert usable_processors(tmp_path / "nowhere", {0, 3}) == Processors(2, 2, None)
