"""The thread that reads ahead, by itself: what it asks for and reports, how it restarts and how it ends."""

from __future__ import annotations

import random
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
    """Gives buffers when it is let, and notes the calls; block n of the file begins with the byte n."""

    def __init__(self, path: Path, blocks: int = BLOCKS, buffers: int = BUFFERS) -> None:
        self.path = path
        path.write_bytes(b"".join(bytes([n]) + bytes(PAGE_BYTES - 1) for n in range(blocks)))
        entries = [TensorEntry(f"{n}", "U8", (1,), path, n * PAGE_BYTES, 1) for n in range(blocks)]
        self.memory = [memoryview(allocate_buffer(PAGE_BYTES)) for _ in range(buffers)]
        self.changed = threading.Condition()
        self.may_give = threading.Event()
        self.may_give.set()
        self.fails_on_read = False
        self.asked: list[int] = []
        self.reported = 0
        layouts = [layout_block([entry]) for entry in entries]
        self.ahead = ReadAhead(layouts, buffers, self.writable, self.on_change)

    def writable(self, at: int) -> memoryview:
        self.assert_no_lock_is_held()
        with self.changed:
            self.asked.append(at)
            self.changed.notify_all()
        assert self.may_give.wait(WAIT_S)
        return self.memory[at]

    def on_change(self) -> None:
        self.assert_no_lock_is_held()
        with self.changed:
            self.reported += 1
            self.changed.notify_all()
        if self.fails_on_read:
            self.fails_on_read = False
            raise MemoryError("no room")

    def assert_no_lock_is_held(self) -> None:
        """Another thread can look: a lock held over a call would make owners with a lock wait for each other."""
        looking = threading.Thread(target=self.ahead.check_integrity, daemon=True)
        looking.start()
        looking.join(WAIT_S)
        assert not looking.is_alive(), "called with the lock held"

    def sees(self, condition: Callable[[], bool]) -> bool:
        """Whether it comes true before long, and is given notice of."""
        with self.changed:
            return self.changed.wait_for(condition, WAIT_S)

    def close(self) -> None:
        self.may_give.set()
        self.ahead.close()
        self.ahead.close()


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    made = Owner(tmp_path / "weights")
    yield made
    made.close()


def test_buffers_are_asked_for_in_turn_and_only_once_released(owner: Owner) -> None:
    ahead = owner.ahead
    assert ahead.poll() is None
    ahead.check_integrity()
    ahead.start()
    for done in range(5):
        assert owner.sees(lambda done=done: owner.reported == done + BUFFERS)
        assert owner.asked == [n % BUFFERS for n in range(done + BUFFERS)]
        ahead.check_integrity()
        assert ahead.poll() == ahead.take() == ahead.poll() == done % BUFFERS
        assert owner.memory[done % BUFFERS][0] == done % BLOCKS
        ahead.release()
        ahead.check_integrity()


def test_a_block_that_arrives_after_a_restart_is_not_reported(owner: Owner) -> None:
    owner.may_give.clear()
    owner.ahead.start()
    assert owner.sees(lambda: owner.asked == [0])
    owner.ahead.restart()
    owner.ahead.check_integrity()
    owner.may_give.set()
    assert owner.sees(lambda: owner.reported == BUFFERS)
    assert owner.asked == [0, 0, 1]
    owner.ahead.check_integrity()


def test_a_restart_drops_what_was_read(owner: Owner) -> None:
    owner.ahead.start()
    for _ in range(2):
        assert owner.memory[owner.ahead.take()][0] == 0
        owner.ahead.release()
        assert owner.memory[owner.ahead.take()][0] == 1
        owner.ahead.restart()
        owner.ahead.check_integrity()
    assert owner.memory[owner.ahead.take()][0] == 0


def test_a_restart_mends_an_interrupted_release(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt may come between any two operations of the consumer, and a lost buffer would stay lost."""

    class Interrupting(list[int]):
        def append(self, at: int) -> None:
            raise KeyboardInterrupt

    owner.ahead.start()
    assert owner.sees(lambda: owner.reported == BUFFERS)
    owner.ahead.take()
    monkeypatch.setattr(owner.ahead, "_free", Interrupting())
    with pytest.raises(KeyboardInterrupt):
        owner.ahead.release()
    with pytest.raises(AssertionError, match="buffers that are free"):
        owner.ahead.check_integrity()
    owner.ahead.restart()
    owner.ahead.check_integrity()
    assert owner.sees(lambda: owner.reported == 2 * BUFFERS)


@pytest.mark.parametrize("buffers", [1, 2, 3, 5])
def test_steps_in_any_order_keep_the_state_whole(tmp_path: Path, buffers: int) -> None:
    chance, expected = random.Random(buffers), 0
    owner = Owner(tmp_path / "weights", blocks=4, buffers=buffers)
    ahead = owner.ahead
    ahead.start()
    try:
        for _ in range(400):
            step = chance.choice(["take", "take", "poll", "poll", "restart"])
            if step == "restart":
                ahead.restart()
                expected = 0
            elif (at := ahead.take() if step == "take" else ahead.poll()) is not None:
                assert owner.memory[at][0] == expected % 4
                ahead.check_integrity()
                ahead.release()
                expected += 1
            ahead.check_integrity()
    finally:
        owner.close()
    ahead.check_integrity()


def test_counters_count_released_blocks_and_reads(owner: Owner) -> None:
    owner.ahead.start()
    owner.ahead.take()
    assert owner.ahead.counters().streamed_bytes == 0
    owner.ahead.release()
    counted = owner.ahead.counters()
    assert counted.streamed_bytes == 1
    assert counted.wait_time_s > 0
    assert counted.read_time_s > 0


def test_what_ends_the_thread_is_kept_and_reported(owner: Owner) -> None:
    owner.path.write_bytes(b"")
    owner.ahead.start()
    assert owner.sees(lambda: owner.reported == 1)
    assert isinstance(owner.ahead.failure, IntegrityError)
    for _ in range(2):
        assert owner.ahead.poll() is None
        with pytest.raises(IntegrityError):
            owner.ahead.take()
        owner.ahead.restart()
        owner.ahead.check_integrity()


def test_a_failure_of_the_owner_ends_the_thread_too(owner: Owner) -> None:
    owner.fails_on_read = True
    owner.ahead.start()
    assert owner.sees(lambda: owner.reported == 2)
    with pytest.raises(MemoryError, match="no room"):
        owner.ahead.take()
    owner.ahead.check_integrity()


def test_a_consumer_that_waits_learns_of_the_failure(owner: Owner) -> None:
    owner.may_give.clear()
    owner.ahead.start()
    assert owner.sees(lambda: owner.asked == [0])
    raised: list[BaseException] = []

    def consume() -> None:
        try:
            owner.ahead.take()
        except IntegrityError as error:
            raised.append(error)

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    owner.path.write_bytes(b"")
    owner.may_give.set()
    consumer.join(WAIT_S)
    assert raised


def test_closing_ends_a_thread_whose_buffers_are_full(owner: Owner) -> None:
    before = threading.active_count()
    owner.ahead.start()
    assert owner.sees(lambda: owner.reported == BUFFERS)
    owner.ahead.close()
    assert threading.active_count() == before
    owner.ahead.check_integrity()
