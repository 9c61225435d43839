"""Timing by callables: medians over a given clock, and a disk that is really read."""

import threading
from itertools import count

import pytest

from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.errors import IntegrityError
from subspec_cli.probe import timers
from subspec_cli.probe.timers import disk_rate, reading, time_rows
from subspec_cli.streaming.layout import layout_block


class Clock:
    """Moves when work is done."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_times_are_medians_and_the_first_run_does_not_count():
    clock, runs = Clock(), count()

    def work(rows):
        number = next(runs)
        clock.now += 100.0 if number % 6 == 0 else 50.0 if number % 6 == 3 else float(rows)

    assert time_rows(work, (1, 4), clock=clock).seconds == (1.0, 4.0)


def test_queued_work_is_waited_for():
    clock = Clock()

    def finish():
        clock.now += 2.0

    assert time_rows(lambda rows: None, (1,), finish=finish, clock=clock).seconds == (2.0,)


@pytest.fixture
def layouts(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(40_000))
    return [layout_block([TensorEntry(f"t{n}", "BF16", (5000,), path, n * 10_000, 10_000)]) for n in range(4)]


def test_the_disk_is_read_until_the_time_is_up_or_all_was_read_a_few_times(layouts, monkeypatch):
    done = []
    read_extents = timers.DirectReader.read_extents

    def counted(reader, extents, buffer):
        done.append(extents)
        read_extents(reader, extents, buffer)

    monkeypatch.setattr(timers.DirectReader, "read_extents", counted)
    assert disk_rate(layouts, seconds=60.0) > 0
    assert done == [layout.extents for layout in layouts] * 3
    done.clear()
    disk_rate(layouts, seconds=0.0)
    assert done == [layouts[0].extents]


def test_reading_goes_on_in_the_background_and_ends_with_the_block(layouts, monkeypatch):
    seen = threading.Event()
    read_extents = timers.DirectReader.read_extents

    def counted(reader, extents, buffer):
        read_extents(reader, extents, buffer)
        seen.set()

    monkeypatch.setattr(timers.DirectReader, "read_extents", counted)
    with reading(layouts) as read:
        assert seen.wait(20)
        assert any(thread.name == "probe-reader" for thread in threading.enumerate())
    assert all(thread.name != "probe-reader" for thread in threading.enumerate())
    assert read.bytes_per_s > 0


def test_a_disk_that_fails_is_told(layouts):
    layouts[0].extents[0].path.unlink()
    with pytest.raises(IntegrityError):
        disk_rate(layouts)
