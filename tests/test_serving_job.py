"""Batch jobs without a model: what a line asks for, and the records on the disk."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from subspec_cli.errors import BusyError, IntegrityError, UsageError
from subspec_cli.serving.job import Job, JobLine, PromptBody, open_job, parse_line
from subspec_cli.serving.job_results import JobResults
from subspec_cli.serving.request_body import ChatBody, CompletionBody

IDENTITY = {"input_sha256": "ab", "seed": None, "temperature": 0.5, "stop": ("a",)}


def line_of(values: Any) -> JobLine:
    return parse_line(3, values if isinstance(values, bytes) else json.dumps(values).encode())


def enveloped(url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": url, "body": body}


SAY = [{"role": "user", "content": "Hello"}]


def test_three_forms_of_lines() -> None:
    chat = line_of(enveloped(messages=SAY, max_tokens=5))
    assert isinstance(chat.body, ChatBody)
    assert (chat.custom_id, chat.body.token_limit) == ("a", 5)
    assert isinstance(line_of(enveloped("/v1/completions", prompt=[1, 2])).body, CompletionBody)
    bare = line_of({"prompt": "Hello", "seed": 4})
    assert isinstance(bare.body, PromptBody)
    assert (bare.custom_id, bare.body.seed) == ("line-3", 4)
    assert line_of({"prompt": "Hello", "custom_id": "x"}).custom_id == "x"
    shaped = line_of(
        {"prompt": "Hello", "response_format": {"type": "json_object"}, "max_completion_tokens": 3}
    )
    assert shaped.body is not None
    assert (shaped.body.grammar, shaped.body.token_limit) == (True, 3)
    assert isinstance(line_of({"messages": SAY}).body, ChatBody)


BAD: list[tuple[Any, str | None, str]] = [
    (b"{", None, "not JSON at byte 1"),
    (b"\xff", None, "not UTF-8"),
    (b'{"prompt": "a", "prompt": "b"}', None, "the key 'prompt' twice"),
    ([1], None, "expected a JSON object"),
    ({"prompt": 5}, "line-3", "prompt: Input should be a valid string"),
    ({"prompt": "a", "tempreature": 1}, "line-3", "tempreature: this field is not supported"),
    ({"prompt": "a", "stream": True}, "line-3", "written whole"),
    ({"prompt": "a", "temperature": -1}, "line-3", "temperature: Input should be greater"),
    ({"prompt": "a", "temperature": True}, "line-3", "temperature: Input should be a valid number"),
    (b'{"prompt": "a", "temperature": NaN}', "line-3", "temperature: Input should be a finite number"),
    ({}, "line-3", "prompt: this field is missing"),
    ({"prompt": " "}, "line-3", "the prompt is empty"),
    ({"prompt": "\ud800"}, "line-3", "the line holds \\ud800 alone, which is half of a character"),
    ({"custom_id": "", "prompt": "a"}, None, "custom_id must be a text of 1 to 512 characters"),
    ({"custom_id": 7, "body": {}}, None, "custom_id must be"),
    (enveloped("/v1/embeddings", input="a"), "a", "url must be /v1/chat/completions or /v1/completions"),
    ({**enveloped(messages=SAY), "method": "GET"}, "a", "method must be POST"),
    ({**enveloped(messages=SAY), "priority": 1}, "a", "priority: this field is not supported"),
    ({**enveloped(), "body": None}, "a", "Input should be"),
    (enveloped(messages=[]), "a", "messages: List should have at least 1 item"),
    (enveloped(messages=[{"role": "tool", "content": "a"}]), "a", "messages.0.role: Input should be"),
    (enveloped(messages=SAY, tools=[{"type": "function"}]), "a", "tools: tool calls are not supported"),
    (
        enveloped(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        "a",
        "messages.0.content.0.",
    ),
    (enveloped(messages=SAY, max_tokens=3, max_completion_tokens=4), "a", "differ: give one of them"),
    (enveloped(messages=SAY, top_logprobs=3), "a", "top_logprobs needs logprobs"),
    (enveloped(messages=SAY, n=17), "a", "n: Input should be less than or equal to 16"),
    (enveloped(messages=SAY, stop=["a", ""]), "a", "stop"),
    (enveloped(messages=SAY, logit_bias={"x": 1}), "a", "logit_bias"),
    (enveloped(messages=SAY, seed=2**63), "a", "seed: Input should be less"),
]


@pytest.mark.parametrize(("values", "custom_id", "reason"), BAD)
def test_a_bad_line_says_what_is_wrong(values: Any, custom_id: str | None, reason: str) -> None:
    line = line_of(values)
    assert line.body is None
    assert line.problem is not None
    assert line.custom_id == custom_id
    assert reason in line.problem.message


def test_fields_that_cannot_change_the_text_are_accepted() -> None:
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]}
    ]
    answer = {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None, "annotations": []}
    body = line_of(
        enveloped(
            messages=[*parts, *SAY, answer, *SAY],
            user="me",
            metadata={"a": "b"},
            store=False,
            service_tier="auto",
            tools=[],
            tool_choice="none",
            parallel_tool_calls=True,
            response_format={"type": "text"},
            modalities=["text"],
            temperature=None,
            n=1,
            stop=None,
            logprobs=False,
        )
    ).body
    assert isinstance(body, ChatBody)
    assert body.turns[0] == {"role": "system", "content": "Be kind."}
    assert body.turns[2] == {"role": "assistant", "content": "Hi"}


def job_of(path: Path, *lines: Any) -> Job:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return open_job(path)


def test_a_custom_id_that_came_before_is_a_bad_line(tmp_path: Path) -> None:
    lines = list(job_of(tmp_path / "in", *({"custom_id": name, "prompt": "a"} for name in "xyx")))
    assert [line.problem is None for line in lines] == [True, True, False]
    assert "came before" in str(lines[2].problem)


def test_empty_lines_and_a_byte_order_mark_are_no_requests(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n  \n{"prompt": "b"}')
    job = open_job(path)
    assert job.lines == 2
    assert [(line.number, line.custom_id) for line in job] == [(1, "line-1"), (4, "line-4")]


def test_a_line_that_is_too_long_is_bad_and_the_next_one_is_read(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("subspec_cli.serving.job._MOST_LINE_BYTES", 40)
    first, second = list(job_of(tmp_path / "in", {"prompt": "a" * 200}, {"prompt": "b"}))
    assert "more than" in str(first.problem)
    assert (second.number, second.problem) == (2, None)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_job_without_a_request_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "in"
    path.write_text(content)
    with pytest.raises(UsageError, match="holds no request"):
        open_job(path)
    with pytest.raises(UsageError, match="cannot read"):
        open_job(tmp_path / "none")


GOOD, BAD_LINE = line_of({"prompt": "a"}), parse_line(5, b"{")


def record_of(line: JobLine) -> dict[str, Any]:
    error = None if line.body else {"line": line.number, "message": "bad"}
    return {"custom_id": line.custom_id, "response": {"status_code": 200}, "error": error}


def results_in(folder: Path, **changes: Any) -> JobResults:
    return JobResults(folder / "out", {**IDENTITY, **changes}, fresh_seed=9)


def test_a_job_goes_on_where_it_was(tmp_path: Path) -> None:
    with results_in(tmp_path) as results:
        assert results.identity["seed"] == 9
        for line in (GOOD, BAD_LINE):
            assert not results.has(line)
            results.write(record_of(line))
            assert results.has(line)
    with JobResults(tmp_path / "out", IDENTITY, fresh_seed=77) as results:
        assert results.identity["seed"] == 9, "that of the earlier run"
        assert results.done == 2
        assert results.has(GOOD)
        assert results.has(BAD_LINE)


def test_every_torn_last_line_is_cut(tmp_path: Path) -> None:
    with results_in(tmp_path) as results:
        results.write(record_of(GOOD))
    whole = (tmp_path / "out").read_bytes()
    torn = json.dumps(record_of(BAD_LINE)).encode()
    for length in range(len(torn) + 1):
        (tmp_path / "out").write_bytes(whole + torn[:length])
        with results_in(tmp_path) as results:
            assert results.done == 1
            results.write(record_of(BAD_LINE))
        assert (tmp_path / "out").read_bytes() == whole + torn + b"\n"


@pytest.mark.parametrize("data", [b"{]\n", b"[]\n", b'{"error": {}}\n', b'{"error": null}\n'])
def test_a_damaged_record_in_the_middle_is_refused(tmp_path: Path, data: bytes) -> None:
    with results_in(tmp_path) as results:
        results.write(record_of(GOOD))
    with (tmp_path / "out").open("ab") as file:
        file.write(data)
    before = (tmp_path / "out").read_bytes()
    with pytest.raises(IntegrityError, match="line 2 of"):
        results_in(tmp_path)
    assert (tmp_path / "out").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"input_sha256": "cd"}, "another input_sha256"),
        ({"temperature": 0.7}, "another temperature: 0.5, now 0.7"),
        ({"seed": 10}, "another seed: 9, now 10"),
        ({"new": 1}, "another new"),
        ({"context": 512}, "another context: null, now 512"),
    ],
)
def test_records_of_another_job_are_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    results_in(tmp_path).__exit__(None, None, None)
    with pytest.raises(UsageError, match=reason) as caught:
        results_in(tmp_path, **changes)
    assert "name another file" in caught.value.hint
    results_in(tmp_path, seed=9).__exit__(None, None, None)


def test_a_file_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a diary\n")
    with pytest.raises(UsageError, match="is not of a job"):
        results_in(tmp_path)
    assert (tmp_path / "out").read_text() == "a diary\n"


def test_what_has_just_become_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out")
    with pytest.raises(IntegrityError, match="a named pipe"):
        results_in(tmp_path)


def test_an_empty_file_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    results_in(tmp_path).__exit__(None, None, None)


def _hold(folder: Path, is_held: Any, may_end: Any) -> None:
    with results_in(folder):
        is_held.set()
        may_end.wait()


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    is_held, may_end = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, is_held, may_end))
    other.start()
    try:
        assert is_held.wait(60)
        with pytest.raises(BusyError, match=f"pid {other.pid}"):
            results_in(tmp_path)
    finally:
        may_end.set()
        other.join()
    results_in(tmp_path).__exit__(None, None, None)
