"""A loaded model ready to answer: prompts in, text with statistics out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from subspec_cli.config import SamplingConfig
from subspec_cli.decoding.engine import Engine, PassOutput, Request
from subspec_cli.decoding.sampler import make_sampler
from subspec_cli.decoding.text import AnswerText
from subspec_cli.errors import IntegrityError, UsageError
from subspec_cli.metrics import FinishReason, GenerationStats
from subspec_cli.modeling.kv_cache import KVCache
from subspec_cli.modeling.pretrained import ModelTokenizer
from subspec_cli.planning.costs import PlanCosts
from subspec_cli.planning.plan import OffloadPlan
from subspec_cli.session.oom import oom_as_error
from subspec_cli.streaming.memory_meter import MemoryMeter
from subspec_cli.streaming.streamer import StreamCounters


@dataclass(frozen=True, slots=True)
class SessionDescription:
    """What was loaded, and what it promises."""

    model_id: str
    revision: str
    device: str
    dtype: str
    exactness: str
    """`exact` or `numeric`, as the self-check found."""
    exactness_reason: str
    speculation: bool
    fits: bool
    seed: int
    fresh_seed: bool
    """Whether the seed was drawn for this session."""
    threads: int
    context_tokens: int
    budget_bytes: int
    plan: OffloadPlan
    costs: PlanCosts
    """What passes and draft steps are taken to cost: all that the trees' shapes depend on beside tokens."""
    versions: dict[str, str]
    has_chat_template: bool
    direct_io: bool
    """Whether weights are read past the page cache."""
    notes: tuple[str, ...] = ()
    """What did not go as planned while loading, and is not fatal."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that became certain, and the tokens of one pass."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    """`stop` or `length` on the last one."""
    stats: GenerationStats


@dataclass(frozen=True, slots=True)
class SessionParts:
    """What the opener puts together."""

    tokenizer: ModelTokenizer
    eos_ids: frozenset[int]
    kv: KVCache
    speculative: Engine
    """Plain too when the session does not speculate."""
    plain: Engine
    sampling: SamplingConfig
    meter: MemoryMeter
    counters: Callable[[], StreamCounters]
    close: Callable[[], None]
    check_source: Callable[[], None]
    """Raises IntegrityError if weight files in use changed."""


class Session:
    """One model, one cache, one answer at a time. Use as a context manager."""

    def __init__(self, parts: SessionParts, description: SessionDescription) -> None:
        self._parts = parts
        self.description = description
        self._requests = 0

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the reader and give the memory back."""
        self._parts.close()

    def memory_bytes(self) -> int:
        """Memory taken now beyond the bare process."""
        return self._parts.meter.current_bytes()

    def peak_memory_bytes(self) -> int:
        """Most memory ever taken beyond the bare process."""
        return self._parts.meter.peak_bytes()

    def link_counters(self) -> StreamCounters:
        """What the stream of weights has done so far."""
        return self._parts.counters()

    def encode_prompt(self, text: str, *, system: str | None, raw: bool) -> list[int]:
        """Token ids of one prompt: through the chat template if the model has one, unless `raw`."""
        if raw or not self.description.has_chat_template:
            return self._parts.tokenizer.encode(text)
        return self.encode_messages(_with_system(system, [{"role": "user", "content": text}]))

    def encode_messages(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant begins to speak."""
        return self._parts.tokenizer.encode_chat(messages)

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        stop: tuple[str, ...],
        plain: bool = False,
        noise_stream: int | None = None,
    ) -> Iterator[TextDelta]:
        """Answer a prompt. The same seed and `noise_stream` number give the same tokens, `plain` or not.

        Rows of the cache that hold a prefix of the prompt are reused. Raises UsageError for a prompt that
        leaves no room in the context, IntegrityError when weight files change meanwhile: no token that may come
        from other weights is given, ResourceError when memory runs out.
        """
        room = self.description.context_tokens - len(prompt_ids)
        if not prompt_ids or room < 1:
            raise self._no_room(len(prompt_ids))
        number = self._requests if noise_stream is None else noise_stream
        self._requests = max(self._requests, number + 1)
        limit = min(max_new_tokens, room)
        parts = self._parts
        text = AnswerText(parts.tokenizer, eos_ids=parts.eos_ids, stop=stop, max_new_tokens=limit)
        sampler = make_sampler(parts.sampling, self.description.seed, number)
        engine = parts.plain if plain else parts.speculative
        for step in self._checked(engine.generate(Request(tuple(prompt_ids), sampler, limit, text))):
            yield TextDelta(text.take(), step.token_ids, step.finish_reason, step.stats)

    def _checked(self, steps: Iterator[PassOutput]) -> Iterator[PassOutput]:
        """The same steps, each once it is certain that the files its weights were read from are the same.

        Raises ResourceError where memory runs out.
        """
        try:
            with oom_as_error(
                "answering", budget_bytes=self.description.budget_bytes, meter=self._parts.meter
            ):
                for step in steps:
                    self._parts.check_source()
                    yield step
        except IntegrityError:
            self._parts.check_source()  # a file that was cut short or replaced is the better reason
            raise

    def reset(self) -> None:
        """Empty the cache, so that the next prompt is prefilled whole."""
        self._parts.kv.rewind(0)

    def chat(self, system: str | None) -> Chat:
        """A conversation over this session's cache."""
        return Chat(self, system)

    def _no_room(self, prompt_tokens: int) -> UsageError:
        if not prompt_tokens:
            return UsageError("the prompt is empty")
        limit = self.description.context_tokens
        return UsageError(
            f"the prompt has {prompt_tokens} tokens, the context holds {limit}, one of them for an answer",
            "shorten the prompt (in a chat: /reset), or raise --context or the memory budget",
        )


class Chat:
    """Turns of one conversation; each turn prefills only what the cache does not hold."""

    def __init__(self, session: Session, system: str | None) -> None:
        self._session = session
        self._system = system
        self._messages: list[dict[str, str]] = []

    def ask(
        self,
        text: str,
        *,
        max_new_tokens: int,
        stop: tuple[str, ...],
        plain: bool = False,
        noise_stream: int | None = None,
    ) -> Iterator[TextDelta]:
        """Answer the next message; `plain` and `noise_stream` as in `Session.generate`.

        What was answered before an interruption stays in the conversation. A prompt that does not fit leaves
        the conversation as it was.
        """
        session = self._session
        asked = [*self._messages, {"role": "user", "content": text}]
        if session.description.has_chat_template:
            prompt_ids = session.encode_messages(_with_system(self._system, asked))
        else:
            turns = [message["content"] for message in _with_system(self._system, asked)]
            prompt_ids = session.encode_prompt("\n".join(turns) + "\n", system=None, raw=True)
        deltas = session.generate(
            prompt_ids, max_new_tokens=max_new_tokens, stop=stop, plain=plain, noise_stream=noise_stream
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
        """Let the conversation go on as if the last answer had been `text`."""
        self._messages[-1] = {"role": "assistant", "content": text}

    def reset(self) -> None:
        """Forget the conversation."""
        self._messages = []
        self._session.reset()


def _with_system(system: str | None, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    return messages if system is None else [{"role": "system", "content": system}, *messages]
