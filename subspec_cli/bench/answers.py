"""What a benchmark collects: answers of both arms, and of plain decoding under its own best plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from subspec_cli.metrics import FinishReason, GenerationStats
from subspec_cli.probe.machine_use import NOTHING_USED, MachineUse


@dataclass(frozen=True, slots=True)
class ArmAnswer:
    """One answer of one arm."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | Literal["interrupted"]
    stats: GenerationStats
    use: MachineUse = NOTHING_USED
    """Who used the processors meanwhile."""


@dataclass(frozen=True, slots=True)
class PeerAnswer:
    """One answer of the library's own offload."""

    answer: ArmAnswer
    read_bytes: int | None
    """Bytes that storage delivered for it; None if the system does not report them."""
    streamed_bytes: int
    """Bytes of weights that it took from disk or from the page cache, a pass for each token."""


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """The same turn answered by plain and by speculative decoding."""

    question_id: str
    category: str
    turn: int
    plain: ArmAnswer
    speculative: ArmAnswer
    repetition: int = 1
    peer: PeerAnswer | None = None
    """The peer's answer, if one was asked."""

    @property
    def identical(self) -> bool:
        """Whether both have the same tokens, up to the shorter limit."""
        plain, speculative = self.plain.token_ids, self.speculative.token_ids
        if self.plain.finish_reason == "length":
            return speculative[: len(plain)] == plain
        return speculative == plain

    @property
    def speedup_same_plan(self) -> float:
        """Ratio of the two decode speeds; 0 if either answer is a single token."""
        plain, speculative = self.plain.stats.decode_tok_per_s, self.speculative.stats.decode_tok_per_s
        return speculative / plain if plain and speculative else 0.0


@dataclass(frozen=True, slots=True)
class BestPlainAnswer:
    """The first turn of a question under plain decoding's own best plan."""

    question_id: str
    when: Literal["before", "after"]
    """Whether it was measured before or after the pairs."""
    answer: ArmAnswer
