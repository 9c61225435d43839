"""Published question sets: from the hub at their commits, from local files, and files that are damaged."""

from __future__ import annotations

import builtins
import json
from contextlib import suppress

import pytest

from subspec_cli.bench import question_rows
from subspec_cli.bench.sources import HUB_FILES, ROW_FORMS
from subspec_cli.bench.suites import find_suite, load_suite, read_suite
from subspec_cli.errors import NetworkError, UsageError

ROWS = {
    "humaneval": {"task_id": "HumanEval/0", "prompt": "def one():\n", "test": "check"},
    "gsm8k": {"question": "How many?", "answer": "#### 3"},
    "alpaca": {"instruction": "Sort these.", "input": "b, a", "output": "a, b"},
    "cnn-dm": {"id": "f00", "article": "It rained.", "highlights": "Rain."},
    "math-500": {"unique_id": "test/1.json", "subject": "Algebra", "problem": "x=1", "answer": "1"},
}
PROMPTS = {
    "humaneval": "def one():\n",
    "gsm8k": "How many?",
    "alpaca": "Sort these.\n\nb, a",
    "cnn-dm": "Please summarize the following article:\n\nIt rained.",
}


def parquet_file(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def json_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def published(suite, path, rows):
    write = parquet_file if HUB_FILES[suite].name.endswith("parquet") else json_file
    return write(path, rows)


@pytest.mark.parametrize("suite", ROWS)
def test_a_suite_comes_from_the_hub_at_its_commit(server, tmp_path, suite):
    wanted = HUB_FILES[suite]
    content = published(suite, tmp_path / "file", [ROWS[suite]]).read_bytes()
    server.datasets, server.files = {f"datasets/{wanted.dataset}": wanted.revision}, {wanted.name: content}
    found = find_suite(suite, None)
    assert found.as_dict()["revision"] == wanted.revision
    assert len(found.as_dict()["sha256"]) == 64
    assert not [request for request in server.requests if "/resolve/main/" in request]
    (question,) = read_suite(suite, found.path, None)
    assert len(question.turns) == 1
    if suite in PROMPTS:
        assert question.turns == (PROMPTS[suite],)
        assert question.category == suite
    asked = len(server.requests)
    assert load_suite(suite, None, 1) == (question,)
    assert len(server.requests) == asked, "a pinned file in the cache is not asked for again"


def test_the_commit_of_a_suite_that_is_not_pinned_is_the_hubs(server):
    dataset, name = HUB_FILES["mt-bench"].dataset, HUB_FILES["mt-bench"].name
    line = {"question_id": 81, "category": "writing", "turns": ["Hello.", "Again."]}
    server.datasets, server.files = {f"datasets/{dataset}": "ab" * 20}, {name: json.dumps(line).encode()}
    found = find_suite("mt-bench", None)
    assert found.revision == "ab" * 20
    assert read_suite("mt-bench", found.path, None)[0].turns == ("Hello.", "Again.")


def test_revisions_are_full_commits():
    for suite, file in HUB_FILES.items():
        assert (file.revision is None) == (suite == "mt-bench")
        assert file.revision is None or len(bytes.fromhex(file.revision)) == 20


def test_a_hub_that_is_away_is_said(server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library waits between attempts
    server.stop()
    with pytest.raises(NetworkError):
        find_suite("gsm8k", None)


@pytest.mark.parametrize("suite", ROWS)
def test_every_suite_is_read_from_a_local_file_in_either_form(tmp_path, suite):
    row = ROWS[suite]
    from_rows = read_suite(suite, json_file(tmp_path / "rows.jsonl", [row]), None)
    assert from_rows == read_suite(suite, published(suite, tmp_path / "file", [row]), None)
    turns = json_file(tmp_path / "turns.jsonl", [{"turns": list(from_rows[0].turns)}])
    assert load_suite(suite, str(turns), None)[0].turns == from_rows[0].turns


def test_math_is_asked_with_its_form_over_its_subjects(tmp_path):
    rows = [ROWS["math-500"] | {"subject": subject, "problem": "\\frac{1}{2}"} for subject in "AAB"]
    found = read_suite("math-500", json_file(tmp_path / "rows.jsonl", rows), 2)
    assert [question.category for question in found] == ["A", "B"]
    assert found[0].turns[0].startswith("Solve the following math problem step by step.")
    assert "\n\n\\frac{1}{2}\n\n" in found[0].turns[0]


def test_eighty_rows_are_asked_unless_a_limit_is_given(tmp_path):
    file = json_file(tmp_path / "rows.jsonl", [{"question": str(number)} for number in range(100)])
    assert len(read_suite("gsm8k", file, None)) == 80
    assert len(read_suite("gsm8k", file, 90)) == 90
    assert [question.turns for question in read_suite("gsm8k", file, 2)] == [("0",), ("1",)]


def test_an_instruction_without_input_is_asked_alone(tmp_path):
    file = json_file(tmp_path / "rows.jsonl", [{"instruction": "Sing.", "input": ""}])
    assert read_suite("alpaca", file, None)[0].turns == ("Sing.",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "3"}, "column 'question' is missing"),
        ({"question": 3}, "column 'question' is not text but int"),
        ({"question": " "}, "column 'question' is empty"),
        ({"question": "\ud800"}, "column 'question' is not Unicode at letter 0"),
        ({"question": "a" * ((1 << 20) + 1)}, "has 1048577 letters; at most 1048576"),
        ([], "not a JSON object"),
    ],
)
def test_a_bad_row_is_named_with_its_column(tmp_path, row, message):
    file = json_file(tmp_path / "rows.jsonl", [{"question": "fine"}, row])
    with pytest.raises(UsageError, match=message) as caught:
        read_suite("gsm8k", file, None)
    assert "rows.jsonl, line 2: " in caught.value.message


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"answer": "3"}], "has no column 'question'; it has answer"),
        ([{"question": 3}], "column 'question' is not text but int64"),
        ([{"question": "fine"}, {"question": None}], "row 2: column 'question' is missing"),
        ([{"question": "fine"}, {"question": ""}], "row 2: column 'question' is empty"),
    ],
)
def test_a_bad_parquet_file_is_named_with_row_and_column(tmp_path, rows, message):
    with pytest.raises(UsageError, match=message):
        read_suite("gsm8k", parquet_file(tmp_path / "file.parquet", rows), None)


def test_a_damaged_parquet_file_is_no_traceback(tmp_path):
    whole = parquet_file(tmp_path / "file.parquet", [{"question": "How many?" * 100}] * 50).read_bytes()
    for size in (4, 40, len(whole) // 2, len(whole) - 5):
        (tmp_path / "cut.parquet").write_bytes(whole[:size])
        with pytest.raises(UsageError, match=r"cut\.parquet"):
            read_suite("gsm8k", tmp_path / "cut.parquet", None)
    for place in range(4, len(whole) - 8, 7):
        (tmp_path / "bent.parquet").write_bytes(whole[:place] + b"\xff\xff" + whole[place + 2 :])
        with suppress(UsageError):
            read_suite("gsm8k", tmp_path / "bent.parquet", 3)


def test_a_parquet_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    file = parquet_file(tmp_path / "file.parquet", [{"question": "a" * 1000}] * 100)
    monkeypatch.setattr(question_rows, "_MOST_UNPACKED_BYTES", 500)
    with pytest.raises(UsageError, match="row group 0 unpacks to"):
        read_suite("gsm8k", file, None)
    monkeypatch.setattr(question_rows, "_MOST_BYTES", 20)
    with pytest.raises(UsageError, match="bytes; at most"):
        read_suite("gsm8k", file, None)


def test_without_pyarrow_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "file.parquet").write_bytes(b"PAR1")
    imported = builtins.__import__

    def without(name, *how):
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return imported(name, *how)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="which pyarrow reads") as caught:
        read_suite("gsm8k", tmp_path / "file.parquet", None)
    assert caught.value.hint == "pip install 'subspec-cli[suites]'"


def test_parquet_is_not_taken_for_conversations(tmp_path):
    (tmp_path / "file.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match="mt-bench is read from JSON lines"):
        read_suite("mt-bench", tmp_path / "file.parquet", None)


def test_all_columns_of_a_form_are_read():
    assert ROW_FORMS["math-500"].all_columns == ("problem", "unique_id", "subject")
