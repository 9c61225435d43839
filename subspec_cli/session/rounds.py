"""Several answers at a time over one model: they join, go on together round by round, and leave."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from subspec_cli.decoding.engine import Answer, Engine, common_prefix
from subspec_cli.decoding.text import AnswerText
from subspec_cli.metrics import GenerationStats, OnPrefill
from subspec_cli.modeling.kv_cache import KVCache

if TYPE_CHECKING:
    from subspec_cli.session.answer import BegunAnswer, TextDelta
    from subspec_cli.session.session import Session


class AnswerInFlight:
    """An answer among others. Its tokens are those that it has alone."""

    def __init__(self, begun: BegunAnswer, answer: Answer, text: AnswerText) -> None:
        self.begun = begun
        self.answer = answer
        self.text = text

    @property
    def stats(self) -> GenerationStats:
        """Totals of the answer so far."""
        output = self.answer.output
        return GenerationStats() if output is None else output.stats


class Rounds:
    """The answers in flight of one session, as many as it was planned for.

    An answer whose prompt begins like an earlier one's takes the KV cache that holds most of it.
    """

    def __init__(self, session: Session, engine: Engine, caches: Sequence[KVCache]) -> None:
        self._session = session
        self._engine = engine
        self._free = list(caches)
        """Least recently used first."""
        self.in_flight: list[AnswerInFlight] = []

    @property
    def free(self) -> int:
        """How many more answers can join."""
        return len(self._free)

    def join(
        self, begun: BegunAnswer, max_new_tokens: int | None = None, on_prefill: OnPrefill | None = None
    ) -> AnswerInFlight:
        """Let an answer take part from the next round on; `free` must not be 0.

        Raises UsageError if the context has no room for the prompt and a token.
        """
        kv = max(self._free, key=lambda kv: common_prefix(begun.prompt_ids, kv.token_ids))
        text, request = self._session.request_of(begun, max_new_tokens)
        answer = self._engine.join(request, kv, on_prefill)
        self._free.remove(kv)
        found = AnswerInFlight(begun, answer, text)
        self.in_flight.append(found)
        return found

    def leave(self, found: AnswerInFlight) -> None:
        """End an answer where it is, between rounds; one that has ended has left."""
        if found not in self.in_flight:
            return
        self.in_flight.remove(found)
        self._free.append(found.answer.kv)
        self._session.learn(found.begun.sampling, found.stats)

    def round(
        self, on_layer: Callable[[], None] = lambda: None
    ) -> Generator[tuple[AnswerInFlight, TextDelta], None, None]:
        """Run one pass for all answers in flight; yield what it emitted, by answer. Answers that end leave.

        `on_layer` is called behind every layer of the pass; what it raises ends the round, and answers stay as they
        were. Raises what `Session.generate` raises; it is then unknown which answers are sound.
        """
        by_answer = {id(found.answer): found for found in self.in_flight}
        outputs = self._engine.round([found.answer for found in self.in_flight], on_layer)
        with closing(self._session.checked(outputs)) as checked:
            for answer, output in checked:
                found = by_answer[id(answer)]
                if output.finish_reason is not None:
                    self.leave(found)
                delta = self._session.delta_of(found.begun, found.text, output)
                state = answer.state
                if delta.finish_reason and state is not None and state.constraint is not None:
                    delta = replace(delta, failure=state.constraint.failure)
                yield found, delta
