"""A loaded model that is ready to answer: prompts in, text with statistics out."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from subspec_cli.config import SamplingConfig
from subspec_cli.decoding.drafter import Drafter
from subspec_cli.decoding.engine import Engine, PassOutput, Request
from subspec_cli.decoding.penalties import penalties_of
from subspec_cli.decoding.sampler import derived_seed, make_sampler
from subspec_cli.decoding.text import AnswerText
from subspec_cli.errors import IntegrityError, UsageError
from subspec_cli.metrics import GenerationStats, OnPrefill
from subspec_cli.modeling.self_check import check_products
from subspec_cli.modeling.target_blocks import TargetBlocks
from subspec_cli.planning.plan import OffloadPlan
from subspec_cli.session.answer import BegunAnswer, TextDelta
from subspec_cli.session.chat import Chat
from subspec_cli.session.description import SessionDescription
from subspec_cli.session.learning import Learning
from subspec_cli.session.load import LoadedModel
from subspec_cli.session.oom import oom_as_error
from subspec_cli.session.rounds import Rounds
from subspec_cli.session.token_biases import token_biases
from subspec_cli.streaming.streamer import StreamCounters
from subspec_cli.units import counted

if TYPE_CHECKING:
    from subspec_cli.modeling.grammar import JsonGrammars

Output = TypeVar("Output")


@dataclass(frozen=True, slots=True)
class Engines:
    """The engines of a session: one target, one KV cache, two ways to draft."""

    speculative: Engine
    """The plain engine if the session does not speculate."""
    plain: Engine


class Session:
    """One model that answers: one answer at a time, or several by `rounds`. Use as a context manager.

    `loaded` is the model in memory, `description` says what was planned and promised, and `learning` counts what was
    accepted of drafts, for the next plan; None learns nothing. All are read-only.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        engines: Engines,
        description: SessionDescription,
        learning: Learning | None = None,
    ) -> None:
        self.loaded = loaded
        self.description = description
        self.learning = learning
        self._engines = engines
        self._next_request = 0

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the stream, release the memory and keep what was learned; closing twice does no harm."""
        self.loaded.close()
        if self.learning is not None:
            self.learning.keep()

    @property
    def plan(self) -> OffloadPlan:
        """What lies where in memory, and how fast that is predicted to be."""
        return self.description.plan

    def memory_bytes(self) -> int:
        """Return the memory that the process takes now beyond a bare one."""
        return self.loaded.meter.current_bytes()

    def peak_memory_bytes(self) -> int:
        """Return the most memory that the process ever took beyond a bare one."""
        return self.loaded.meter.peak_bytes()

    def process_peak_bytes(self) -> int:
        """Return the most host memory that the whole process took, which a task manager shows."""
        return self.loaded.meter.process_peak_bytes()

    def bare_process_bytes(self) -> int:
        """Return the host memory that the process took when all was imported and no model was loaded."""
        return self.loaded.meter.bare_bytes

    def link_counters(self) -> StreamCounters:
        """Return the totals of the stream of weights so far."""
        return self.loaded.counters()

    def encode_prompt(self, text: str, *, system: str | None, raw: bool) -> list[int]:
        """Return the token ids of one prompt: through the chat template if the model has one, unless `raw`."""
        return self.loaded.tokenizer.encode_prompt(text, system=system, raw=raw)

    def encode_messages(self, messages: Sequence[dict[str, str]], *, system: str | None = None) -> list[int]:
        """Return the token ids of a conversation, up to where the assistant begins to speak.

        `messages` have a `role` and a `content` each. A model without a chat template gets the contents line by line.
        """
        return self.loaded.tokenizer.encode_messages(messages, system=system)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        seed: int | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        plain: bool = False,
        request_number: int | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> Generator[TextDelta, None, None]:
        """Answer a prompt, given as text or as token ids, piece by piece. Closing the generator ends the answer.

        Rows of the KV cache that hold a prefix of the prompt are reused.

        Args:
            prompt: text goes through the chat template, with the system message of the settings; token ids
                are taken as they are.
            seed: seed of the noise at a temperature above 0; the same seed gives the same answer. None derives
                one from the session's seed and the request's number, so that asking again gives another answer.
            max_new_tokens: longest answer; None takes the setting.
            stop: texts that end the answer and are not part of it; None takes the setting.
            plain: decode without speculation: the same tokens, slower.
            request_number: the number from which a seed is derived; None takes the next one.
            on_prefill: receives how far the prompt is read; what it raises ends the answer.

        Raises:
            UsageError: the prompt is empty or leaves no room in the context.
            IntegrityError: weight files changed. No token that may come from other weights is emitted.
            ResourceError: memory ran out.
        """
        run = self.description.config.run
        if isinstance(prompt, str):
            prompt = self.encode_prompt(prompt, system=run.system, raw=run.raw)
        begun = self.begin(prompt, seed=seed, stop=stop, request_number=request_number)
        yield from self.go_on(begun, max_new_tokens=max_new_tokens, plain=plain, on_prefill=on_prefill)

    def begin(
        self,
        prompt_ids: Sequence[int],
        *,
        seed: int | None = None,
        stop: Sequence[str] | None = None,
        request_number: int | None = None,
    ) -> BegunAnswer:
        """Begin an answer without a token yet; arguments and errors are those of `generate`."""
        config = self.description.config
        self._check_room(prompt_ids)
        return self.begin_by(
            prompt_ids,
            config.sampling,
            seed=self._seed(seed, request_number),
            stop=config.run.stop if stop is None else stop,
        )

    def begin_by(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingConfig,
        *,
        seed: int,
        choice: int = 0,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        schema: dict[str, Any] | bool | None = None,
    ) -> BegunAnswer:
        """Begin an answer by settings of its own, which nothing of the session's fills in.

        Args:
            prompt_ids: tokens of the prompt.
            sampling: how tokens are chosen; its own seed is not used.
            seed: seed of the noise.
            choice: number of the answer among those to one request, each with noise of its own.
            stop: texts that end the answer and are not part of it.
            logprobs: likeliest tokens to tell beside each token, with its log-probability; None tells neither.
            schema: JSON schema that the answer follows; `True` is any JSON object.

        Raises UsageError as `generate` does, for a bias that names no token, and for a schema that cannot be
        followed; UnsupportedModelError if the model's tokenizer takes no grammar.
        """
        self._check_room(prompt_ids)
        return BegunAnswer(
            tuple(prompt_ids),
            sampling,
            make_sampler(sampling, seed, choice),
            penalties_of(sampling, self._biases(sampling)),
            tuple(stop),
            logprobs,
            None if schema is None else self._grammars.first_state(schema),
        )

    def go_on(
        self,
        begun: BegunAnswer,
        *,
        max_new_tokens: int | None = None,
        plain: bool = False,
        on_prefill: OnPrefill | None = None,
    ) -> Generator[TextDelta, None, None]:
        """Generate the next tokens of an answer, which are added to it; arguments and errors are those of `generate`.

        Wherever it was interrupted, the tokens are those of an answer that was not. Text begins where
        `certain_text` ends, and statistics count the tokens before as a part of the prompt.
        """
        text, request = self.request_of(begun, max_new_tokens)
        engine = self._engines.plain if plain else self._engines.speculative
        stats = GenerationStats()
        try:
            with closing(self.checked(engine.generate(request, self.loaded.kv, on_prefill))) as outputs:
                for output in outputs:
                    stats = output.stats
                    yield self.delta_of(begun, text, output)
        finally:
            self.learn(begun.sampling, stats)

    def request_of(self, begun: BegunAnswer, max_new_tokens: int | None) -> tuple[AnswerText, Request]:
        """Return the stop rule and the request with which an answer goes on; errors are those of `go_on`."""
        known = len(begun.prompt_ids) + len(begun.token_ids)
        free = self.description.context_tokens - known
        if free < 1:
            raise UsageError(
                f"the context is full, all {self.description.context_tokens} tokens",
                "in a chat /drop forgets the oldest turns; or raise --context or the memory budget",
            )
        wanted = self.description.config.run.max_new_tokens if max_new_tokens is None else max_new_tokens
        limit = min(wanted, free)
        text = self._text_of(begun, limit)
        text.take()
        given = tuple(begun.token_ids)
        return text, Request(
            begun.prompt_ids,
            begun.sampler,
            limit,
            text,
            begun.penalties,
            given,
            begun.logprobs,
            begun.constraint,
        )

    def delta_of(self, begun: BegunAnswer, text: AnswerText, output: PassOutput) -> TextDelta:
        """Add what a pass emitted to its answer, and return it as a piece."""
        begun.token_ids.extend(output.token_ids)
        return TextDelta(text.take(), output.token_ids, output.finish_reason, output.stats, output.logprobs)

    def learn(self, sampling: SamplingConfig, stats: GenerationStats) -> None:
        """Count what was accepted of an answer's drafts, for the next plan."""
        if self.learning is not None:
            self.learning.add(sampling, stats)

    def rounds(self) -> Rounds:
        """Return the answers in flight at the same time, none yet. No other answer may be generated meanwhile."""
        return Rounds(self, self._engines.speculative, self.loaded.caches)

    def certain_text(self, begun: BegunAnswer) -> str:
        """Return the text of an answer that no later token can change."""
        return self._text_of(begun, 1).take()

    def _text_of(self, begun: BegunAnswer, limit: int) -> AnswerText:
        """Return the stop rule of an answer, fed with its tokens; `limit` further tokens may come."""
        text = AnswerText(
            self.loaded.tokenizer,
            eos_ids=self.loaded.eos_ids,
            stop=begun.stop,
            max_new_tokens=len(begun.token_ids) + limit,
        )
        for token_id in begun.token_ids:
            text.feed(token_id)
        return text

    def reset(self) -> None:
        """Empty the KV cache, so that the next prompt is prefilled whole."""
        self.loaded.kv.rewind(0)

    def set_sampling(self, sampling: SamplingConfig) -> None:
        """Choose tokens of later answers by other settings. A new seed begins with request 0.

        The settings are taken as they are: the model's own values are filled in when a session is opened. Raises
        UsageError for a bias that names no token.
        """
        about = self.description
        self._biases(sampling)
        seed = about.seed if sampling.seed is None else sampling.seed
        self._next_request = self._next_request if seed == about.seed else 0
        config = replace(about.config, sampling=sampling)
        self.description = replace(about, config=config, seed=seed)

    def chat(self, system: str | None = None) -> Chat:
        """Begin a conversation over this session's cache; without `system` the settings' system message is used."""
        return Chat(self, self.description.config.run.system if system is None else system)

    def with_drafter(self, drafter: Drafter[Any], *, blocks: TargetBlocks | None = None) -> Session:
        """Return a session over the same loaded model that drafts with `drafter`. For experiments.

        `blocks` replaces the source of the target's weights. Both sessions share the KV cache, so one answer at a
        time; closing either closes the model. The tokens stay the target's own, whatever the drafter proposes.
        """
        engines = replace(self._engines, speculative=self.loaded.engine(drafter, blocks))
        return Session(self.loaded, engines, self.description)

    def take_request_number(self) -> int:
        """Return the number of the next request, from which its seed is derived."""
        self._next_request += 1
        return self._next_request - 1

    @cached_property
    def _grammars(self) -> JsonGrammars:
        """What makes grammars for the tokenizer; the vocabulary is indexed at the first use."""
        if find_spec("llguidance") is None:
            raise UsageError("JSON formats need llguidance", "pip install 'subspec-cli[serve]'")
        from subspec_cli.modeling.grammar import JsonGrammars

        loaded = self.loaded
        return JsonGrammars(loaded.tokenizer.backend_json, loaded.math.geometry.vocab, loaded.eos_ids)

    def _biases(self, sampling: SamplingConfig) -> tuple[tuple[int, float], ...]:
        return token_biases(sampling.logit_bias, self.loaded.tokenizer, self.loaded.math.geometry.vocab)

    def _seed(self, seed: int | None, request_number: int | None) -> int:
        """Return the seed of one answer: its own, or one that is derived from the session's."""
        if seed is not None:
            return seed
        if request_number is None:
            request_number = self.take_request_number()
        self._next_request = max(self._next_request, request_number + 1)
        return derived_seed(self.description.seed, request_number)

    def checked(self, outputs: Iterator[Output]) -> Generator[Output, None, None]:
        """Yield each output of passes once it is certain that weight files are unchanged and that products are whole.

        Raises ResourceError if memory runs out.
        """
        budget_bytes = self.description.budget_bytes
        try:
            with oom_as_error("answering", budget_bytes=budget_bytes, meter=self.loaded.meter):
                for output in outputs:
                    self.loaded.check_source()
                    check_products()
                    yield output
        except IntegrityError:
            self.loaded.check_source()  # a file that was cut short or replaced is the better reason
            raise

    def _check_room(self, prompt_ids: Sequence[int]) -> None:
        """Raise UsageError if the context has no room for a prompt and a token, or if the prompt is empty."""
        limit = self.description.context_tokens
        if not prompt_ids:
            raise UsageError("the prompt is empty")
        if len(prompt_ids) >= limit:
            raise UsageError(
                f"the prompt has {counted(len(prompt_ids), 'token')}, the context holds {limit}, "
                "one of them for an answer",
                "shorten the prompt (in a chat: /drop or /reset, then /retry), or raise --context or the budget",
            )
