"""A conversation over a session's KV cache."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from subspec_cli.errors import UsageError
from subspec_cli.metrics import OnPrefill

if TYPE_CHECKING:
    from subspec_cli.session.answer import BegunAnswer, TextDelta
    from subspec_cli.session.session import Session


@dataclass(slots=True)
class _OpenTurn:
    """A turn whose answer may go on."""

    question: str
    begun: BegunAnswer
    began: bool = False
    """Whether it has a token, and so is a part of the conversation."""


class _Request(NamedTuple):
    """What the seed of a conversation is derived from."""

    session_seed: int
    number: int


class Chat:
    """Turns of one conversation; each turn prefills only what the cache does not hold.

    All turns have one seed, since no position comes twice in a conversation. A conversation that goes back, and so
    comes to a position again, goes on with another seed.
    """

    def __init__(self, session: Session, system: str | None) -> None:
        self._session = session
        self._system = system
        self._messages: list[dict[str, str]] = []
        self._open: _OpenTurn | None = None
        self._request: _Request | None = None

    @property
    def messages(self) -> tuple[dict[str, str], ...]:
        """What was said so far, without the system message: `role` and `content` of each turn."""
        return tuple(self._messages)

    def ask(
        self,
        text: str,
        *,
        seed: int | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        plain: bool = False,
        request_number: int | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> Generator[TextDelta, None, None]:
        """Answer the next message; options and errors are those of `Session.generate`.

        The part of an answer that came before an interruption stays in the conversation. A prompt that does not
        fit leaves the conversation as it was.
        """
        asked = [*self._messages, {"role": "user", "content": text}]
        begun = self._session.begin(
            self._session.encode_messages(asked, system=self._system),
            seed=seed,
            stop=stop,
            request_number=self._request_number() if request_number is None else request_number,
        )
        self._open = _OpenTurn(text, begun)
        yield from self._answer(self._open, asked, max_new_tokens, plain=plain, on_prefill=on_prefill)

    def _request_number(self) -> int:
        seed = self._session.description.seed
        if self._request is None or self._request.session_seed != seed:
            self._request = _Request(seed, self._session.take_request_number())
        return self._request.number

    @property
    def unfinished(self) -> str | None:
        """What the last answer says so far, if it was interrupted or ended by length; None if nothing can go on."""
        return None if self._open is None else self._session.certain_text(self._open.begun)

    def resume(
        self, *, max_new_tokens: int | None = None, plain: bool = False, on_prefill: OnPrefill | None = None
    ) -> Generator[TextDelta, None, None]:
        """Go on with the answer where it stopped: the tokens are those of an answer that was never interrupted.

        Its text goes on after `unfinished`. If turns before it were dropped meanwhile, the tokens are those that the
        model gives after the conversation that is left.

        Raises UsageError if the last answer is whole, or if the context has no room.
        """
        turn = self._open
        if turn is None:
            raise UsageError("no answer was interrupted or ended by length")
        before = self._messages[:-2] if turn.began else self._messages
        asked = [*before, {"role": "user", "content": turn.question}]
        prompt_ids = self._session.encode_messages(asked, system=self._system)
        turn.begun = replace(turn.begun, prompt_ids=tuple(prompt_ids))
        yield from self._answer(turn, asked, max_new_tokens, plain=plain, on_prefill=on_prefill)

    def _answer(
        self,
        turn: _OpenTurn,
        asked: list[dict[str, str]],
        max_new_tokens: int | None,
        *,
        plain: bool,
        on_prefill: OnPrefill | None,
    ) -> Generator[TextDelta, None, None]:
        """Generate tokens of a turn, and keep what it says in the conversation."""
        begun = turn.begun
        pieces = [self._session.certain_text(begun)]
        finish_reason = None
        deltas = self._session.go_on(begun, max_new_tokens=max_new_tokens, plain=plain, on_prefill=on_prefill)
        try:
            for delta in deltas:
                pieces.append(delta.text)
                finish_reason = delta.finish_reason
                yield delta
        finally:
            deltas.close()
            turn.began = bool(begun.token_ids)
            if turn.began:
                said = "".join(pieces) if finish_reason else self._session.certain_text(begun)
                self._messages = [*asked, {"role": "assistant", "content": said}]
            if finish_reason == "stop":
                self._open = None

    def replace_messages(self, messages: Sequence[dict[str, str]]) -> None:
        """Continue from another conversation: `role` and `content` of turns, without the system message.

        An unfinished answer can still go on if the last message stays the same object.
        """
        if not (messages and self._messages and messages[-1] is self._messages[-1]):
            self._open = None
        self._messages, self._request = list(messages), None

    def set_system(self, system: str) -> None:
        """Continue with another system message."""
        self._system = system

    def reset(self) -> None:
        """Forget the conversation and empty the cache."""
        self._messages, self._open, self._request = [], None, None
        self._session.reset()
