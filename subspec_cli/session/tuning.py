"""The second stage of `prepare`: codes that are rounded for what the model's matrices see in its own text.

The text is decoded once, greedily, with the substitutes of the first stage, and kept beside the new ones. One pass of
the target over it shows the inputs of each layer, whose substitute is made before the next layer runs.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from subspec_cli.config import Config, ModelConfig, SamplingConfig
from subspec_cli.errors import IntegrityError, SubspecError
from subspec_cli.files.atomic_write import atomic_write, remove_file
from subspec_cli.files.json_object import parse_json_object
from subspec_cli.files.regular_file import read_small_file, sha256_file
from subspec_cli.limits import PREFILL_CHUNK
from subspec_cli.planning.request import WantedTokens
from subspec_cli.reporter import Reporter
from subspec_cli.session.open import open_session
from subspec_cli.session.session import Session
from subspec_cli.substitutes.manifest import TUNING_TEXT_NAME
from subspec_cli.substitutes.prepared_model import prepared_directory
from subspec_cli.substitutes.quality import MatrixQuality
from subspec_cli.substitutes.settings import SubstituteSettings
from subspec_cli.units import counted, format_bytes, format_seconds

if TYPE_CHECKING:
    from torch import Tensor

    from subspec_cli.modeling.input_moments import MeasuredInputs

_PROMPTS: Final = (
    "Hello!",
    "Tell me a story.",
    "Explain how something works.",
    "What is two plus two?",
    "Write a short list.",
    "Who are you?",
    "Write a small program.",
    "How do I learn a language?",
    "What is your favorite color?",
    "Describe a city.",
    "Give me three tips.",
    "How does a plane fly?",
    "Write a poem.",
    "Why is the sky blue?",
    "List some animals.",
    "What should I eat today?",
    "Summarize the history of music.",
    "Count to ten.",
    "Explain money to a child.",
    "What is a good book?",
    "Solve 12 times 7.",
    "Write an email.",
    "What happens at night?",
    "Tell me a joke.",
)
"""Neutral beginnings: what follows is the model's own."""
_TEXT_TOKENS: Final = 2048
"""Most tokens of text, beginnings included."""
_ANSWER_TOKENS: Final = 64
"""Most tokens after each beginning."""
_MOST_TEXT_BYTES: Final = 1 << 20


@dataclass
class Tuner:
    """Makes tuned substitutes layer by layer. Nothing is opened before the first layer is asked for."""

    model: str
    settings: SubstituteSettings
    config: Config
    reporter: Reporter
    _opened: ExitStack = field(default_factory=ExitStack)
    _measured: Generator[tuple[int, Mapping[str, MeasuredInputs]], None, None] | None = None
    _session: Session | None = None
    _text: Sequence[int] = ()
    _next_layer: int = 0

    def __enter__(self) -> Tuner:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def find_text(self, sha256: str | None) -> str:
        """Open the session, and decode what is missing of the text; returns the SHA-256 of the text's file.

        A kept text that has not the given SHA-256 is decoded again.
        """
        self._session = self._opened.enter_context(
            open_session(self._session_config(), self.reporter, count=_wanted)
        )
        self.reporter.note(_announced(self._session))
        path = self._text_path(self._session)
        if sha256 is not None and path.exists() and sha256_file(path) != sha256:
            remove_file(path)
        self._text = self._decoded(self._session, path)
        return sha256_file(path)

    def quantize(
        self, layer: int, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, MatrixQuality]]:
        """Quantize one layer. Layers before it run without being made."""
        from subspec_cli.modeling.quantization import quantize_layer

        made = quantize_layer(tensors, self.settings, self._moments_of(layer))
        return made.tensors, made.quality

    def _moments_of(self, layer: int) -> Mapping[str, MeasuredInputs]:
        if self._measured is None or layer < self._next_layer:
            self._measured = self._begin()
        for number, moments in self._measured:
            self._next_layer = number + 1
            if number == layer:
                return moments
        raise AssertionError(f"the model has no layer {layer}")

    def _begin(self) -> Generator[tuple[int, Mapping[str, MeasuredInputs]], None, None]:
        """Begin a pass over the text."""
        from subspec_cli.decoding.row_groups import prompt_groups
        from subspec_cli.modeling.input_moments import MeasuringTarget
        from subspec_cli.modeling.target_flow import SequenceRows

        assert self._session is not None, "the text comes first"
        session, loaded, text = self._session, self._session.loaded, self._text
        target = MeasuringTarget(
            loaded.math, loaded.attention, loaded.embed, loaded.head, loaded.blocks, loaded.self_check.rules
        )
        session.reset()
        target.begin_answer(loaded.kv, len(text))
        batches = [[SequenceRows(group, loaded.kv)] for group in prompt_groups(text, 0)]
        self._next_layer = 0
        measured = target.measured(target.begin(batches))
        self._opened.callback(measured.close)
        return measured

    def _session_config(self) -> Config:
        """Settings of the session that decodes the text: greedy, with the substitutes of the first stage."""
        return replace(
            self.config,
            model=ModelConfig(model=self.model, bits=self.settings.bits),
            memory=replace(self.config.memory, context=None),
            sampling=SamplingConfig(seed=0),
        )

    def _text_path(self, session: Session) -> Path:
        about = session.description
        return prepared_directory(about.model_id, about.revision, self.settings) / TUNING_TEXT_NAME

    def _decoded(self, session: Session, path: Path) -> list[int]:
        """The tokens of the model's own text: what an earlier run kept, and what is missing of it.

        It ends with a whole chunk, the one that nothing is rounded for.
        """
        most = _most_tokens(session)
        answers = _kept(path, session.loaded.math.geometry.vocab)
        began_s, known = time.monotonic(), sum(map(len, answers))
        while len(answers) < len(_PROMPTS) and (done := sum(map(len, answers))) < most:
            pace = _pace(done - known, most - done, time.monotonic() - began_s)
            self.reporter.progress(f"decoding the model's own text, {done}/{most} tokens{pace}")
            answers.append(_answer(session, _PROMPTS[len(answers)], most))
            atomic_write(path, json.dumps({"answers": answers}).encode())
        text = [token for answer in answers for token in answer][:most]
        return text[: len(text) // PREFILL_CHUNK * PREFILL_CHUNK] or text


def _pace(tokens: int, left: int, elapsed_s: float) -> str:
    """How fast the text grows, and the time that the rest takes; nothing before the first answer is there."""
    if not tokens or elapsed_s <= 0:
        return ""
    rate = tokens / elapsed_s
    return f" · {rate:.3g} tok/s · {format_seconds(left / rate)} left"


def _wanted(_tokenizer: object) -> WantedTokens:
    return WantedTokens(prompt=1, answer=_TEXT_TOKENS - 1, is_whole=True)


def _most_tokens(session: Session) -> int:
    """Tokens of the text: no budget makes them fewer, for they decide the bytes of the substitutes."""
    return min(_TEXT_TOKENS, session.loaded.math.geometry.max_positions)


def _answer(session: Session, beginning: str, most: int) -> list[int]:
    """A beginning and what the model says to it. It is taken bare where a template would fill half of the text."""
    prompt = session.encode_prompt(beginning, system=None, raw=False)
    if len(prompt) > most // 2:
        prompt = session.encode_prompt(beginning, system=None, raw=True)
    pieces = session.generate(prompt, max_new_tokens=_ANSWER_TOKENS, stop=())
    return [*prompt, *(token for piece in pieces for token in piece.token_ids)]


def _announced(session: Session) -> str:
    """What decoding the text and rounding will take."""
    from subspec_cli.modeling.tuned_rounding import rounding_bytes

    plan, geometry = session.plan, session.loaded.math.geometry
    tokens, speed = _most_tokens(session), plan.prediction.tok_per_s
    most = max(rounding_bytes(geometry.layer_shapes(layer)) for layer in geometry.representatives)
    return (
        f"tuning with up to {counted(tokens, 'token')} of the model's own text, decoded in about "
        f"{format_seconds(tokens / speed)} at {speed:.3g} tok/s; memory: {format_bytes(plan.total_bytes)} for the "
        f"session, up to {format_bytes(most)} and one layer for rounding. Ctrl-C ends it: the first set works "
        "without it, and the same command goes on"
    )


def _kept(path: Path, vocab: int) -> list[list[int]]:
    """Answers of an earlier run; none if they cannot be read."""
    with contextlib.suppress(SubspecError, FileNotFoundError):
        data = read_small_file(path, _MOST_TEXT_BYTES)
        answers = parse_json_object(data, TUNING_TEXT_NAME, IntegrityError).get("answers")
        if isinstance(answers, list) and all(_is_text(answer, vocab) for answer in answers):
            return answers[: len(_PROMPTS)]
    return []


def _is_text(found: object, vocab: int) -> bool:
    return isinstance(found, list) and all(type(token) is int and 0 <= token < vocab for token in found)
