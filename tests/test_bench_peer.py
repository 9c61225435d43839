"""A peer beside our arms: asked turn by turn, shown with what it read, and void where the page cache served it."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import json
from functools import partial

import pytest
from test_bench import TURNS, bench, forgetful
from test_bench_voids import BUSY, IDLE, answer, report, voids

from subspec_cli.__main__ import main
from subspec_cli.bench import runner
from subspec_cli.bench.answers import PeerAnswer
from subspec_cli.bench.peer import PeerOrder, running_peer
from subspec_cli.bench.record_comparison import compare_records
from subspec_cli.bench.voids import PeerReads, cache_reason
from subspec_cli.cli.bench import Outputs, show_report
from subspec_cli.cli.comparison_text import summary_lines
from subspec_cli.cli.documents import bench_document
from subspec_cli.cli.output import Output
from subspec_cli.errors import ResourceError

ORDER = PeerOrder("/model", "cpu", budget_bytes=900, host_bytes=0, threads=1)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    records = [{"question_id": n, "category": f"c{n % 2}", "turns": TURNS} for n in range(2)]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture
def fake(monkeypatch):
    """Let the runner start the fake in place of the library."""
    monkeypatch.setattr(runner, "running_peer", partial(running_peer, module="fake_peer"))


def with_peer(found, *, rate=2.0, use=IDLE, read=900, streamed=1000):
    peer = PeerAnswer(answer(rate, use), read, streamed)
    pairs = tuple(dataclasses.replace(pair, peer=peer) for pair in found.pairs)
    context = found.context | {"peer": {"version": "9.9", "peak_bytes": 1 << 20}, "budget_bytes": 2 << 20}
    return dataclasses.replace(found, pairs=pairs, context=context)


def test_a_peer_answers_in_its_own_process():
    with running_peer(ORDER, module="fake_peer") as peer:
        found = peer.answer([5, 7], limit=3, end_ids=[1])
    assert peer.about["version"] == "9.9"
    assert found.answer.token_ids == (7, 7, 7)
    assert found.answer.finish_reason == "length"
    assert found.answer.stats.decode_tok_per_s == pytest.approx(0.5)
    assert (found.read_bytes, found.streamed_bytes) == (2700, 3000)
    assert found.answer.use.others_share == pytest.approx(0.02)


def test_a_peer_that_fails_says_why():
    with (
        pytest.raises(ResourceError, match="accelerate failed: OutOfMemoryError: 13 bytes"),
        running_peer(dataclasses.replace(ORDER, budget_bytes=13), module="fake_peer"),
    ):
        pass
    with pytest.raises(ResourceError, match="accelerate failed"), running_peer(ORDER, module="no_such_peer"):
        pass


def test_the_peer_is_asked_between_our_arms_in_both_orders(shelf, questions, fake):
    seen = []
    found = bench(shelf, questions, seen.append, peer="accelerate")
    arms = [state.status.split(":")[0].split(", ")[-1] for state in seen if "tok/s" in state.status]
    assert arms == 2 * ["plain", "speculative", "accelerate"] + 2 * ["accelerate", "speculative", "plain"]
    assert (seen[-1].done, seen[-1].total) == (15, 16)
    assert all(pair.peer.answer.stats.prompt_tokens == pair.plain.stats.prompt_tokens for pair in found.pairs)
    assert found.rows[-1].measured["peer_tok_per_s"].median == pytest.approx(0.5)
    document = json.loads(json.dumps(bench_document(found)))
    assert document["peer"]["peak_bytes"] == 4096
    assert document["answers"][0]["peer"]["streamed_weight_bytes"] == 10_000


def test_a_run_with_a_peer_is_resumed(shelf, questions, fake, tmp_path):
    def stop(state):
        if state.done == 9:
            raise KeyboardInterrupt

    before = bench(shelf, questions, stop, peer="accelerate")
    record = tmp_path / "record.json"
    record.write_text(json.dumps(bench_document(before)))
    after = bench(shelf, questions, peer="accelerate", resume=str(record))
    assert len(before.pairs) == 2
    assert [pair.peer for pair in after.pairs[:2]] == [
        dataclasses.replace(pair.peer, answer=forgetful(pair.peer.answer)) for pair in before.pairs
    ]
    assert len(after.pairs) == 4
    assert not after.interrupted


@pytest.mark.parametrize(
    ("read", "streamed", "reason"),
    [
        (600, 1000, None),
        (0, 0, None),
        (None, 0, None),
        (400, 1000, "the page cache served accelerate"),
        (None, 1000, "does not say what accelerate read"),
    ],
)
def test_what_the_page_cache_served_is_void(read, streamed, reason):
    found = cache_reason(PeerReads(read, streamed))
    assert found is None if reason is None else reason in found


def test_a_void_peer_leaves_our_own_figures():
    row = with_peer(report(), read=10).rows[-1]
    assert {void.figure for void in row.voids} == {"peer_tok_per_s", "speedup_over_peer"}
    assert with_peer(report()).rows[-1].voids == ()
    busy = with_peer(report(), use=BUSY).rows[-1]
    assert {void.figure for void in busy.voids} == {"peer_tok_per_s", "speedup_over_peer"}
    assert voids() == ()


def shown(shape, found):
    out, err = io.StringIO(), io.StringIO()
    show_report(found, Output(stdout=out, stderr=err), Outputs(shape, None))
    return out.getvalue()


def test_the_peer_has_columns_where_it_was_asked():
    text = shown("markdown", with_peer(report()))
    assert "| speedup | accelerate tok/s | over it | tau |" in text
    assert "| 2.00 | 2.00x | 5.00 |" in text
    assert "accelerate tok/s" not in shown("markdown", report())
    (row, _) = csv.DictReader(io.StringIO(shown("csv", with_peer(report(), read=0))))
    assert row["peer_tok_per_s"] == ""
    assert "page cache" in row["speedup_over_peer_void"]
    assert "peer_tok_per_s" not in shown("csv", report())


def test_what_the_peer_read_is_said_with_its_memory_and_tokens():
    (line,) = [line for line in summary_lines(with_peer(report())) if line.startswith("accelerate")]
    assert line.startswith("accelerate 9.9: 900 B of the 1000 B that it streamed came from storage")
    assert "peak memory 1.00 MiB of 2.00 MiB" in line
    assert "1 of 1 answer with our tokens" in line


def test_records_with_and_without_a_peer_are_compared():
    base = report().context | {"questions_sha256": "q"}
    one, other = (
        json.loads(json.dumps(bench_document(dataclasses.replace(found, context=base))))
        for found in (report(), with_peer(report()))
    )
    figures = {item.figure for item in compare_records(one, one)}
    assert "peer_tok_per_s" not in figures
    assert {item.figure for item in compare_records(one, other)} - figures == {
        "peer_tok_per_s",
        "speedup_over_peer",
    }


def test_a_peer_needs_its_package_and_greedy_answers(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "sample", "--peer", "accelerate"]) == 2
    assert "pip install 'subspec-cli[peer]'" in capsys.readouterr().err
    assert main(["bench", "sample", "--peer", "accelerate", "-t", "1"]) == 2
    assert "--temperature 0" in capsys.readouterr().err
    assert main(["bench", "sample", "--peer", "vllm"]) == 2
