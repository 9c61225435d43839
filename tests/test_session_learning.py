"""What sessions learn: counted where tokens were drafted or read, kept at the end, used by the next plan."""

from __future__ import annotations

import dataclasses

import pytest
from checkpoints import geometry_in
from fakes_session import answer_to, open_tiny

from subspec_cli.bench.runner import run_bench
from subspec_cli.config_file import resolve_config
from subspec_cli.decoding.drafter import PlainDrafter
from subspec_cli.planning.assumed_costs import assumed_costs
from subspec_cli.probe import kept_rates
from subspec_cli.probe.kept_costs import keep_costs, known_costs
from subspec_cli.reporter import Reporter
from subspec_cli.session import learning
from subspec_cli.session.found_model import find_model
from subspec_cli.session.learning import learned_acceptance
from subspec_cli.session.prepare import prepare
from subspec_cli.streaming.read_ahead import ReadAhead
from subspec_cli.substitutes.settings import SubstituteSettings

pytestmark = pytest.mark.learned


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home of this test alone, with the prepared models of the shelf's."""
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(shelf, home):
    directory = shelf.model("qwen2")
    prepare(str(directory), SubstituteSettings(4, "minmax"), progress=lambda state: None)
    return directory


@pytest.fixture
def costs(model):
    """Costs over a disk that reads 1 GB/s."""
    found = assumed_costs(geometry_in(model), "cpu")
    return dataclasses.replace(
        found, link_bytes_per_s=1e9, pageable_bytes_per_s=1e9, disk_bytes_per_s=1e9, origin="measured"
    )


def kept(session, temperature=0.0):
    about = session.description
    manifest = find_model(about.config).prepared.manifest
    sampling = dataclasses.replace(about.config.sampling, temperature=temperature)
    return learned_acceptance(manifest, sampling)


def test_a_session_keeps_what_was_accepted_and_the_next_plan_goes_by_it(model):
    with open_tiny(model) as session:
        assert session.plan.prediction.learned_tokens == 0
        drafted = [answer_to(session, prompt, 30) for prompt in ("one", "two")]
        list(session.generate("three", plain=True, max_new_tokens=9))
        other = session.with_drafter(PlainDrafter())
        list(other.generate("four", max_new_tokens=9))
        assert kept(session) is None, "only at the end"
    session.close()
    found = kept(session)
    assert found.tokens == sum(answer.stats.new_tokens - 1 for answer in drafted) > 32
    assert sum(found.taken) == sum(
        accepted * passes
        for answer in drafted
        for accepted, passes in enumerate(answer.stats.accepted_histogram)
    )
    with open_tiny(model) as again:
        prediction = again.plan.prediction
        assert prediction.learned_tokens == found.tokens
        assert (prediction.low, prediction.high) == (None, None)
    assert kept(again) == found, "nothing was answered"


def test_answers_count_for_the_temperature_that_they_were_given_at(model):
    with open_tiny(model) as session:
        list(session.generate("one", max_new_tokens=9))
        session.set_sampling(dataclasses.replace(session.description.config.sampling, temperature=1.0))
        list(session.generate("two", max_new_tokens=12))
    assert (kept(session).tokens, kept(session, 1.0).tokens) == (8, 11)
    assert kept(session, 0.7) is None


def test_an_answer_that_is_stopped_counts_as_far_as_it_came(model):
    with open_tiny(model) as session:
        deltas = session.generate("one", max_new_tokens=40)
        given = [next(deltas) for _ in range(2)]
        deltas.close()
    assert kept(session).tokens == given[-1].stats.new_tokens - 1


def test_a_home_that_cannot_be_written_costs_only_the_counts(model, home):
    notes = []
    with open_tiny(model, reporter=Reporter(note=notes.append)) as session:
        list(session.generate("one", max_new_tokens=9))
        (home / "acceptance").write_text("in the way")
    assert kept(session) is None


@pytest.fixture
def reads_count(monkeypatch):
    """Passes of a few kilobytes tell the rate of the disk."""
    monkeypatch.setattr(learning, "_LEAST_LINK_S", 0.0)
    monkeypatch.setattr(kept_rates, "_LEAST_BYTES", 1)


def kept_stream(model):
    return kept_rates.kept_rate(kept_rates.streaming(model.stat().st_dev))


@pytest.mark.usefixtures("reads_count")
def test_a_run_keeps_the_rate_of_its_disk_and_the_next_plan_goes_by_it(model):
    with open_tiny(model) as session:
        probed = session.plan.prediction.basis.link_bytes_per_s
        read = answer_to(session, "one", 30).stats
        assert session.loaded.blocks.streamer.is_direct
        assert kept_stream(model) is None, "only at the end"
    rate = read.streamed_bytes / read.link_time_s
    assert kept_stream(model) == rate > 2 * probed, "the assumed link is slow"
    with open_tiny(model) as again:
        assert again.plan.prediction.basis.link_bytes_per_s == pytest.approx(rate, rel=0.03)
        list(again.generate("one", plain=True, max_new_tokens=9))
    assert kept_stream(model) != rate, "plain decoding reads too"
    with open_tiny(model, memory={"reprobe": True}) as timed:
        assert timed.plan.prediction.basis.link_bytes_per_s == probed
        assert kept_stream(model) is None


@pytest.mark.usefixtures("reads_count")
@pytest.mark.parametrize("why", ["cached", "shared", "short", "resident"])
def test_what_says_nothing_of_the_disk_is_not_kept(model, monkeypatch, why):
    flags = {"memory": {"resident_layers": 3}} if why == "resident" else {}
    if why == "short":
        monkeypatch.setattr(learning, "_LEAST_LINK_S", 60.0)
    if why == "cached":
        monkeypatch.setattr(ReadAhead, "is_direct", lambda self: False)
    if why == "shared":
        flags["sharers"] = 2
    with open_tiny(model, **flags) as session:
        list(session.generate("one", max_new_tokens=9))
    assert kept_stream(model) is None


@pytest.mark.usefixtures("reads_count")
def test_a_bench_compares_under_the_same_costs(model, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question_id": 1, "category": "writing", "turns": ["One."]}\n')
    flags = {
        "model": {"model": str(model)},
        "memory": {"memory_gb": 1.0, "device": "cpu", "resident_layers": 0},
        "bench": {"questions": str(questions), "max_new_tokens": 8},
    }
    run_bench(resolve_config(flags), "mt-bench", progress=lambda state: None)
    assert kept_stream(model) is None


@pytest.mark.parametrize(
    ("device", "seen", "link"),
    [
        ("cpu", 2.2e9, 2.2e9),
        ("cpu", 1.1e9, 1e9),
        ("cpu", 0.9e9, 1e9),
        ("cpu", 0.4e9, 0.4e9),
        ("cuda", 2.2e9, 1e9),
    ],
)
def test_a_disk_takes_the_rate_that_was_seen_unless_it_is_nearly_the_same(home, costs, device, seen, link):
    about = {"device": device, "disk": 7}
    keep_costs(about, costs)
    kept_rates.keep_rate(kept_rates.streaming(7), seen, 1.0)
    found = known_costs(about)
    rates = (found.link_bytes_per_s, found.pageable_bytes_per_s, found.disk_bytes_per_s)
    assert rates == pytest.approx((link, link, link), rel=0.03)
    assert found.target_layer == costs.target_layer
    keep_costs(about, costs)
    assert known_costs(about) == costs, "a new probe is newer"


def test_preparing_keeps_its_rate(shelf, home, monkeypatch):
    monkeypatch.setattr(kept_rates, "_LEAST_BYTES", 1)
    directory = shelf.model("qwen2")
    assert kept_rates.kept_rate(kept_rates.preparing("minmax")) is None
    prepare(str(directory), SubstituteSettings(4, "minmax"), progress=lambda state: None)
    rate = kept_rates.kept_rate(kept_rates.preparing("minmax"))
    assert rate > 0
    prepare(str(directory), SubstituteSettings(4, "minmax"), progress=lambda state: None)
    assert kept_rates.kept_rate(kept_rates.preparing("minmax")) == rate, "nothing was made"
