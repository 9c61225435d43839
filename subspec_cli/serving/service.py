"""One thread that answers: it loads the model, lets waiting orders join, runs rounds, and hands out the pieces."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from subspec_cli.errors import SubspecError, UsageError
from subspec_cli.serving.orders import AnswerOrder

if TYPE_CHECKING:
    from subspec_cli.session.answer import TextDelta
    from subspec_cli.session.rounds import AnswerInFlight, Rounds
    from subspec_cli.session.session import Session

STOPPED: Final = "the server is stopping"


class State(Enum):
    """What a service does."""

    LOADING = "loading"
    READY = "ok"
    STOPPING = "stopping"
    FAILED = "failed"


_NOT_READY: Final = {
    State.LOADING: "the model is loading",
    State.FAILED: "the server has failed and ends; its own messages say why",
}


class QueueFullError(Exception):
    """As many answers wait as may."""

    def __init__(self, waiting: int, most: int, wanted: int) -> None:
        super().__init__(
            f"{waiting} answers wait already, at most {most} may, and the request wants {wanted}: "
            "ask again later"
        )


class NotReadyError(Exception):
    """The model is not loaded yet, or the service stops."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an answer ended without its last token."""

    message: str
    is_fault: bool
    """Whether something broke; otherwise the service stops, or the request could not begin."""


Sink = Callable[["TextDelta | Failure"], None]
"""Takes the pieces of an answer, from the service's thread. The last one has a finish reason or is a failure."""


class Ticket:
    """An answer that was ordered."""

    def __init__(self, order: AnswerOrder, sink: Sink) -> None:
        self.order = order
        self._sink = sink
        self.is_cancelled = False

    def tell(self, piece: TextDelta | Failure) -> None:
        """Hand out a piece, unless nobody waits for it."""
        if not self.is_cancelled:
            self._sink(piece)


class _AbandonedError(Exception):
    """Nobody waits for the pass under way."""


class StoppedError(Exception):
    """The service was told to stop while it loaded the model."""


class AnswerService:
    """Answers orders from other threads, as many at a time as the session has places; the others wait in order."""

    def __init__(self, open_session: Callable[[], Session], *, most_waiting: int) -> None:
        self._open = open_session
        self._most_waiting = most_waiting
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._in_flight: dict[AnswerInFlight, Ticket] = {}
        self._joining: list[Ticket] = []
        """Taken from those that wait, and not in flight yet."""
        self._must_end = False
        self.state = State.LOADING
        self.session: Session | None = None
        """The session, once it is loaded."""
        self.error: BaseException | None = None
        """Why the service has failed."""
        self.thread = threading.Thread(target=self._run, name="answers")

    def start(self) -> None:
        """Begin to load the model."""
        self.thread.start()

    @property
    def waiting(self) -> int:
        """Answers that have no place yet."""
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        """Answers that have a place."""
        return len(self._in_flight) + len(self._joining)

    def submit(self, orders: Sequence[AnswerOrder], sinks: Sequence[Sink]) -> list[Ticket]:
        """Order some answers, all or none. An idle service takes as many as one request may want.

        Raises QueueFullError or NotReadyError.
        """
        tickets = [Ticket(*each) for each in zip(orders, sinks, strict=True)]
        with self._changed:
            session = self.check_ready()
            waiting, in_flight = self.waiting, self.in_flight
            left_over = waiting + len(orders) - (session.plan.sequences - in_flight)
            if waiting + in_flight and left_over > self._most_waiting:
                raise QueueFullError(waiting, self._most_waiting, len(orders))
            self._waiting.extend(tickets)
            self._changed.notify_all()
        return tickets

    def check_ready(self) -> Session:
        """Return the session; raises NotReadyError if there is none to answer with."""
        if self.session is None or self.state is not State.READY:
            raise NotReadyError(_NOT_READY.get(self.state, STOPPED))
        return self.session

    def check_wanted(self) -> None:
        """Raise StoppedError if the service was told to stop: nothing more of the model need be loaded."""
        if self.state is State.STOPPING:
            raise StoppedError

    def cancel(self, ticket: Ticket) -> None:
        """End an answer that nobody waits for; its sink gets nothing more."""
        with self._changed:
            ticket.is_cancelled = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            self._changed.notify_all()

    def stop(self, *, at_once: bool = False) -> None:
        """Take no more orders and tell those that wait; answers in flight are finished, or told too if `at_once`."""
        with self._changed:
            self._must_end |= at_once
            if self.state is not State.FAILED:
                self.state = State.STOPPING
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for ticket in waiting:
            ticket.tell(Failure(STOPPED, is_fault=False))

    def _run(self) -> None:
        try:
            with self._open() as session:
                with self._changed:
                    self.session = session
                    if self.state is State.LOADING:
                        self.state = State.READY
                self._answer(session.rounds())
        except StoppedError:
            pass  # asked for, and nobody waits for an answer yet
        except BaseException as error:
            self.error = error
            self.state = State.FAILED
            self.stop()
            self._tell_all(Failure(told(error), is_fault=True))

    def _answer(self, rounds: Rounds) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._in_flight or self.state is State.STOPPING):
                    self._changed.wait()
                if self.state is State.STOPPING and (self._must_end or not self._in_flight):
                    break
                self._joining = [self._waiting.popleft() for _ in range(min(rounds.free, len(self._waiting)))]
            while self._joining:
                self._join(rounds, self._joining[0])
                del self._joining[0]
            self._drop_cancelled(rounds)
            if self._in_flight:
                self._round(rounds)
        self._leave_all(rounds, Failure(STOPPED, is_fault=False))

    def _join(self, rounds: Rounds, ticket: Ticket) -> None:
        session = self.session
        assert session is not None
        try:
            found = rounds.join(ticket.order.begin(session), ticket.order.max_new_tokens)
        except Exception as error:
            ticket.tell(Failure(told(error), is_fault=not isinstance(error, UsageError)))
            return
        self._in_flight[found] = ticket

    def _drop_cancelled(self, rounds: Rounds) -> None:
        for found, ticket in list(self._in_flight.items()):
            if ticket.is_cancelled:
                del self._in_flight[found]
                rounds.leave(found)

    def _round(self, rounds: Rounds) -> None:
        """Run one round. If it fails, everyone in it is told, and the next request is answered as if nothing was."""
        try:
            for found, delta in rounds.round(self._check_awaited):
                ticket = self._in_flight[found]
                if delta.finish_reason is not None:
                    del self._in_flight[found]
                ticket.tell(delta if delta.failure is None else Failure(delta.failure, is_fault=False))
        except _AbandonedError:
            pass
        except Exception as error:
            self._leave_all(rounds, Failure(told(error), is_fault=True))

    def _leave_all(self, rounds: Rounds, failure: Failure) -> None:
        for found in self._in_flight:
            rounds.leave(found)
        self._tell_all(failure)

    def _tell_all(self, failure: Failure) -> None:
        for ticket in [*self._in_flight.values(), *self._joining]:
            ticket.tell(failure)
        self._in_flight.clear()
        self._joining.clear()

    def _check_awaited(self) -> None:
        """End the pass under way if nobody waits for any of its answers."""
        if self._must_end or all(ticket.is_cancelled for ticket in self._in_flight.values()):
            raise _AbandonedError


def told(error: BaseException) -> str:
    """Return what is said of an error."""
    return error.message if isinstance(error, SubspecError) else f"{type(error).__name__}: {error}"
