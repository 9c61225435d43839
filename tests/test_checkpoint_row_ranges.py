"""Compiled loops on torch's threads: every row once, and a failure of any thread is raised."""

import threading

import pytest
import torch

from subspec_cli.checkpoint import row_ranges
from subspec_cli.checkpoint.row_ranges import in_row_ranges


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1000, 4608])
@pytest.mark.usefixtures("two_threads")
def test_every_row_is_in_one_range(rows):
    ranges = []
    in_row_ranges(lambda first, end: ranges.append((first, end)), rows, 1 << 30)
    assert sorted(row for first, end in ranges for row in range(first, end)) == list(range(rows))
    assert all(first % 64 == 0 for first, _ in ranges)


@pytest.mark.usefixtures("two_threads")
def test_two_threads_work_at_once():
    if row_ranges.threads_entry() is None:
        pytest.skip("this build of torch has another OpenMP")
    both = threading.Barrier(2, timeout=60)
    seen = set()

    def loop(first, _end):
        if threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            both.wait()

    in_row_ranges(loop, 4608, 1 << 30)
    assert len(seen) == 2


@pytest.mark.parametrize("entry", [True, False])
@pytest.mark.usefixtures("two_threads")
def test_a_failure_is_raised_after_all_threads_ended(monkeypatch, entry):
    if not entry:
        monkeypatch.setattr(row_ranges, "threads_entry", lambda: None)

    def loop(first, end):
        if end == 640:
            raise ValueError(f"row {first} is damaged")

    with pytest.raises(ValueError, match="is damaged"):
        in_row_ranges(loop, 640, 1 << 30)


@pytest.mark.usefixtures("two_threads")
def test_a_small_matrix_takes_one_thread():
    ranges = []
    in_row_ranges(lambda first, end: ranges.append((first, end)), 1000, 1000)
    assert ranges == [(0, 1000)]


@pytest.mark.usefixtures("two_threads")
def test_an_interrupt_is_not_lost_and_no_row_is_missing_in_silence():
    def loop(_first, end):
        if end == 640:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_row_ranges(loop, 640, 1 << 30)
