"""A conversation over a session's KV cache."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from subspec_cli.metrics import OnPrefill

if TYPE_CHECKING:
    from subspec_cli.session.session import Session, TextDelta


class Chat:
    """Turns of one conversation; each turn prefills only what the cache does not hold."""

    def __init__(self, session: Session, system: str | None) -> None:
        self._session = session
        self._system = system
        self._messages: list[dict[str, str]] = []

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
        noise_stream: int | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> Generator[TextDelta, None, None]:
        """Answer the next message; options and errors are those of `Session.generate`.

        The part of an answer that came before an interruption stays in the conversation. A prompt that does not
        fit leaves the conversation as it was.
        """
        session = self._session
        asked = [*self._messages, {"role": "user", "content": text}]
        deltas = session.generate(
            session.encode_messages(asked, system=self._system),
            seed=seed,
            max_new_tokens=max_new_tokens,
            stop=stop,
            plain=plain,
            noise_stream=noise_stream,
            on_prefill=on_prefill,
        )
        answer: list[str] = []
        began = False
        try:
            for delta in deltas:
                began = True
                answer.append(delta.text)
                yield delta
        finally:
            if began:
                self._messages = [*asked, {"role": "assistant", "content": "".join(answer)}]

    def replace_answer(self, text: str) -> None:
        """Continue the conversation as if the last answer had been `text`."""
        self._messages[-1] = {"role": "assistant", "content": text}

    def replace_messages(self, messages: Sequence[dict[str, str]]) -> None:
        """Continue from another conversation: `role` and `content` of turns, without the system message."""
        self._messages = list(messages)

    def set_system(self, system: str) -> None:
        """Continue with another system message."""
        self._system = system

    def reset(self) -> None:
        """Forget the conversation and empty the cache."""
        self._messages = []
        self._session.reset()
