"""The thread that reads ahead, by itself: what it asks for and tells, and how it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.errors import IntegrityError
from subspec_cli.files.direct_io import PAGE_BYTES, allocate_buffer
from subspec_cli.streaming.layout import layout_block
from subspec_cli.streaming.read_ahead import ReadAhead

BLOCKS, BUFFERS, WAIT_S = 3, 2, 20


class Owner:
    """Gives buffers when it is let, and notes the calls; its lock is no reentrant one, so that they show it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(BLOCKS * PAGE_BYTES))
        entries = [TensorEntry(f"{n}", "U8", (1,), path, n * PAGE_BYTES, 1) for n in range(BLOCKS)]
        self.memory = memoryview(allocate_buffer(PAGE_BYTES))
        self.changed = threading.Condition(threading.Lock())
        self.may_give = threading.Event()
        self.may_give.set()
        self.asked: list[int] = []
        self.told = 0
        layouts = [layout_block([entry]) for entry in entries]
        self.ahead = ReadAhead(layouts, BUFFERS, self.changed, self.free_buffer, self.on_read)

    def free_buffer(self, at: int) -> memoryview:
        assert self.changed.acquire(timeout=WAIT_S), "asked with the condition held"
        self.asked.append(at)
        self.changed.notify_all()
        self.changed.release()
        assert self.may_give.wait(WAIT_S)
        return self.memory

    def on_read(self) -> None:
        assert self.changed.acquire(blocking=False) is False, "told without the condition"
        self.told += 1

    def sees(self, condition: Callable[[], bool]) -> bool:
        """Whether it comes true before long, and is given notice of."""
        with self.changed:
            while not condition():
                if not self.changed.wait(WAIT_S):
                    return False
            return True


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    made = Owner(tmp_path / "weights")
    yield made
    made.may_give.set()
    made.ahead.close()
    made.ahead.close()


def test_buffers_are_asked_for_in_turn_and_only_once_let_go(owner: Owner) -> None:
    owner.ahead.start()
    for done in range(5):
        assert owner.sees(lambda done=done: owner.told == done + BUFFERS)
        assert owner.asked == [n % BUFFERS for n in range(done + BUFFERS)]
        with owner.changed:
            assert owner.ahead.next_buffer == done % BUFFERS
            owner.ahead.let_go()


def test_a_block_that_arrives_after_a_restart_is_not_told(owner: Owner) -> None:
    owner.may_give.clear()
    owner.ahead.start()
    assert owner.sees(lambda: owner.asked == [0])
    with owner.changed:
        owner.ahead.restart()
    owner.may_give.set()
    assert owner.sees(lambda: owner.told == BUFFERS)
    assert owner.asked == [0, 0, 1]


def test_what_ends_the_thread_is_kept(owner: Owner) -> None:
    owner.path.write_bytes(b"")
    owner.ahead.start()
    assert owner.sees(lambda: owner.ahead.failure is not None)
    assert isinstance(owner.ahead.failure, IntegrityError)
    assert not owner.ahead.has_block


def test_closing_ends_a_thread_whose_buffers_are_full(owner: Owner) -> None:
    before = threading.active_count()
    owner.ahead.start()
    assert owner.sees(lambda: owner.told == BUFFERS)
    owner.ahead.close()
    assert threading.active_count() == before
