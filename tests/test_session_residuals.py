"""Residuals from `prepare` to a session: exact weights, kills, damage, and when they are streamed."""

import json
import os
from dataclasses import replace

import pytest
import torch
from checkpoints import geometry_in
from fakes_session import answer_to, open_tiny, prepare_quietly
from tiny_models import make_tiny_model

from subspec_cli.errors import IntegrityError, ResourceError
from subspec_cli.files.regular_file import sha256_file
from subspec_cli.planning.assumed_costs import assumed_costs
from subspec_cli.probe.timed_machine import TimedMachine
from subspec_cli.reporter import Reporter
from subspec_cli.session import stream_forms as forms_module
from subspec_cli.session.prepare import repair
from subspec_cli.session.residuals import add_residuals
from subspec_cli.substitutes import residual_preparation, residual_set
from subspec_cli.substitutes.integrity import Verifier
from subspec_cli.substitutes.inventory import find_stored, own_files
from subspec_cli.substitutes.prepared_model import find_prepared
from subspec_cli.substitutes.residual_set import RESIDUALS_NAME, find_residuals, read_residuals

PROMPT = "Tell me of rivers"


@pytest.fixture(scope="module")
def model(shelf):
    directory = shelf.model("llama", dtype=torch.bfloat16)
    add(directory)
    return directory


def add(directory, **how):
    return add_residuals(
        find_prepared(str(directory)), progress=how.pop("progress", lambda state: None), **how
    )


@pytest.fixture
def only_residuals(monkeypatch):
    """Plans that may not take raw layers."""
    found = forms_module.stream_forms
    monkeypatch.setattr("subspec_cli.session.opening.stream_forms", lambda *given: found(*given)[-1:])


def weights_of(session):
    """All matrices of one pass, by layer and name, with their addresses in a page."""
    held = {}
    for block in session.loaded.blocks.blocks():
        for name, weight in block.matrices.items():
            held[block.layer, name] = weight.clone(), weight.data_ptr() % 4096
    return held


def test_streamed_residuals_give_the_bits_and_the_tokens_of_raw_layers(model, only_residuals):
    with open_tiny(model) as session:
        assert session.loaded.blocks.streamer is not None
        rebuilt, answer = weights_of(session), answer_to(session, PROMPT, 12)
        rebuilt_bytes = session.description.plan.streamed_bytes_per_pass
    with open_tiny(model, memory={"no_residual": True}) as session:
        raw, expected = weights_of(session), answer_to(session, PROMPT, 12)
        assert rebuilt_bytes < session.description.plan.streamed_bytes_per_pass
    assert rebuilt.keys() == raw.keys()
    for key, (weight, address) in raw.items():
        assert torch.equal(rebuilt[key][0].view(torch.int16), weight.view(torch.int16)), key
        assert rebuilt[key][1] == address
    assert answer.token_ids == expected.token_ids


def test_a_plan_takes_residuals_where_the_link_is_slow_and_raw_layers_where_it_is_fast(model, monkeypatch):
    with open_tiny(model) as session:
        stream = session.description.plan.reason.stream
        assert stream.residuals
        assert stream.residual_bytes < stream.raw_bytes

    def fast_link(directory, settings, device, reporter, rebuilds):
        assert rebuilds
        costs = assumed_costs(geometry_in(directory), device, link_gb_per_s=1000, settings=settings)
        return TimedMachine(costs, others_share=None, spread=0.0)

    monkeypatch.setattr("subspec_cli.session.machine_costs.probe_in_subprocess", fast_link)
    with open_tiny(model, memory={"reprobe": True}) as session:
        assert not session.description.plan.reason.stream.residuals
    with open_tiny(model, memory={"no_residual": True}) as session:
        assert session.description.plan.reason.stream is None


def test_plain_decoding_streams_raw_layers_as_it_holds_no_codes(model):
    with open_tiny(model, draft={"no_speculation": True}) as session:
        assert session.description.plan.reason.stream is None
        assert len(weights_of(session)) == 7 * session.description.plan.streamed_layers


@pytest.fixture
def copied(shelf, tmp_path, monkeypatch):
    """A set of its own for a test that damages files."""
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))
    directory = make_tiny_model(tmp_path / "model", "llama", dtype=torch.bfloat16)
    prepare_quietly(directory)
    return directory


def findings(directory):
    (stored,) = find_stored(str(directory))
    return stored, Verifier([stored], lambda state: None).verify(stored)


def test_a_flipped_bit_and_a_short_file_are_found_and_made_again(copied):
    add(copied)
    prepared = find_prepared(str(copied))
    before = {
        path.name: path.read_bytes() for path in own_files(prepared.directory) if path.suffix != ".lock"
    }
    listed = read_residuals(prepared.directory)
    flipped, short = (prepared.directory / file.name for file in listed[:2])
    data = bytearray(flipped.read_bytes())
    data[-3] ^= 16
    flipped.write_bytes(data)
    short.write_bytes(short.read_bytes()[:-1])
    stored, found = findings(copied)
    assert {item.path.name for item in found} == {flipped.name, short.name}
    repair(stored, found, lambda state: None)
    assert findings(copied)[1] == []
    for name in (flipped.name, short.name):
        assert (prepared.directory / name).read_bytes() == before[name]
    again = [replace(file, mtime_ns=0, ctime_ns=0) for file in read_residuals(prepared.directory)]
    assert again == [replace(file, mtime_ns=0, ctime_ns=0) for file in listed]


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    path.write_bytes(data)


def streams(directory):
    """Whether a session streams residuals, and its notes."""
    notes = []
    with open_tiny(directory, reporter=Reporter(note=notes.append)) as session:
        return session.loaded.blocks.streamer is not None and session.description.plan.reason.stream, notes


def test_a_damaged_residual_file_is_never_streamed(copied):
    add(copied)
    prepared = find_prepared(str(copied))
    path = prepared.directory / read_residuals(prepared.directory)[1].name
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    stream, notes = streams(copied)
    assert stream is None
    (note,) = [text for text in notes if "not used" in text]
    assert f"{path.name} has the SHA-256" in note
    assert f"subspec models verify {copied} --repair" in note


def test_copied_residuals_are_hashed_once_and_used(copied, monkeypatch):
    add(copied)
    prepared = find_prepared(str(copied))
    listed = read_residuals(prepared.directory)
    for file in listed:
        os.utime(prepared.directory / file.name, ns=(1, 1))
    hashed = []
    monkeypatch.setattr(
        residual_set, "sha256_file", lambda path: hashed.append(path.name) or sha256_file(path)
    )
    stream, notes = streams(copied)
    assert stream.residuals
    assert hashed == [file.name for file in listed]
    assert any("hashing" in text for text in notes)
    stream, notes = streams(copied)
    assert stream.residuals
    assert len(hashed) == len(listed)
    assert not notes


def test_a_list_without_times_is_used_after_its_files_are_hashed(copied):
    add(copied)
    prepared = find_prepared(str(copied))
    path = prepared.directory / RESIDUALS_NAME
    document = json.loads(path.read_text())
    for item in document["files"]:
        del item["mtime_ns"], item["ctime_ns"]
    path.write_text(json.dumps(document))
    assert findings(copied)[1] == []
    assert streams(copied)[0].residuals
    assert all(file.mtime_ns and file.ctime_ns for file in read_residuals(prepared.directory))
    flip(prepared.directory / read_residuals(prepared.directory)[0].name)
    assert streams(copied)[0] is None


def test_finished_residuals_need_no_lock(copied, monkeypatch):
    first = add(copied)

    def refuse(*given, **named):
        raise ResourceError("the home is read-only")

    monkeypatch.setattr(residual_preparation, "directory_lock", refuse)
    assert add(copied).size_bytes == first.size_bytes


def test_a_residual_file_that_changes_in_use_ends_the_answer(copied, only_residuals):
    add(copied)
    with open_tiny(copied) as session:
        ids = session.encode_prompt(PROMPT, system=None, raw=False)
        answer = session.generate(ids, max_new_tokens=40, stop=())
        next(answer)
        directory = find_prepared(str(copied)).directory
        path = directory / read_residuals(directory)[0].name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(IntegrityError, match=r"residual-00000\.safetensors changed while it was in use"):
            list(answer)


def test_a_damaged_list_is_found_and_not_used(copied):
    add(copied)
    prepared = find_prepared(str(copied))
    path = prepared.directory / RESIDUALS_NAME
    path.write_text(path.read_text().replace("source_sha256", "sauce"))
    assert [item.path for item in findings(copied)[1]] == [path]
    notes = []
    with open_tiny(copied, reporter=Reporter(note=notes.append)) as session:
        assert session.description.plan.reason.stream is None
    assert any("residuals are not used" in text for text in notes)
    add(copied)
    assert findings(copied)[1] == []


def test_a_killed_preparation_goes_on_with_the_layers_that_are_missing(copied, monkeypatch):
    prepared = find_prepared(str(copied))
    calls = []

    def stop(state):
        if state.done_layers == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add(copied, progress=stop)
    with pytest.raises(IntegrityError, match="1 of") as caught:
        find_residuals(prepared.directory, prepared.manifest)
    assert caught.value.hint == f"the rest: subspec prepare {copied} --residual"
    made = residual_preparation._Residuals._make
    monkeypatch.setattr(
        residual_preparation._Residuals,
        "_make",
        lambda self, layer: calls.append(layer.layer) or made(self, layer),
    )
    add(copied)
    assert calls == list(range(1, len(prepared.manifest.layers)))
    assert find_residuals(prepared.directory, prepared.manifest) is not None
    add(copied)
    assert len(calls) == len(prepared.manifest.layers) - 1


def test_a_file_that_does_not_give_the_weights_is_an_error_and_is_not_listed(copied, monkeypatch):
    monkeypatch.setattr("subspec_cli.modeling.residuals.is_exact", lambda *given: False)
    with pytest.raises(IntegrityError, match="bit for bit"):
        add(copied)
    prepared = find_prepared(str(copied))
    assert read_residuals(prepared.directory) == []
    assert not list(prepared.directory.glob("residual-*"))


@pytest.mark.parametrize("digest", ["substitute_sha256", "source_sha256"])
def test_residuals_of_other_substitutes_are_found_and_not_used(copied, digest):
    add(copied)
    prepared = find_prepared(str(copied))
    path = prepared.directory / RESIDUALS_NAME
    document = json.loads(path.read_text())
    document["files"][0][digest] = "0" * 64
    path.write_text(json.dumps(document))
    stream, notes = streams(copied)
    assert stream is None
    assert sum("of other weights or another substitute" in text for text in notes) == 1
    stored, found = findings(copied)
    assert [item.path.name for item in found] == ["residual-00000.safetensors"]
    repair(stored, found, lambda state: None)
    assert findings(copied)[1] == []
    assert streams(copied)[0].residuals


@pytest.mark.parametrize(("how", "why"), [({"dtype": torch.float16}, "F16"), ({"bits": 8}, "8 bits")])
def test_models_that_get_no_residuals_say_why(shelf, how, why):
    notes = []
    assert add(shelf.model("llama", **how), reporter=Reporter(note=notes.append)) is None
    assert why in notes[0]
    assert "streamed raw" in notes[0]
