"""`prepare --tune` from a prepared tiny model to a tuned set: the same bytes after any interruption."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fakes_session import prepare_quietly
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model

from subspec_cli.__main__ import main
from subspec_cli.config_file import resolve_config
from subspec_cli.errors import UsageError
from subspec_cli.reporter import Reporter
from subspec_cli.session import tuning
from subspec_cli.session.prepare import repair, tune
from subspec_cli.session.residuals import add_residuals
from subspec_cli.substitutes.integrity import Finding, Verifier
from subspec_cli.substitutes.inventory import list_stored
from subspec_cli.substitutes.manifest import HEAD_NAME, TUNING_TEXT_NAME, read_manifest
from subspec_cli.substitutes.prepared_model import find_prepared
from subspec_cli.substitutes.settings import SubstituteSettings

CONFIG = resolve_config({"memory": {"vram_gb": 1.0, "device": "cpu", "resident_layers": 0}})


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tuning, "_TEXT_TOKENS", 32)
    monkeypatch.setattr(tuning, "_ANSWER_TOKENS", 8)
    directory = make_tiny_model(tmp_path / "model", "qwen2", layers=2, dtype=torch.bfloat16)
    prepare_quietly(directory)
    return directory


def tuned(model, *, stop_at=None, force=False):
    """Tune; a KeyboardInterrupt comes once so many layers are done."""

    def progress(state):
        if state.done_layers == stop_at:
            raise KeyboardInterrupt

    notes = []
    return tune(
        str(model),
        SubstituteSettings(4, "minmax"),
        CONFIG,
        force=force,
        progress=progress,
        reporter=Reporter(note=notes.append),
    )


def files(report):
    return {path.name: path.read_bytes() for path in Path(report.directory).glob("*.safetensors")}


def test_an_interrupted_tuning_goes_on_to_the_same_bytes(model):
    with pytest.raises(KeyboardInterrupt):
        tuned(model, stop_at=1)
    report = tuned(model)
    assert not report.already_prepared
    whole = files(report)
    assert sorted(whole) == [HEAD_NAME, "layer-00000.safetensors", "layer-00001.safetensors"]
    text = Path(report.directory) / TUNING_TEXT_NAME
    answers = json.loads(text.read_text())["answers"]
    manifest = read_manifest(Path(report.directory) / "manifest.json")
    assert manifest.settings.optimizer == "tuned"
    outputs = manifest.layers[1].quality["gate"].outputs
    assert outputs.is_tuned
    assert outputs.rows == 32
    text.unlink()
    again = tuned(model, force=True)
    assert files(again) == whole
    assert json.loads(text.read_text())["answers"] == answers
    assert tuned(model).already_prepared
    damaged = Path(report.directory) / "layer-00001.safetensors"
    damaged.write_bytes(b"x")
    stored = next(item for item in list_stored() if item.directory == Path(report.directory))
    repair(stored, [Finding(damaged, "a", "b")], lambda state: None)
    assert files(report) == whole


def ignore(_state):
    pass


def stored_of(report):
    return next(item for item in list_stored() if item.directory == Path(report.directory))


def change_layer(model):
    """Write other weights of the last layer into the model."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= -3
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def other_tokens(text):
    """Put another text in place of a kept one."""
    answers = json.loads(text.read_text())["answers"]
    text.write_text(json.dumps({"answers": [[token ^ 1 for token in answer] for answer in answers]}))


@pytest.mark.parametrize("is_changed", [False, True])
def test_a_text_that_was_cut_short_goes_on_for_the_same_weights_alone(model, monkeypatch, is_changed):
    decoded, answer = [], tuning._answer

    def stop_at_the_second(session, beginning, most):
        decoded.append(beginning)
        if len(decoded) == 2:
            raise KeyboardInterrupt
        return answer(session, beginning, most)

    monkeypatch.setattr(tuning, "_answer", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        tuned(model)
    if is_changed:
        change_layer(model)
        prepare_quietly(model)
    tuned(model)
    assert decoded[2] == tuning._PROMPTS[0 if is_changed else 1]


def test_a_changed_layer_changes_the_text_and_every_tuned_layer(model, tmp_path, monkeypatch):
    report = tuned(model)
    change_layer(model)
    prepare_quietly(model)
    made = tuned(model)
    assert made.directory == report.directory
    again, text = files(made), (Path(made.directory) / TUNING_TEXT_NAME).read_bytes()
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "other home"))
    prepare_quietly(model)
    fresh = tuned(model)
    assert files(fresh) == again
    assert (Path(fresh.directory) / TUNING_TEXT_NAME).read_bytes() == text


def test_a_text_that_is_not_the_recorded_one_is_decoded_again(model):
    whole = files(report := tuned(model))
    text = Path(report.directory) / TUNING_TEXT_NAME
    kept = text.read_bytes()
    other_tokens(text)
    found = Verifier([stored_of(report)], lambda state: None).verify(stored_of(report))
    assert [item.path for item in found] == [text]
    repair(stored_of(report), found, lambda state: None)
    assert text.read_bytes() == kept
    assert files(report) == whole
    other_tokens(text)
    (Path(report.directory) / "layer-00001.safetensors").unlink()
    prepare_quietly(model)
    assert files(tuned(model)) == whole
    assert text.read_bytes() == kept
    other_tokens(text)
    assert files(tuned(model, force=True)) == whole
    assert text.read_bytes() == kept


def test_a_set_of_an_earlier_version_records_no_text_and_stays_as_it_is(model):
    report = tuned(model)
    path = Path(report.directory) / "manifest.json"
    document = json.loads(path.read_text())
    del document["tuning_text_sha256"]
    path.write_text(json.dumps(document))
    assert Verifier([stored_of(report)], lambda state: None).verify(stored_of(report)) == []
    assert tuned(model).already_prepared


def test_a_repaired_first_set_does_not_become_the_latest(model):
    first = find_prepared(str(model)).directory
    report = tuned(model)
    shutil.copy(report.directory / HEAD_NAME, first / "layer-00000.safetensors")
    stored = next(item for item in list_stored() if item.directory == first)
    found = Verifier([stored], lambda state: None).verify(stored)
    repair(stored, found, lambda state: None)
    assert find_prepared(str(model)).directory == report.directory
    shutil.rmtree(first)
    (report.directory / "layer-00001.safetensors").unlink()
    repair(stored_of(report), [Finding(report.directory / "layer-00001.safetensors", "missing")], ignore)
    assert first.exists()
    assert find_prepared(str(model)).directory == report.directory


def test_repairing_a_residual_makes_no_first_set(model):
    first = find_prepared(str(model)).directory
    report = tuned(model)
    add_residuals(find_prepared(str(model)), progress=ignore)
    shutil.rmtree(first)
    residual = report.directory / "residual-00001.safetensors"
    whole = residual.read_bytes()
    residual.write_bytes(whole[:-1])
    repair(stored_of(report), [Finding(residual, "wrong size")], ignore)
    assert residual.read_bytes() == whole
    assert not first.exists()


def test_residuals_are_written_beside_the_tuned_set_where_it_is_the_latest(model, capsys):
    tuned_set = Path(tuned(model).directory)
    where = ("--device", "cpu", "--memory-gb", "1")
    assert main(["prepare", str(model), *where, "--residual", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert Path(document["directory"]) == tuned_set
    assert find_prepared(str(model)).directory == tuned_set
    assert (tuned_set / "residuals.json").exists()
    assert main(["prepare", str(model), *where, "--residual", "--no-tune", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["optimizer"] == "minmax"


def test_8_bits_are_not_tuned():
    with pytest.raises(UsageError, match="not tuned"):
        tune("any", SubstituteSettings(8, "minmax"), CONFIG, progress=lambda state: None)


@pytest.mark.parametrize(
    "damage",
    ["", "{", '{"answers": 1}', '{"answers": [["x"]]}', '{"answers": [[288]]}', '{"answers": [[true]]}'],
)
def test_a_text_that_cannot_be_read_does_not_count(tmp_path, damage):
    path = tmp_path / TUNING_TEXT_NAME
    path.write_text(damage)
    assert tuning._kept(path, 288) == []
    path.write_text('{"answers": [[287, 0]]}')
    assert tuning._kept(path, 288) == [[287, 0]]


def test_large_sets_of_few_bits_are_tuned_without_being_asked_for(model, monkeypatch, capsys):
    monkeypatch.setattr("subspec_cli.cli.prepare._TUNED_BYTES", 1000)
    where = ("--device", "cpu", "--memory-gb", "1")

    def made(*argv):
        assert main(["prepare", str(model), *where, *argv, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["optimizer"]

    assert made("--no-tune") == "minmax"
    assert made("--bits", "8") == "minmax"
    assert made("--optimizer", "hqq") == "hqq"
    assert made() == "tuned"
    monkeypatch.setattr("subspec_cli.cli.prepare._TUNED_BYTES", 1 << 40)
    assert made() == "minmax"
    assert made("--tune") == "tuned"


def test_a_machine_that_cannot_tune_keeps_the_first_set(model, monkeypatch, capsys):
    monkeypatch.setattr("subspec_cli.cli.prepare._TUNED_BYTES", 1000)
    where = ("--device", "cpu", "--memory-gb", "1MiB")
    assert main(["prepare", str(model), *where]) == 0
    out, err = capsys.readouterr()
    assert "not tuned: a budget of 1.00 MiB is too small" in " ".join(err.split())
    assert "minmax" in out or "prepared" in out
    assert main(["prepare", str(model), *where, "--tune"]) == 7


def test_the_pace_of_decoding_says_rate_and_time_left():
    assert tuning._pace(0, 2048, 3.0) == ""
    assert tuning._pace(410, 1638, 41.0) == " · 10 tok/s · 2:44 left"
