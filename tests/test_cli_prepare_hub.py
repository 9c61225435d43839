"""`subspec prepare` of a model of the hub, from the command line to the exit status."""

from __future__ import annotations

import json

import pytest
from fake_hub import MODEL, Fault

from subspec_cli.__main__ import main

SHARD = "model-00002-of-00002.safetensors"


def refuse_gated(hub):
    hub.answers[f"/api/models/{MODEL}"] = (403, {"X-Error-Code": "GatedRepo"}, b"")


def ask_to_wait(hub):
    hub.faults[SHARD] = Fault(status=429, headers={"Retry-After": "3600"})


def flip_a_byte(hub):
    hub.served[SHARD] = hub.files[SHARD][:-1] + b"\x7f"


def lie_about_the_size(hub):
    hub.announced[SHARD] = {"X-Linked-Size": "123456"}


def drop_the_safetensors(hub):
    hub.files = {"config.json": hub.files["config.json"], "pytorch_model.bin": b"\x80"}


@pytest.mark.parametrize(
    ("spoil", "arguments", "status", "told", "hint"),
    [
        (refuse_gated, [], 5, "org/tiny is gated and you are not logged in", "hf auth login"),
        (ask_to_wait, [], 4, "answered 429, asks to wait 3600 s", "run the same command again"),
        (flip_a_byte, [], 6, f"{SHARD} arrived with the SHA-256", "run the command again"),
        (lie_about_the_size, [], 6, f"{SHARD} is sent with", "announced with 123456"),
        (drop_the_safetensors, [], 3, "has only pickle weights (pytorch_model.bin)", ".safetensors"),
        (lambda hub: None, ["--revision", "v9"], 2, "org/tiny has no revision v9", "/tree/main"),
    ],
)
def test_refusals_are_one_sentence_a_next_step_and_a_status(
    server, capsys, monkeypatch, tmp_path, spoil, arguments, status, told, hint
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    spoil(server)
    assert main(["prepare", MODEL, *arguments]) == status
    captured = capsys.readouterr()
    assert told in captured.err
    assert hint in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_prepared_from_the_hub_and_then_found_done(server, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main(["prepare", MODEL, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["model_id"], first["already_prepared"]) == (MODEL, False)
    server.ranges.clear()
    assert main(["prepare", MODEL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["already_prepared"] is True
    assert server.ranges == []
