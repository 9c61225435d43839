"""Question sets: the shipped sample, the published sets of `sources`, and local files of either form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from subspec_cli.bench.question_rows import is_parquet, json_rows, parquet_rows, text_of
from subspec_cli.bench.sources import DEFAULT_QUESTIONS, HUB_FILES, ROW_FORMS, RowForm, Suite
from subspec_cli.errors import NetworkError, UsageError
from subspec_cli.files.regular_file import sha256_file
from subspec_cli.hub.dataset import download_dataset_file
from subspec_cli.units import printable

_SAMPLE: Final = Path(__file__).with_name("sample.jsonl")
_HINT: Final = 'each line is {"question_id": 1, "category": "writing", "turns": ["...", "..."]}'


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


@dataclass(frozen=True, slots=True)
class SuiteFile:
    """The file of a suite, and where it is from."""

    path: Path
    dataset: str | None = None
    name: str | None = None
    revision: str | None = None
    """The commit of the dataset, as the hub named it."""

    def as_dict(self) -> dict[str, str | None]:
        """Plain values for JSON."""
        return {
            "dataset": self.dataset,
            "file": self.name or self.path.name,
            "revision": self.revision,
            "sha256": sha256_file(self.path),
        }


def load_suite(name: Suite, questions_file: str | None, limit: int | None) -> tuple[Question, ...]:
    """Return the questions of a suite, or of `questions_file` in the suite's form; errors as of the two steps."""
    return read_suite(name, find_suite(name, questions_file).path, limit)


def find_suite(name: Suite, questions_file: str | None) -> SuiteFile:
    """Return the local file, or the suite's own, downloaded unless it is cached.

    Raises the hub's errors when the download fails.
    """
    if questions_file is not None:
        return SuiteFile(Path(questions_file))
    if name == "sample":
        return SuiteFile(_SAMPLE)
    wanted = HUB_FILES[name]
    try:
        path, commit = download_dataset_file(wanted.dataset, wanted.name, wanted.revision)
    except NetworkError as error:
        others = "--questions FILE reads a local file, subspec bench sample needs none"
        raise NetworkError(error.message, f"{error.hint}; {others}") from error
    return SuiteFile(path, wanted.dataset, wanted.name, commit)


def read_suite(name: Suite, path: Path, limit: int | None) -> tuple[Question, ...]:
    """Return at most `limit` questions over all categories; 80 of a suite of rows without a limit.

    Raises UsageError for a file that is not in the format.
    """
    form = ROW_FORMS.get(name)
    if form is not None:
        limit = limit or DEFAULT_QUESTIONS
    if is_parquet(path):
        if form is None:
            raise UsageError(
                f"{printable(str(path))} is a parquet file; {name} is read from JSON lines", _HINT
            )
        rows: Iterable[tuple[str, dict[str, Any]]] = parquet_rows(path, form.all_columns)
    else:
        rows = json_rows(path)
    if form is not None and form.category is None:
        rows = islice(rows, limit)  # one category: the first rows, without reading the rest
    found = tuple(_question(name, form, where, row) for where, row in rows)
    if not found:
        raise UsageError(f"{printable(str(path))} holds no questions")
    return spread_over_categories(found, limit) if limit is not None else found


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


def _question(name: Suite, form: RowForm | None, where: str, row: Mapping[str, Any]) -> Question:
    if form is not None and "turns" not in row:
        return _question_of_columns(name, form, where, row)
    # The hub's MT-Bench has `turns` in one of its files and `prompt` in another.
    turns = row.get("turns", row.get("prompt"))
    if not isinstance(turns, list) or not turns:
        raise UsageError(f'{where}: "turns" must be a list of texts', _HINT)
    texts = tuple(text_of({"turns": turn}, "turns", where) for turn in turns)
    identity = row.get("question_id", row.get("prompt_id", where.rpartition(" ")[2]))
    return Question(str(identity), str(row.get("category", "all")), texts)


def _question_of_columns(name: Suite, form: RowForm, where: str, row: Mapping[str, Any]) -> Question:
    texts = {
        # Only the first column must say something: most instructions of Alpaca have no input.
        column: text_of(row, column, where, may_be_empty=column != form.columns[0])
        for column in form.all_columns
    }
    identity = where.rpartition(" ")[2] if form.identity is None else texts[form.identity]
    category = name if form.category is None else texts[form.category]
    return Question(identity, category, (form.prompt(texts),))
