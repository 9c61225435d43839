"""The thread that answers, over a session that types characters: who joins, who is told, and how it ends."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
from fakes_serving import LAYERS, LONG_S, Brake, FakeSession, Served, Sink, text_of, until

from subspec_cli.config import SamplingConfig
from subspec_cli.errors import IntegrityError, UsageError
from subspec_cli.serving.orders import AnswerOrder
from subspec_cli.serving.service import (
    STOPPED,
    AnswerService,
    NotReadyError,
    QueueFullError,
    State,
    StoppedError,
)


def order(text: str, *, limit: int = 100, seed: int = 0, choice: int = 0) -> AnswerOrder:
    return AnswerOrder(tuple(map(ord, text)), SamplingConfig(), seed, choice, limit, (), None)


def serving(session: FakeSession, *, most_waiting: int = 64) -> AbstractContextManager[Served]:
    return Served(session, most_waiting=most_waiting).running()


def submit(served: Served, *texts: str, limit: int = 100) -> list[Sink]:
    """Order answers in one request."""
    sinks = [Sink() for _ in texts]
    tickets = served.service.submit([order(text, limit=limit) for text in texts], sinks)
    for sink, ticket in zip(sinks, tickets, strict=True):
        sink.ticket = ticket
    return sinks


def cancel(served: Served, sink: Sink) -> None:
    assert sink.ticket is not None
    served.service.cancel(sink.ticket)


def ended(sinks: Sequence[Sink]) -> None:
    until(lambda: all(sink.last is not None for sink in sinks))


def braked(served: Served, session: FakeSession, *texts: str) -> tuple[Brake, list[Sink]]:
    """Order answers, and hold their first pass in its first layer."""
    brake = Brake(session)
    sinks = submit(served, *texts)
    assert brake.reached.wait(LONG_S)
    return brake, sinks


def test_answers_join_in_the_order_in_which_they_came() -> None:
    session = FakeSession(places=2)
    with serving(session) as served:
        brake, sinks = braked(served, session, "a")
        sinks += [sink for text in "bcdef" for sink in submit(served, text)]
        assert (served.service.in_flight, served.service.waiting) == (1, 5)
        brake.release()
        ended(sinks)
        assert (served.service.in_flight, served.service.waiting) == (0, 0)
    assert session.made.order == list("abcdef")
    assert [sink.text for sink in sinks] == [text_of([ord(text)]) for text in "abcdef"]


def test_an_answer_that_waits_can_be_cancelled() -> None:
    session = FakeSession(places=1)
    with serving(session) as served:
        brake, first = braked(served, session, "a")
        second, third = submit(served, "b", "c")
        cancel(served, second)
        assert served.service.waiting == 1
        brake.release()
        ended([*first, third])
    assert session.made.order == ["a", "c"]
    assert second.pieces == []


def test_a_pass_that_nobody_waits_for_ends_within_a_layer() -> None:
    session = FakeSession(places=2)
    with serving(session) as served:
        brake, sinks = braked(served, session, "a", "b")
        for sink in sinks:
            cancel(served, sink)
        brake.release()
        until(lambda: not session.made.in_flight)
        assert session.made.layers == 1
        assert [sink.pieces for sink in sinks] == [[], []]
        ended(submit(served, "c"))
    assert session.made.order == ["a", "b", "c"]


def test_a_pass_that_someone_waits_for_goes_on() -> None:
    session = FakeSession(places=2)
    with serving(session) as served:
        brake, (left, stays) = braked(served, session, "a", "b")
        cancel(served, left)
        brake.release()
        ended([stays])
    assert stays.text == text_of([ord("b")])
    assert left.pieces == []
    assert session.made.layers % LAYERS == 0, "every pass was whole"


def test_an_answer_that_is_cancelled_while_it_joins_leaves_before_the_round() -> None:
    session = FakeSession(places=2)
    with serving(session) as served:
        brake, first = braked(served, session, "a")
        second = submit(served, "b")[0]
        joined = session.made.join

        def join(begun: Any, limit: int) -> Any:
            cancel(served, second)
            return joined(begun, limit)

        session.made.join = join  # type: ignore[method-assign]
        brake.release()
        ended(first)
    assert session.made.order == ["a", "b"]
    assert second.pieces == []


def test_the_queue_has_a_bound_and_takes_all_of_a_request_or_nothing() -> None:
    session = FakeSession(places=2)
    with serving(session, most_waiting=3) as served:
        brake, sinks = braked(served, session, "a")
        sinks += submit(served, "b", "c", "d")
        with pytest.raises(QueueFullError, match="3 answers wait already, at most 3"):
            submit(served, "e", "f")
        assert served.service.waiting == 3
        sinks += submit(served, "g")
        with pytest.raises(QueueFullError):
            submit(served, "h")
        brake.release()
        ended(sinks)
        brake, sinks = braked(served, session, "i", "j")
        with pytest.raises(QueueFullError):
            submit(served, *"klmn")
        brake.release()
        ended([*sinks, *submit(served, "o")])


def test_without_a_queue_places_are_still_taken() -> None:
    session = FakeSession(places=2)
    with serving(session, most_waiting=0) as served:
        brake, sinks = braked(served, session, "a")
        sinks += submit(served, "b")
        with pytest.raises(QueueFullError):
            submit(served, "c")
        brake.release()
        ended(sinks)


def test_an_idle_service_takes_more_answers_than_may_wait() -> None:
    session = FakeSession(places=1)
    with serving(session, most_waiting=2) as served:
        ended(submit(served, *"abcdefgh"))
    assert session.made.order == list("abcdefgh")


FAULTS = [IntegrityError("changed"), OSError(5, "broken"), MemoryError(), RuntimeError("lost"), KeyError("x")]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_round_that_fails_tells_everyone_and_the_next_request_is_answered(fault: Exception) -> None:
    session = FakeSession(places=2)
    faults = iter([fault])

    def fail_once() -> None:
        for each in faults:
            raise each

    with serving(session) as served:
        brake, sinks = braked(served, session, "a", "b")
        cancel(served, sinks[1])
        later = submit(served, "c")
        session.in_round = fail_once
        brake.release()
        ended([sinks[0], *later])
        assert served.service.state is State.READY
        assert not session.made.in_flight
    failure = sinks[0].pieces[-1]
    assert failure.is_fault
    assert failure.message == (
        "changed" if isinstance(fault, IntegrityError) else f"{type(fault).__name__}: {fault}"
    )
    assert sinks[1].pieces == []
    assert later[0].text == text_of([ord("c")])


@pytest.mark.parametrize(
    ("fault", "is_fault"), [(UsageError("no room"), False), (RuntimeError("lost"), True)]
)
def test_an_answer_that_cannot_join_is_told_alone(fault: Exception, is_fault: bool) -> None:
    session = FakeSession(places=2)
    with serving(session) as served:
        brake, first = braked(served, session, "a")
        session.fault_in_join = fault
        second = submit(served, "b")
        brake.release()
        ended([*first, *second])
    assert first[0].text == text_of([ord("a")])
    assert second[0].pieces[-1].is_fault is is_fault


def test_a_stop_finishes_those_in_flight_and_tells_those_that_wait() -> None:
    session = FakeSession(places=1)
    with serving(session) as served:
        brake, first = braked(served, session, "a")
        second = submit(served, "b")
        served.service.stop()
        assert second[0].last == STOPPED
        assert not second[0].pieces[-1].is_fault
        with pytest.raises(NotReadyError, match="stopping"):
            submit(served, "c")
        brake.release()
        served.service.thread.join(LONG_S)
        assert not served.service.thread.is_alive()
    assert first[0].text == text_of([ord("a")])
    assert session.is_closed
    assert served.service.error is None


def test_a_stop_at_once_ends_the_pass_within_a_layer_and_tells_everyone() -> None:
    session = FakeSession(places=1)
    with serving(session) as served:
        brake, first = braked(served, session, "a")
        served.service.stop()
        served.service.stop(at_once=True)
        brake.release()
        served.service.thread.join(LONG_S)
    assert session.made.layers == 1
    assert first[0].last == STOPPED
    assert session.is_closed


def test_an_idle_service_stops() -> None:
    session = FakeSession()
    with serving(session) as served:
        served.service.stop()
        served.service.thread.join(LONG_S)
        assert not served.service.thread.is_alive()
    assert session.is_closed


def test_a_stop_while_loading_ends_the_load_and_is_no_failure() -> None:
    begun, may_go_on = threading.Event(), threading.Event()

    def open_slowly() -> Any:
        begun.set()
        assert may_go_on.wait(LONG_S)
        service.check_wanted()
        raise AssertionError("it was loaded though nobody wants it")

    service = AnswerService(open_slowly, most_waiting=1)
    service.start()
    assert begun.wait(LONG_S)
    service.check_wanted()
    service.stop()
    with pytest.raises(StoppedError):
        service.check_wanted()
    may_go_on.set()
    service.thread.join(LONG_S)
    assert (service.state, service.error, service.session) == (State.STOPPING, None, None)


def test_a_model_that_was_loaded_in_spite_of_a_stop_is_closed() -> None:
    session = FakeSession()
    served = Served(session)
    with served.running(loaded=False):
        served.service.stop()
        served.may_load.set()
        served.service.thread.join(LONG_S)
        assert not served.service.thread.is_alive()
    assert session.is_closed
    assert served.service.error is None


@pytest.mark.parametrize("fault", [IntegrityError("damaged"), KeyboardInterrupt(), ValueError("a bug")])
def test_a_load_that_fails_is_kept_for_the_main_thread(fault: BaseException) -> None:
    served = Served(fault)
    with served.running(loaded=False):
        served.may_load.set()
        served.service.thread.join(LONG_S)
    assert served.service.error is fault
    assert served.service.state is State.FAILED
    with pytest.raises(NotReadyError, match="has failed"):
        served.service.check_ready()


def test_whoever_is_in_flight_is_told_when_the_thread_itself_fails() -> None:
    session = FakeSession(places=1)
    with serving(session) as served:
        brake, first = braked(served, session, "a")
        second = submit(served, "b")
        fault = SystemExit("out")

        def fail() -> None:
            raise fault

        session.in_round = fail
        brake.release()
        ended([*first, *second])
    assert first[0].pieces[-1].is_fault
    assert second[0].last == STOPPED
    assert served.service.error is fault


class _Client(threading.Thread):
    """Orders answers, leaves some in the middle, and notes what came."""

    def __init__(self, served: Served, seed: int) -> None:
        super().__init__()
        self._served = served
        self._chance = random.Random(seed)
        self.wrong: list[str] = []
        self.counts = {"whole": 0, "left": 0, "full": 0, "failed": 0}

    def run(self) -> None:
        for _ in range(25):
            texts = [chr(self._chance.randrange(97, 123)) for _ in range(self._chance.randrange(1, 4))]
            try:
                sinks = submit(self._served, *texts)
            except QueueFullError:
                self.counts["full"] += 1
                continue
            for text, sink in zip(texts, sinks, strict=True):
                self._take(text, sink, leaves=self._chance.random() < 0.3)

    def _take(self, text: str, sink: Sink, *, leaves: bool) -> None:
        if leaves:
            taken = self._chance.randrange(3)
            until(lambda: len(sink.pieces) >= taken or sink.last is not None)
            cancel(self._served, sink)
            self.counts["left"] += 1
            return
        ended([sink])
        if sink.last == "RuntimeError: lost":
            self.counts["failed"] += 1
        elif sink.text == text_of([ord(text)]) and sink.last == "stop":
            self.counts["whole"] += 1
        else:
            self.wrong.append(f"{text}: {sink.text!r} {sink.last}")


@pytest.mark.parametrize("seed", range(3))
def test_many_clients_that_come_and_go(seed: int) -> None:
    session = FakeSession(places=3)
    chance = random.Random(seed)

    def fail_seldom() -> None:
        if chance.random() < 0.01:
            raise RuntimeError("lost")

    session.in_round = fail_seldom
    with serving(session, most_waiting=6) as served:
        clients = [_Client(served, 100 * seed + number) for number in range(8)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(LONG_S)
            assert not client.is_alive()
        until(lambda: not served.service.in_flight and not served.service.waiting)
        assert not session.made.in_flight
    assert [client.wrong for client in clients] == [[]] * 8
    totals = {name: sum(client.counts[name] for client in clients) for name in clients[0].counts}
    assert totals["whole"] > 0
    assert totals["left"] > 0
