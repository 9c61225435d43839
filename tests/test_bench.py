"""The bench room over a real tiny model: suites, both arms, interruption, and what identical means."""

from __future__ import annotations

import dataclasses
import json

import pytest
from tiny_models import open_tokenizer

from subspec_cli.bench import runner, suites
from subspec_cli.bench.answers import AnswerPair, ArmAnswer
from subspec_cli.bench.figures import Spread
from subspec_cli.bench.report import BenchReport
from subspec_cli.bench.runner import run_bench
from subspec_cli.bench.suites import load_suite, read_suite
from subspec_cli.cli.comparison_text import summary_lines
from subspec_cli.cli.documents import bench_document
from subspec_cli.cli.output import as_json
from subspec_cli.config_file import resolve_config
from subspec_cli.errors import NetworkError, UsageError
from subspec_cli.metrics import GenerationStats

pytestmark = pytest.mark.usefixtures("attention_checked_once")

TURNS = ["Tell me more.", "And then?"]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    records = [{"question_id": n, "category": f"c{n % 2}", "turns": TURNS} for n in range(4)]
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def bench(shelf, questions, progress=lambda state: None, *, memory=None, **lengths):
    flags = {
        "model": {"model": str(shelf.model("qwen2"))},
        "memory": {"vram_gb": 1.0, "device": "cpu", "resident_layers": 0} | (memory or {}),
        "sampling": {"seed": 3},
        "bench": {"questions": str(questions), "limit": 2, "max_new_tokens": 10} | lengths,
    }
    return run_bench(resolve_config(flags), "mt-bench", progress=progress)


def test_both_arms_answer_every_turn_alike(shelf, questions):
    seen = []
    report = bench(shelf, questions, seen.append)
    assert [row.category for row in report.rows] == ["c0", "c1", "all"]
    total = report.rows[-1]
    assert (total.answers, total.identical, report.interrupted) == (4, 4, False)
    assert report.exactness == "exact"
    assert report.speculation
    assert all(pair.speculative.stats.drafted_tokens > 0 for pair in report.pairs)
    assert all(pair.plain.stats.drafted_tokens == 0 for pair in report.pairs)
    assert [(item.when, item.question_id) for item in report.best_plain] == [
        ("before", "0"),
        ("before", "1"),
        ("after", "0"),
        ("after", "1"),
    ]
    assert (seen[-1].done, seen[-1].total) == (11, 12), "the last word is said before the last answer"
    document = json.loads(json.dumps(bench_document(report)))
    assert len(document["answers"]) == 4
    assert document["versions"].keys() > {"subspec", "torch", "numpy"}
    assert document["record"].keys() > {"kind", "date", "host", "cpu", "cores", "command"}
    assert all(document["record"][key] for key in ("date", "cpu", "cores", "command"))
    beside = document["predicted_beside_measured"]
    assert beside["predicted_pass_s"] == pytest.approx(document["plan"]["prediction"]["pass_s"])
    speculative = [pair.speculative.stats for pair in report.pairs]
    passes = sum(stats.passes for stats in speculative)
    assert beside["cached_rows"] == sum(stats.cached_rows for stats in speculative) / passes
    prompts = [stats.prompt_tokens for stats in speculative]
    assert min(prompts) <= beside["cached_rows"] <= max(prompts) + 10
    (found,) = document["by_cached_rows"]
    assert found["passes"] == passes
    assert found["tokens"] == sum(stats.new_tokens - 1 for stats in speculative)
    assert any(
        f"tau {found['tokens_per_pass']:.2f} in {passes} passes" in line for line in summary_lines(report)
    )
    assert beside["pass_s"] > 0
    assert beside["tok_per_s"] == pytest.approx(total.measured["speculative_tok_per_s"].median)
    assert any(line.startswith("predicted (assumed costs) | measured") for line in summary_lines(report))


def test_the_context_holds_the_longest_conversation(shelf, questions):
    asked = [{"role": "user", "content": TURNS[0]}, {"role": "assistant", "content": ""}]
    asked.append({"role": "user", "content": TURNS[1]})
    assert read_suite("mt-bench", questions, None)[0].messages == asked
    wanted = len(open_tokenizer(shelf.model("qwen2")).encode_messages(asked)) + 60 + 75
    report = bench(shelf, questions, max_new_tokens=60, limit=1)
    assert report.plan.context == report.best_plain_plan.context == -(-wanted // 64) * 64
    assert bench(shelf, questions, memory={"context": 300}, limit=1).plan.context == 300


def test_each_arm_reads_every_turn_from_an_empty_cache(shelf, questions):
    pairs = bench(shelf, questions).pairs
    for stats in (arm.stats for pair in pairs for arm in (pair.plain, pair.speculative)):
        assert stats.prefilled_tokens == stats.prompt_tokens
    assert pairs[1].plain.stats.prompt_tokens == pairs[1].speculative.stats.prompt_tokens


def test_arms_alternate_turn_by_turn_in_both_orders(shelf, questions):
    seen = []
    report = bench(shelf, questions, seen.append, repeat=2)
    arms = [state.status.split(", ")[1].split(":")[0] for state in seen if state.status[:2] in ("c0", "c1")]
    plain_first, speculative_first = ["plain", "speculative"], ["speculative", "plain"]
    even, odd = 2 * plain_first, 2 * speculative_first
    assert arms == [*even, *odd, *odd, *even]
    assert [(pair.repetition, pair.question_id, pair.turn) for pair in report.pairs] == [
        (repetition, question, turn) for repetition in (1, 2) for question in "01" for turn in (1, 2)
    ]
    first, again = report.pairs[:4], report.pairs[4:]
    assert [pair.plain.token_ids for pair in first] == [pair.plain.token_ids for pair in again]
    assert report.rows[-1].answers == 8


def test_the_first_answer_of_a_session_warms_up_and_does_not_count(shelf, questions):
    seen = []
    bench(shelf, questions, seen.append, limit=1)
    said = [(state.status, state.done) for state in seen if state.status == "warming up"]
    assert said == [("warming up", 0), ("warming up", 1), ("warming up", 5)]


def pair_at(repetition, plain_s, speculative_s):
    arms = [
        ArmAnswer((), "", "stop", GenerationStats(new_tokens=11, decode_time_s=seconds, passes=passes))
        for seconds, passes in ((plain_s, 10), (speculative_s, 2))
    ]
    return AnswerPair("1", "c", 1, *arms, repetition)


def report_of(*pairs):
    return BenchReport("sample", pairs, (), None, "exact", True, False, {})


def test_figures_are_medians_over_repetitions_with_their_range():
    row = report_of(pair_at(1, 10.0, 5.0), pair_at(2, 10.0, 2.5), pair_at(3, 20.0, 2.5)).rows[-1]
    assert row.measured["plain_tok_per_s"] == Spread(1.0, 0.5, 1.0)
    assert row.measured["speculative_tok_per_s"] == Spread(4.0, 2.0, 4.0)
    assert row.measured["speedup_same_plan"] == Spread(4.0, 2.0, 8.0)
    assert "speedup" not in row.measured


def test_a_repetition_that_was_cut_short_does_not_count():
    whole = [pair_at(1, 10.0, 5.0), pair_at(1, 10.0, 5.0)]
    row = report_of(*whole, pair_at(2, 10.0, 1.0)).rows[-1]
    assert row.measured["speculative_tok_per_s"] == Spread(2.0, 2.0, 2.0)
    assert row.answers == 3


def test_a_shortened_plain_arm_stays_comparable(shelf, questions):
    report = bench(shelf, questions, plain_tokens=3)
    assert all(len(pair.plain.token_ids) <= 3 for pair in report.pairs)
    for pair in report.pairs:
        assert pair.plain.stats.prompt_tokens == pair.speculative.stats.prompt_tokens
    assert report.rows[-1].identical == 4


def test_a_machine_that_is_to_be_timed_anew_is_timed_once(shelf, questions, monkeypatch):
    """Both arms go by the same costs; what was timed last would be kept for later runs, too."""
    asked, open_session = [], runner.open_session

    def logged(config, reporter, **how):
        asked.append(config.memory.reprobe)
        return open_session(config, reporter, **how)

    monkeypatch.setattr(runner, "open_session", logged)
    bench(shelf, questions, memory={"reprobe": True}, limit=1)
    assert asked == [True, False, False]


def test_ctrl_c_keeps_what_is_done(shelf, questions):
    def stop(state):
        if state.done == 7:
            raise KeyboardInterrupt

    report = bench(shelf, questions, stop)
    assert report.interrupted
    assert len(report.pairs) == 2
    assert {item.when for item in report.best_plain} == {"before"}


@pytest.fixture
def interrupted(shelf, questions, tmp_path):
    """A record with two of four pairs, and what those pairs are."""

    def stop(state):
        if state.done == 7:
            raise KeyboardInterrupt

    report = bench(shelf, questions, stop)
    path = tmp_path / "record.json"
    path.write_text(as_json(bench_document(report)))
    return path, report


def test_an_interrupted_run_goes_on_where_it_stopped(shelf, questions, interrupted):
    path, before = interrupted
    seen = []
    after = bench(shelf, questions, seen.append, resume=str(path))
    assert len(before.pairs) == 2
    assert after.pairs[:2] == tuple(
        dataclasses.replace(
            pair,
            plain=forgetful(pair.plain),
            speculative=forgetful(pair.speculative),
        )
        for pair in before.pairs
    )
    assert [item.when for item in after.best_plain] == ["before", "before", "after", "after"]
    assert not after.interrupted
    assert sum(state.status.startswith("c0, ") for state in seen) == 0
    assert (seen[-1].done, seen[-1].total) == (11, 12)
    whole = bench(shelf, questions)
    assert [pair.plain.token_ids for pair in after.pairs] == [pair.plain.token_ids for pair in whole.pairs]
    assert after.link.streamed_bytes == whole.link.streamed_bytes


def forgetful(answer):
    """An answer without what only the live display needs, which records leave out."""
    return dataclasses.replace(answer, stats=dataclasses.replace(answer.stats, recent_accepted=()))


@pytest.mark.parametrize(
    ("lengths", "difference"),
    [
        ({"max_new_tokens": 9}, "bench.max_new_tokens: 10 and 9"),
        ({"limit": 1}, "bench.limit: 2 and 1"),
        ({"repeat": 2}, "bench.repeat: 1 and 2"),
    ],
)
def test_other_settings_are_not_mixed_into_a_record(shelf, questions, interrupted, lengths, difference):
    with pytest.raises(UsageError, match=difference):
        bench(shelf, questions, resume=str(interrupted[0]), **lengths)


def test_a_record_that_does_not_fit_is_refused(shelf, questions, interrupted):
    path, _ = interrupted
    document = json.loads(path.read_text())
    for changed, message in [
        ({"interrupted": False}, "the record is complete"),
        ({"answers": [{}]}, "the record was changed"),
        ({"versions": document["versions"] | {"torch": "1"}}, "version of torch: 1 and"),
        ({"revision": "other"}, "revision was other in the record"),
    ]:
        path.write_text(json.dumps(document | changed))
        with pytest.raises(UsageError, match=message):
            bench(shelf, questions, resume=str(path))


@pytest.mark.parametrize(
    ("plain", "finish", "speculative", "same"),
    [
        ((1, 2, 3), "stop", (1, 2, 3), True),
        ((1, 2), "stop", (1, 2, 3), False),
        ((1, 2), "length", (1, 2, 3), True),
        ((1, 9), "length", (1, 2, 3), False),
        ((1, 2, 3), "length", (1, 2), False),
    ],
)
def test_identical_means_token_for_token(plain, finish, speculative, same):
    arms = [ArmAnswer(ids, "", finish, GenerationStats()) for ids in (plain, speculative)]
    assert AnswerPair("1", "c", 1, *arms).identical is same


def test_sample_suite_and_its_limit():
    suite = load_suite("sample", None, None)
    assert len(suite) == 16
    assert all(len(question.turns) == 2 for question in suite)
    assert len({question.category for question in load_suite("sample", None, 8)}) == 8


@pytest.mark.parametrize("line", ["{", "[]", '{"turns": "x"}', '{"turns": []}', '{"turns": [" "]}'])
def test_bad_questions_name_file_and_line(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"turns": ["fine"]}\n' + line)
    with pytest.raises(UsageError, match=r"bad\.jsonl, line 2"):
        read_suite("mt-bench", path, None)


def test_offline_a_suite_names_what_needs_no_hub(monkeypatch):
    def fail(*wanted):
        raise NetworkError("cannot reach the hub", "check the connection")

    monkeypatch.setattr(suites, "download_dataset_file", fail)
    with pytest.raises(NetworkError) as raised:
        suites.load_suite("mt-bench", None, None)
    assert raised.value.hint.startswith("check the connection; --questions FILE")
    assert "subspec bench sample" in raised.value.hint
