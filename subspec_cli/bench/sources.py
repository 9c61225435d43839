"""Published question sets on the hub: where each is, at which revision, and how a row becomes a prompt.

The sets are the five of the paper that this program implements, and MATH-500. The form of a prompt is the one of
the paper's own evaluation (github.com/NYCU-EDgeAi/subspec, `run/pipelines/benchmarks`), or of Spec-Bench:

- `mt-bench` (Zheng et al. 2023): both turns, as they are.
- `humaneval` (Chen et al. 2021): signature and docstring alone, as in the paper's evaluation.
- `gsm8k` (Cobbe et al. 2021): the question alone, as in Spec-Bench (Xia et al. 2024).
- `alpaca` (Taori et al. 2023): the instruction, and its input, if any, after an empty line: the chat template of the
  model takes the place of Alpaca's own frame.
- `cnn-dm` (Hermann et al. 2015, version 3.0.0): the sentence of the paper's evaluation before the article.
- `math-500` (Lightman et al. 2023): the form of OpenAI's simple-evals, which the paper's evaluation takes.

Revisions are full commits. None is known of MT-Bench's repository: the commit that the hub names at the download goes
into the record, as does the SHA-256 of every file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

Suite = Literal["sample", "mt-bench", "humaneval", "gsm8k", "alpaca", "cnn-dm", "math-500"]
DEFAULT_QUESTIONS: Final = 80
"""Questions of a set of rows unless a limit is given: as many as MT-Bench has, and as Spec-Bench takes of a set."""
_MATH: Final = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $ANSWER (without quotes) where $ANSWER is the answer to the problem.\n\n{problem}\n\n"
    'Remember to put your answer on its own line after "Answer:", and you do not need to use a \\boxed command.'
)


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a dataset on the hub."""

    dataset: str
    name: str
    revision: str | None
    """A full commit; None if none is known."""


@dataclass(frozen=True, slots=True)
class RowForm:
    """How a row of columns becomes a question of one turn."""

    columns: tuple[str, ...]
    """Columns of the prompt; all are text."""
    prompt: Callable[[Mapping[str, str]], str]
    identity: str | None = None
    """Column that names the row; its number if None."""
    category: str | None = None
    """Column of the category; the suite's name if None."""

    @property
    def all_columns(self) -> tuple[str, ...]:
        """Every column that is read."""
        return (*self.columns, *(name for name in (self.identity, self.category) if name is not None))


HUB_FILES: Final[Mapping[Suite, HubFile]] = {
    "mt-bench": HubFile("HuggingFaceH4/mt_bench_prompts", "raw/question.jsonl", None),
    "humaneval": HubFile(
        "openai/openai_humaneval",
        "openai_humaneval/test-00000-of-00001.parquet",
        "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
    ),
    "gsm8k": HubFile(
        "openai/gsm8k", "main/test-00000-of-00001.parquet", "740312add88f781978c0658806c59bc2815b9866"
    ),
    "alpaca": HubFile(
        "tatsu-lab/alpaca",
        "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
        "dce01c9b08f87459cf36a430d809084718273017",
    ),
    "cnn-dm": HubFile(
        "abisee/cnn_dailymail",
        "3.0.0/test-00000-of-00001.parquet",
        "96df5e686bee6baa90b8bee7c28b81fa3fa6223d",
    ),
    "math-500": HubFile("HuggingFaceH4/MATH-500", "test.jsonl", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"),
}
ROW_FORMS: Final[Mapping[Suite, RowForm]] = {
    "humaneval": RowForm(("prompt",), lambda row: row["prompt"], identity="task_id"),
    "gsm8k": RowForm(("question",), lambda row: row["question"]),
    "alpaca": RowForm(
        ("instruction", "input"), lambda row: f"{row['instruction']}\n\n{row['input']}".rstrip()
    ),
    "cnn-dm": RowForm(
        ("article",),
        lambda row: f"Please summarize the following article:\n\n{row['article']}",
        identity="id",
    ),
    "math-500": RowForm(
        ("problem",),
        lambda row: _MATH.format(problem=row["problem"]),
        identity="unique_id",
        category="subject",
    ),
}
