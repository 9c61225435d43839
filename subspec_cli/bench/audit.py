"""Audits: greedy answers of a session beside the library's own forward in float32 and in the checkpoint's type.

The library reads the tokens that the session gave, all rows of an answer at once, so that every token is compared
after the same tokens. Our logits come from a replay of the same tokens, once in the model's type and once in float32.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from subspec_cli.bench.audit_report import AuditedAnswer, AuditReport, Difference
from subspec_cli.bench.suites import Question, load_suite
from subspec_cli.checkpoint.checkpoint import open_checkpoint
from subspec_cli.config import Config, SamplingConfig
from subspec_cli.modeling.reference import AskedRows, LibraryModel, ReferenceRows
from subspec_cli.modeling.row_comparison import ComparedRow, RowLogits, compare_rows
from subspec_cli.planning.request import WantedTokens
from subspec_cli.reporter import Reporter
from subspec_cli.session import open_session
from subspec_cli.session.found_model import find_model
from subspec_cli.session.replay import Replay, float32_replay, own_replay
from subspec_cli.streaming.host_memory import host_memory
from subspec_cli.units import GIB

if TYPE_CHECKING:
    from subspec_cli.modeling.pretrained import ModelTokenizer
    from subspec_cli.session import Session

_MEMORY_SHARE: Final = 0.8
"""Share of the free memory that the library's weights may take; its activations take some of the rest."""


@dataclass(frozen=True, slots=True)
class AuditProgress:
    """Progress of one stage of an audit."""

    stage: str
    done: int
    total: int
    """Answers, sequences or layers of the stage; 0 if unknown."""
    elapsed_s: float
    """Time since the stage began."""


@dataclass(frozen=True, slots=True)
class GivenAnswer:
    """A question's prompt, and the tokens that the session answered."""

    question: Question
    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str

    @property
    def asked(self) -> AskedRows:
        """The rows that gave the answer's tokens."""
        return AskedRows((*self.prompt, *self.token_ids[:-1]), len(self.prompt) - 1)

    def up_to(self, switch: int | None) -> GivenAnswer:
        """Return the answer up to where longrope changes its factors: rows before it would be turned anew."""
        if switch is None or len(self.prompt) > switch:
            return self
        return dataclasses.replace(self, token_ids=self.token_ids[: switch - len(self.prompt) + 1])


OnProgress = Callable[[AuditProgress], None]


def run_audit(config: Config, *, progress: OnProgress) -> AuditReport:
    """Answer the questions greedily and compare every token and its logits with the library.

    Raises what opening a session raises.
    """
    questions = load_suite("sample", config.audit.questions, config.audit.limit)
    config = dataclasses.replace(config, sampling=SamplingConfig())
    reporter = Reporter(lambda text: progress(AuditProgress(text, 0, 0, 0.0)))
    with open_session(config, reporter, count=_count_of(config, questions)) as session:
        given = list(_answers(session, config, questions, progress))
        return audit_answers(session, given, progress=progress)


def audit_answers(session: Session, given: Sequence[GivenAnswer], *, progress: OnProgress) -> AuditReport:
    """Compare answers of a session with the library."""
    config = session.description.config
    found = find_model(config)
    geometry = found.geometry
    given = [answer.up_to(found.repository.switch) for answer in given]
    asked = [answer.asked for answer in given]
    model = LibraryModel(open_checkpoint(found.checkpoint.directory), geometry.dtype)
    whole = not model.is_eight_bit and model.float32_bytes <= _MEMORY_SHARE * _free_bytes(session)
    way = "whole" if whole else "layer by layer"
    sides = [
        model.run(
            asked, in_float32=wide, whole=whole, progress=_stage(progress, f"library in {name} ({way})")
        )
        for name, wide in (("float32", True), (model.own_name, False))
    ]
    replays = [own_replay(session)]
    if geometry.dtype != "F32":
        replays.append(float32_replay(session, max(len(rows.token_ids) for rows in asked)))
    compared, report = [], _stage(progress, "comparing")
    for number, answer in enumerate(given):
        report(number, len(given))
        rows = _compare(number, answer, replays, sides)
        compared.append(_audited(answer, rows, session.loaded.tokenizer))
    report(len(given), len(given))
    return AuditReport(
        answers=tuple(compared),
        library_dtype=model.own_name,
        is_float32=geometry.dtype == "F32",
        rounding_ratio=model.rounding_ratio,
        is_exact=session.description.exactness == "exact",
        way=way,
        context=_context(session, config),
    )


def _count_of(config: Config, questions: Sequence[Question]) -> Callable[[ModelTokenizer], WantedTokens]:
    def count(tokenizer: ModelTokenizer) -> WantedTokens:
        run = config.run
        prompts = (
            tokenizer.encode_prompt(question.turns[0], system=run.system, raw=run.raw)
            for question in questions
        )
        return WantedTokens(max(map(len, prompts)), config.audit.tokens)

    return count


def _answers(
    session: Session, config: Config, questions: Sequence[Question], progress: OnProgress
) -> Iterator[GivenAnswer]:
    report = _stage(progress, "answering")
    for number, question in enumerate(questions):
        report(number, len(questions))
        session.reset()
        prompt = session.encode_prompt(question.turns[0], system=config.run.system, raw=config.run.raw)
        pieces = list(session.generate(prompt, max_new_tokens=config.audit.tokens, stop=()))
        token_ids = tuple(token for piece in pieces for token in piece.token_ids)
        yield GivenAnswer(question, tuple(prompt), token_ids, "".join(piece.text for piece in pieces))
    report(len(questions), len(questions))


def _compare(
    number: int, answer: GivenAnswer, replays: Sequence[Replay], sides: Sequence[ReferenceRows]
) -> Iterator[ComparedRow]:
    """Compare one answer, as many rows at a time as a replay gives."""
    reference, library = sides
    first = 0
    # A float32 model's own replay is the one in float32, too.
    for parts in zip(*(replay.logits(answer.prompt, answer.token_ids) for replay in replays), strict=True):
        own, own_float32 = (part.cpu() for part in (parts[0], parts[-1]))
        rows = slice(first, first + len(own))
        logits = RowLogits(own, own_float32, library.logits(number, rows), reference.logits(number, rows))
        yield from compare_rows(answer.token_ids[rows], logits)
        first = rows.stop


def _audited(answer: GivenAnswer, rows: Iterator[ComparedRow], tokenizer: ModelTokenizer) -> AuditedAnswer:
    compared = tuple(rows)
    differences = tuple(
        Difference(
            index,
            len(answer.prompt) + index,
            tokenizer.decode([row.token_id]),
            tokenizer.decode([row.reference_id]),
            row,
        )
        for index, row in enumerate(compared)
        if row.token_id != row.reference_id
    )
    question = answer.question
    return AuditedAnswer(
        question.question_id, question.category, len(answer.prompt), answer.text, compared, differences
    )


def _free_bytes(session: Session) -> int:
    """Host memory that the library may take: what is free, and what `--ram-gb` leaves."""
    free, limit = host_memory().free_bytes, session.description.config.memory.ram_gb
    return free if limit is None else min(free, int(limit * GIB) - session.process_peak_bytes())


def _stage(progress: OnProgress, name: str) -> Callable[[int, int], None]:
    started = time.perf_counter()

    def report(done: int, total: int) -> None:
        progress(AuditProgress(name, done, total, time.perf_counter() - started))

    return report


def _context(session: Session, config: Config) -> dict[str, Any]:
    about = session.description
    return {
        "model": about.model_id,
        "revision": about.revision,
        "dtype": about.dtype,
        "device": about.device,
        "exactness": about.exactness,
        "exactness_reason": about.exactness_reason,
        "threads": about.threads,
        "config": config.as_dict(),
        "versions": about.versions,
    }
