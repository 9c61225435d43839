"""Question sets as JSON lines of two turns each: the shipped sample, and MT-Bench from the hub or a local file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from subspec_cli.errors import IntegrityError, NetworkError, UsageError
from subspec_cli.files.regular_file import read_small_file
from subspec_cli.hub.dataset import download_dataset_file
from subspec_cli.units import printable

_SAMPLE: Final = Path(__file__).with_name("sample.jsonl")
_MT_BENCH: Final = ("HuggingFaceH4/mt_bench_prompts", "raw/question.jsonl")
_MOST_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation to replay."""

    question_id: str
    category: str
    turns: tuple[str, ...]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation with answers that are still empty, up to the last question."""
        asked = [{"role": "user", "content": turn} for turn in self.turns]
        answered = [message for ask in asked[:-1] for message in (ask, {"role": "assistant", "content": ""})]
        return [*answered, asked[-1]]


def load_suite(name: str, questions_file: str | None, limit: int | None) -> tuple[Question, ...]:
    """Return the questions of `sample` or `mt-bench`, or of `questions_file`; at most `limit` over all categories.

    Raises UsageError for a file that is not in the format, the hub's errors when the download fails.
    """
    if questions_file is not None:
        path = Path(questions_file)
    elif name == "sample":
        path = _SAMPLE
    else:
        try:
            path = download_dataset_file(*_MT_BENCH)
        except NetworkError as error:
            others = "--questions FILE reads a local file, subspec bench sample needs none"
            raise NetworkError(error.message, f"{error.hint}; {others}") from error
    questions = read_questions(path)
    return spread_over_categories(questions, limit) if limit is not None else questions


def read_questions(path: Path) -> tuple[Question, ...]:
    """Return all questions of a JSON lines file."""
    try:
        lines = read_small_file(path, _MOST_BYTES).decode("utf-8").splitlines()
    except IntegrityError as error:
        raise UsageError(f"--questions: {error.message}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{printable(str(path))} is not UTF-8 at byte {error.start}") from error
    found = [_question(line, number, path) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise UsageError(f"{printable(str(path))} holds no questions")
    return tuple(found)


def spread_over_categories(questions: tuple[Question, ...], limit: int) -> tuple[Question, ...]:
    """Return `limit` questions, taking categories in turn in the order of their first question."""
    waiting: dict[str, list[Question]] = {}
    for question in questions:
        waiting.setdefault(question.category, []).append(question)
    chosen: list[Question] = []
    while len(chosen) < limit and any(waiting.values()):
        for queue in waiting.values():
            if queue and len(chosen) < limit:
                chosen.append(queue.pop(0))
    return tuple(chosen)


def _question(line: str, number: int, path: Path) -> Question:
    try:
        record: dict[str, Any] = json.loads(line)
        turns = record.get("turns", record.get("prompt"))
        if (
            not isinstance(turns, list)
            or not turns
            or not all(isinstance(t, str) and t.strip() for t in turns)
        ):
            raise ValueError('"turns" must be a list of texts')
        identity = record.get("question_id", record.get("prompt_id", number))
        return Question(str(identity), str(record.get("category", "all")), tuple(turns))
    except (ValueError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{printable(str(path))}, line {number}: {printable(str(error))[:200]}",
            'each line is {"question_id": 1, "category": "writing", "turns": ["...", "..."]}',
        ) from error
