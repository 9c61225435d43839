"""What sessions learn of acceptance: counted where tokens were drafted, kept at the end, used by the next plan."""

from __future__ import annotations

import dataclasses

import pytest
from fakes_session import answer_to, open_tiny

from subspec_cli.decoding.drafter import PlainDrafter
from subspec_cli.probe import kept_rates
from subspec_cli.reporter import Reporter
from subspec_cli.session.found_model import find_model
from subspec_cli.session.learning import learned_acceptance
from subspec_cli.session.prepare import prepare
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


def test_preparing_keeps_its_rate(shelf, home, monkeypatch):
    monkeypatch.setattr(kept_rates, "_LEAST_BYTES", 1)
    directory = shelf.model("qwen2")
    assert kept_rates.kept_rate(kept_rates.preparing("minmax")) is None
    prepare(str(directory), SubstituteSettings(4, "minmax"), progress=lambda state: None)
    rate = kept_rates.kept_rate(kept_rates.preparing("minmax"))
    assert rate > 0
    prepare(str(directory), SubstituteSettings(4, "minmax"), progress=lambda state: None)
    assert kept_rates.kept_rate(kept_rates.preparing("minmax")) == rate, "nothing was made"
