"""Batch jobs over a tiny model: each record is the answer alone, and every request has exactly one after any stop."""

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path
from typing import Any

import fakes_session
import pytest
import tiny_models
import torch
from fakes_session import Shelf, answer_to, open_tiny

from subspec_cli.__main__ import main
from subspec_cli.serving.batch import BatchProgress, BatchRun, longest_request
from subspec_cli.serving.job import Job, open_job
from subspec_cli.serving.job_results import JobResults
from subspec_cli.session.session import Session

shelf = fakes_session.shelf
one_thread = tiny_models.one_thread
SAY = [{"role": "user", "content": "Rivers"}]


def model_of(shelf: Shelf) -> Path:
    return shelf.model("qwen2", dtype=torch.bfloat16, tied=False, eos_token_id=258)


LINES: list[Any] = [
    {"prompt": "Why is the sky blue?", "max_tokens": 12},
    {"custom_id": "warm", "prompt": "Rivers", "temperature": 1.0, "seed": 5, "max_tokens": 20},
    {
        "custom_id": "two",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "messages": SAY,
            "n": 2,
            "temperature": 0.9,
            "max_tokens": 9,
            "logprobs": True,
            "top_logprobs": 2,
        },
    },
    {"custom_id": "two", "prompt": "again"},
    {
        "custom_id": "raw",
        "url": "/v1/completions",
        "body": {"prompt": [[9, 8], [5, 6, 7]], "max_tokens": 7, "logprobs": 1},
    },
    {"custom_id": "long", "prompt": "word " * 2000},
    {"custom_id": "other", "prompt": "a", "model": "gpt-4"},
    {"custom_id": "stop", "messages": SAY, "stop": ["e"], "max_tokens": 30},
    {"nonsense": 1},
]
ANSWERED = {"line-1", "warm", "two", "raw", "stop"}


def job_in(folder: Path) -> Job:
    (folder / "in").write_text("\n".join(json.dumps(line) for line in LINES) + "\n{torn\n")
    return open_job(folder / "in")


class Stop(Exception):
    pass


def run(
    session: Session, job: Job, path: Path, *, stop_after: int | None = None, seed: int | None = 3
) -> BatchProgress:
    """Run a job; a stop comes at the call of the report of that number."""
    calls = 0

    def report(_: BatchProgress) -> None:
        nonlocal calls
        calls += 1
        if calls == stop_after:
            raise Stop

    with JobResults(path, {"input_sha256": job.sha256, "seed": seed}, fresh_seed=1) as results:
        batch = BatchRun(session, job, results, report)
        batch.run()
        return batch.progress


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(path: Path) -> dict[Any, Any]:
    """What must not depend on company or interruptions, by id and place of the error."""
    found = {}
    for record in records(path):
        key = (record["custom_id"], record["error"] and record["error"]["line"])
        assert key not in found
        choices = record["response"]["body"].get("choices", [])
        found[key] = [(each.get("text", each.get("message")), each["finish_reason"]) for each in choices]
    return found


def test_a_job_is_answered_as_alone_and_goes_on_after_any_stop(shelf: Shelf, tmp_path: Path) -> None:
    job = job_in(tmp_path)
    with open_tiny(model_of(shelf), memory={"context": 512}, parallel=3) as session:
        progress = run(session, job, tmp_path / "whole")
        whole = texts(tmp_path / "whole")
        assert (progress.written, progress.refused) == (len(LINES) + 1, 5)
        assert {key for key, line in whole if line is None} == ANSWERED
        for chance in map(random.Random, range(4)):
            path = tmp_path / f"stopped-{chance.random()}"
            for _ in range(4):
                with contextlib.suppress(Stop):
                    run(session, job, path, stop_after=chance.randrange(1, 14))
            run(session, job, path)
            assert texts(path) == whole


def test_a_seed_gives_what_run_gives(shelf: Shelf, tmp_path: Path) -> None:
    job = job_in(tmp_path)
    with open_tiny(model_of(shelf), memory={"context": 512}, parallel=2) as session:
        run(session, job, tmp_path / "out")
        body = next(each for each in records(tmp_path / "out") if each["custom_id"] == "warm")["response"][
            "body"
        ]
    with open_tiny(model_of(shelf), sampling={"temperature": 1.0}, memory={"context": 512}) as session:
        alone = answer_to(session, "Rivers", 20, seed=5, plain=True)
    assert body["choices"][0]["message"]["content"] == alone.text
    assert body["choices"][0]["finish_reason"] == alone.finish_reason
    assert body["usage"]["completion_tokens"] == len(alone.token_ids)
    assert body["subspec"]["seed"] == 5


def test_a_line_without_a_seed_gets_one_from_the_jobs_and_its_id(shelf: Shelf, tmp_path: Path) -> None:
    def one(name: str, custom_id: str, seed: int) -> str:
        (tmp_path / name).write_text(
            json.dumps({"custom_id": custom_id, "prompt": "a", "temperature": 1.0, "max_tokens": 12})
        )
        run(session, open_job(tmp_path / name), tmp_path / f"{name}.out", seed=seed)
        (record,) = records(tmp_path / f"{name}.out")
        return str(record["response"]["body"]["choices"][0]["message"]["content"])

    with open_tiny(model_of(shelf), memory={"context": 512}, parallel=2) as session:
        first = one("1", "x", 3)
        assert one("2", "x", 3) == first
        assert one("3", "y", 3) != first
        assert one("4", "x", 4) != first


def test_records_have_the_form_of_the_api(shelf: Shelf, tmp_path: Path) -> None:
    job = job_in(tmp_path)
    with open_tiny(model_of(shelf), memory={"context": 512}, parallel=2) as session:
        run(session, job, tmp_path / "out")
    found = {record["custom_id"]: record for record in records(tmp_path / "out") if not record["error"]}
    two = found["two"]["response"]
    assert two["status_code"] == 200
    assert [each["index"] for each in two["body"]["choices"]] == [0, 1]
    assert two["body"]["choices"][0]["message"] != two["body"]["choices"][1]["message"]
    content = two["body"]["choices"][0]["logprobs"]["content"]
    assert len(content) == 9 or two["body"]["choices"][0]["finish_reason"] == "stop"
    assert all(len(each["top_logprobs"]) == 2 for each in content)
    raw = found["raw"]["response"]["body"]
    assert raw["object"] == "text_completion"
    assert len(raw["choices"]) == 2
    assert len(raw["choices"][0]["logprobs"]["tokens"]) == len(
        raw["choices"][0]["logprobs"]["token_logprobs"]
    )
    usage = raw["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    refused = {record["error"]["line"]: record for record in records(tmp_path / "out") if record["error"]}
    assert refused[4]["custom_id"] == "two"
    assert "came before" in refused[4]["error"]["message"]
    assert refused[6]["error"]["code"] == "context_length_exceeded"
    assert refused[7]["error"]["code"] == "model_not_found"
    assert refused[10]["custom_id"] is None
    assert all(record["response"]["status_code"] == 400 for record in refused.values())


def test_the_plan_is_made_for_the_longest_request(tmp_path: Path) -> None:
    class Words:
        def encode_prompt(self, text: str, **_: Any) -> list[int]:
            assert len(text) < 200_000, "a text that cannot fit is not counted, which takes gigabytes"
            return [0] * len(text.split())

        def encode_messages(self, turns: Any) -> list[int]:
            return [0] * sum(len(turn["content"].split()) for turn in turns)

        def encode(self, text: str) -> list[int]:
            return [0] * len(text.split())

    def wanted(*lines: Any) -> Any:
        (tmp_path / "in").write_text("\n".join(json.dumps(line) for line in lines))
        tokenizer: Any = Words()
        longest = longest_request(open_job(tmp_path / "in"), system=None, raw=False, answer_tokens=100)
        return longest.tokens(tokenizer)

    found = wanted({"prompt": "a b c", "max_tokens": 7}, {"prompt": "a " * 9}, {"bad": 1}, {"messages": SAY})
    assert (found.prompt, found.answer) == (9, 100)
    assert wanted({"prompt": "a " * 5000}) is None, "the plan trades context against speed"
    assert wanted({"prompt": "a " * 500_000}) is None
    several = {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": ["abc" * 20_000] * 3}}
    assert wanted(several).prompt == 1, "each prompt has a context of its own"
    assert wanted({"bad": 1}) is None


def test_the_command_answers_and_says_what_it_did(
    shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_in(tmp_path)
    where = ("--model", str(model_of(shelf)), "--memory-gb", "1", "--device", "cpu", "--context", "512")
    argv = ["batch", str(tmp_path / "in"), str(tmp_path / "out"), *where, "--parallel", "2", "--seed", "3"]
    assert main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert (document["written"], document["refused"], document["parallel"]) == (10, 5, 2)
    assert "10 requests, 5 of them refused" in err
    before = (tmp_path / "out").read_bytes()
    assert main(argv) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "out").read_bytes() == before
    assert main([*argv, "--temperature", "1"]) == 2
    assert "another temperature" in capsys.readouterr().err


def test_a_job_goes_on_with_the_context_that_it_began_with(
    shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_in(tmp_path)
    where = ("--model", str(model_of(shelf)), "--memory-gb", "1", "--device", "cpu", "--seed", "3")
    argv = ["batch", str(tmp_path / "in"), str(tmp_path / "out"), *where]
    assert main([*argv, "--context", "384"]) == 0
    assert main(argv) == 0, "the context is that of the earlier run"
    capsys.readouterr()
    assert main([*argv, "--context", "512"]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "another context: 384, now 512" in err
    assert "--context 384 goes on" in err


@pytest.mark.parametrize(
    ("requests", "results", "reason"),
    [
        ("none", "out", "cannot read"),
        ("in", "in", "would overwrite"),
        ("in", "no/out", "no is no directory that you can write"),
        ("in", ".", "is a directory"),
        ("in", "pipe", "is a named pipe"),
        ("in", "full", "is a character device"),
        ("in", "link", "is a link to /"),
        ("in", "a" * 300, "File name too long"),
    ],
)
def test_bad_paths_are_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], requests: str, results: str, reason: str
) -> None:
    job_in(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "full").symlink_to("/dev/full")
    (tmp_path / "link").symlink_to(tmp_path / "somewhere")
    before = sorted(tmp_path.iterdir())
    assert main(["batch", str(tmp_path / requests), str(tmp_path / results)]) == 2
    assert reason in " ".join(capsys.readouterr().err.split())
    assert sorted(tmp_path.iterdir()) == before


def test_results_in_a_place_that_cannot_be_written_are_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job_in(tmp_path)
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and may(path, mode))
    assert main(["batch", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "is no directory that you can write" in err
    assert "HOME" not in err
    monkeypatch.undo()
    assert main(["batch", str(tmp_path / "in"), "-"]) == 2
    assert "not to stdout" in capsys.readouterr().err
