"""Lines over replicas that die at random moments, without Ray: nothing lost, nothing doubled, bounded on the way."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from subspec_cli.errors import IntegrityError, ResourceError, UsageError
from subspec_cli.serving import dispatch
from subspec_cli.serving.batch import BatchProgress
from subspec_cli.serving.dispatch import Answered, Dispatcher, Event, Lost, Ready, most_held
from subspec_cli.serving.job import Job, JobLine, open_job
from subspec_cli.serving.job_results import JobResults
from subspec_cli.serving.line_answers import LineResult
from subspec_cli.serving.replica import Place, ReplicaFacts

PLACE = Place("here", "machine", "a processor", 4, 8 << 30, 16 << 30)
PARALLEL = 3


def facts(**changes: Any) -> ReplicaFacts:
    values = {
        "revision": "a",
        "dtype": "bf16",
        "device": "cpu",
        "exactness": "exact",
        "context_tokens": 512,
        "threads": 1,
        "versions": {"torch": "2"},
        "plan": SimpleNamespace(sequences=PARALLEL),
    }
    return ReplicaFacts(PLACE, SimpleNamespace(**values | changes))  # type: ignore[arg-type]


def result_of(line: JobLine) -> LineResult:
    record = {"custom_id": line.custom_id, "response": {"status_code": 200}, "error": None}
    return LineResult(line.number, record, is_refused=False, new_tokens=5)


class FakePool:
    """Replicas that load, answer in any order, and die, as chance has it."""

    def __init__(self, chance: random.Random, *, death: float) -> None:
        self.chance = chance
        self.death = death
        self.loading: list[int] = []
        self.held: dict[int, list[JobLine]] = {}
        self.calls: dict[int, int] = {}
        self.answered = 0
        self.deaths = 0
        self.seeds: set[int] = set()

    def start(self, replica: int) -> None:
        assert replica not in self.loading
        assert replica not in self.held
        self.loading.append(replica)

    def work(self, replica: int, lines: list[JobLine], seed: int) -> None:
        held = self.held[replica]
        held += lines
        self.calls[replica] += 1
        self.seeds.add(seed)
        assert held, "nothing to do is not handed out"
        assert len(held) <= most_held(PARALLEL)
        numbers = [line.number for each in self.held.values() for line in each]
        assert len(numbers) == len(set(numbers)), "no line is at two replicas"

    def events(self) -> list[Event]:
        able = [*self.loading, *(number for number, calls in self.calls.items() if calls)]
        assert able, "the dispatcher waits for nothing"
        return [
            event for number in self.chance.sample(able, k=min(len(able), 2)) for event in self.step(number)
        ]

    def step(self, number: int) -> list[Event]:
        if self.chance.random() < self.death:
            self.deaths += 1
            self.held.pop(number, None)
            self.calls.pop(number, None)
            self.loading = [each for each in self.loading if each != number]
            return [Lost(number, "killed")]
        if number in self.loading:
            self.loading.remove(number)
            self.held[number], self.calls[number] = [], 0
            return [Ready(number, facts())]
        self.calls[number] -= 1
        held = self.held[number]
        done = [line for line in held[:PARALLEL] if self.chance.random() < 0.4]
        self.held[number] = [line for line in held if line not in done]
        self.answered += len(done)
        return [Answered(number, tuple(map(result_of, done)), len(held) - len(done), 7, 1000)]


def job_of(folder: Path, lines: int) -> Job:
    path = folder / "in"
    path.write_text("".join(json.dumps({"prompt": "a" * (1 + number % 9)}) + "\n" for number in range(lines)))
    return open_job(path)


def records_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out").read_text().splitlines()]


def run(folder: Path, pool: FakePool, *, lines: int = 40, replicas: int = 3) -> BatchProgress:
    dispatcher = Dispatcher(pool, replicas, lambda state: None)
    dispatcher.start()
    with JobResults(folder / "out", {"seed": 11}, fresh_seed=0) as results:
        dispatcher.run(job_of(folder, lines), results)
    return dispatcher.progress


@pytest.mark.parametrize("seed", range(40))
def test_every_line_has_one_record_whatever_dies(seed: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(dispatch, "MOST_LOSSES", 10_000)
    chance = random.Random(seed)
    pool = FakePool(chance, death=chance.choice([0.0, 0.05, 0.3]))
    progress = run(tmp_path, pool, replicas=chance.randint(1, 5))
    ids = [record["custom_id"] for record in records_in(tmp_path)]
    assert sorted(ids) == sorted(f"line-{number}" for number in range(1, 41))
    assert (progress.written, progress.done_tokens, progress.restarts) == (40, 200, pool.deaths)
    assert pool.answered == 40
    assert pool.seeds == {11}


def test_a_job_that_was_stopped_goes_on_with_the_rest(tmp_path: Path) -> None:
    class Stopped(FakePool):
        def events(self) -> list[Event]:
            if self.answered > 12:
                raise KeyboardInterrupt
            return super().events()

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Stopped(random.Random(1), death=0))
    before = records_in(tmp_path)
    assert 0 < len(before) < 40
    progress = run(tmp_path, FakePool(random.Random(2), death=0))
    assert progress.known == len(before)
    assert len({record["custom_id"] for record in records_in(tmp_path)}) == 40 == len(records_in(tmp_path))


def test_what_every_replica_would_fail_with_ends_the_job(tmp_path: Path) -> None:
    class Damaged(FakePool):
        def events(self) -> list[Event]:
            if self.answered > 12:
                raise IntegrityError("layer 3 is damaged")
            return super().events()

    pool = Damaged(random.Random(1), death=0)
    with pytest.raises(IntegrityError, match="layer 3"):
        run(tmp_path, pool)
    assert 12 < len(records_in(tmp_path)) <= pool.answered


def test_a_replica_that_never_answers_is_given_up(tmp_path: Path) -> None:
    pool = FakePool(random.Random(1), death=1.0)
    with pytest.raises(ResourceError, match="died 3 times without an answer: killed"):
        run(tmp_path, pool)
    assert pool.deaths <= 3 * 3


def test_a_line_that_kills_every_replica_is_given_up(tmp_path: Path) -> None:
    class Poisoned(FakePool):
        def step(self, number: int) -> list[Event]:
            self.death = float(any(line.number == 20 for line in self.held.get(number, ())))
            return super().step(number)

    pool = Poisoned(random.Random(1), death=0)
    with pytest.raises(ResourceError, match=r"3 replicas died over line|3 times without an answer"):
        run(tmp_path, pool)
    assert pool.deaths == 3
    assert len(records_in(tmp_path)) >= 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"revision": "b"}, "revision: b and a"),
        ({"context_tokens": 256}, "context: 256 and 512"),
        ({"threads": 2}, "threads: 2 and 1"),
        ({"exactness": "approximate"}, "exactness"),
        ({"versions": {"torch": "3"}}, "libraries"),
    ],
)
def test_replicas_that_would_answer_otherwise_are_refused(change: dict[str, Any], words: str) -> None:
    facts().check_like(facts())
    other = dataclasses.replace(facts(**change), place=dataclasses.replace(PLACE, host="there"))
    with pytest.raises(UsageError, match="on there and here differ in") as caught:
        other.check_like(facts())
    assert words in caught.value.message


def test_most_held_is_a_little_more_than_the_places() -> None:
    assert [most_held(parallel) for parallel in (1, 2, 4, 5, 64)] == [2, 3, 5, 7, 80]
