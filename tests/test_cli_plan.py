"""`subspec plan`: what is shown, what is read, and how it ends."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import (
    geometry_in,
    safetensors_bytes,
    tiny_config,
    tiny_tensors,
    write_checkpoint,
    write_tokenizer,
)
from fake_hub import MODEL
from huggingface_hub import constants

import subspec_cli
from subspec_cli.__main__ import main
from subspec_cli.cli.output_plan import _line
from subspec_cli.config import SamplingConfig
from subspec_cli.errors import ExitCode
from subspec_cli.planning.acceptance import Acceptance
from subspec_cli.planning.memory import PlanLine
from subspec_cli.probe import kept_rates
from subspec_cli.probe.kept_acceptance import acceptance_subject, keep_acceptance
from subspec_cli.probe.kept_rates import DOWNLOAD, keep_rate, preparing
from subspec_cli.session import forecast
from subspec_cli.streaming import host_memory
from subspec_cli.substitutes.settings import SubstituteSettings
from subspec_cli.units import GIB, MIB


@pytest.fixture(autouse=True)
def no_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def model(tmp_path):
    """A model of a few MiB, most of it layers, whose weights are holes."""
    layers, hidden, vocab = 12, 128, 256
    config = tiny_config(layers=layers, hidden=hidden, intermediate_size=1024, tie_word_embeddings=False)
    tensors = tiny_tensors(layers=layers, hidden=hidden)
    tensors["lm_head.weight"] = ("BF16", (vocab, hidden), bytes(2 * vocab * hidden))
    for name, (dtype, shape, _) in list(tensors.items()):
        if ".mlp." in name:
            wide = tuple(1024 if size == 2 * hidden else size for size in shape)
            tensors[name] = (dtype, wide, bytes(2 * wide[0] * wide[1]))
    directory = write_checkpoint(tmp_path / "model")
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return directory


def plan(capsys, *argv):
    status = main(["plan", *map(str, argv)])
    out, err = capsys.readouterr()
    return status, out, err


def document(capsys, *argv):
    status, out, err = plan(capsys, *argv, "--json")
    assert (status, err) == (0, "")
    assert out.count("\n") == 1
    return json.loads(out)


def test_a_plan_is_drawn_in_eighty_columns(capsys, model):
    status, out, err = plan(capsys, model, "--device", "cpu", "--memory-gb", "0.135", "--context", 64)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines[1:])) <= 80
    bar = next(line for line in lines if line.startswith("["))
    assert re.fullmatch(r"\[[a-n·]{76}\]", bar)
    keys = [line[0] for line in lines[2:] if re.match(r"[a-n] ", line)]
    assert set(bar.strip("[]·")) <= set(keys)
    assert keys == sorted(keys)
    assert re.search(r"^layers +[RTd]{12}$", out, re.M)
    for fact in ("why", "budget", "context", "process", "disk", "plain", "subspec", "assuming", "advice"):
        assert re.search(rf"^{fact} {{2,}}\S", out, re.M), fact
    assert re.search(r"not\s+prepared\s+yet", out)
    assert "(assumed)" in out


def test_the_bar_and_the_table_add_up(capsys, model):
    found = document(capsys, model, "--device", "cpu", "--memory-gb", "0.15", "--context", 64)
    planned = found["plan"]
    assert sum(line["size_bytes"] for line in planned["lines"]) == planned["planned_bytes"]
    assert planned["planned_bytes"] <= planned["budget_bytes"] == int(0.15 * GIB)
    assert planned["prediction"]["origin"] == "assumed"
    assert found["least_budget_bytes"] <= planned["planned_bytes"]
    assert found["largest_context"] == 512
    assert (found["download_bytes"], found["received_bytes"], found["prepared"]) == (0, 0, False)
    assert found["compared"] == []


def test_budgets_are_compared_and_those_that_are_too_small_say_so(capsys, model):
    status, out, _ = plan(capsys, model, "--device", "cpu", "--compare", "0.2,0.01,0.15", "--context", 64)
    assert status == 0
    rows = [line.split() for line in out.splitlines() if re.search(r"\dx +\d", line)]
    assert [row[0] for row in rows] == ["0.15", "0.2"]
    speeds = [[float(end) for end in row[4].split("-")] for row in rows]
    assert speeds == sorted(speeds)
    assert re.search(r"^0.01 GiB is too small: --memory-gb [0-9.]+ works", out, re.M)
    assert max(map(len, out.splitlines()[1:])) <= 80
    found = document(capsys, model, "--device", "cpu", "--compare", "0.2,0.01", "--context", 64)
    assert found["plan"] is None
    assert [row["plan"] is None for row in found["compared"]] == [True, False]


def test_a_budget_that_is_too_small_exits_with_what_works(capsys, model):
    status, out, err = plan(capsys, model, "--device", "cpu", "--memory-gb", "0.01")
    assert (status, out) == (ExitCode.RESOURCE, "")
    assert re.search(r"--memory-gb [0-9.]+ works", err)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--vram-gb", "1"], "no model is named"),
        (["demo", "--compare", "1,two"], "is no list of sizes"),
        (["demo", "--link-gb-per-s", "0"], "is no rate"),
        (["demo", "--compare", "-1"], "is no budget"),
        (["demo", "--ram-gb", "0"], "--ram-gb must be a size above 0"),
        (["demo", "--revision", "main"], "has no revisions"),
    ],
)
def test_what_makes_no_sense_is_refused(capsys, argv, told):
    status, out, err = plan(capsys, *argv)
    assert (status, out) == (ExitCode.USAGE, "")
    assert told in err


def test_the_links_rate_is_taken_as_given(capsys, model):
    args = (model, "--device", "cpu", "--memory-gb", "0.135", "--resident-layers", 0, "--context", 64)
    slow = document(capsys, *args, "--link-gb-per-s", 0.1)["plan"]["prediction"]
    fast = document(capsys, *args, "--link-gb-per-s", 0.2)["plan"]["prediction"]
    assert slow["assumptions"][0].startswith("link 0.1 GB/s")
    assert slow["plain_tok_per_s"] < fast["plain_tok_per_s"]


def test_a_gpu_is_planned_for_without_one(capsys, model, monkeypatch):
    found = document(capsys, model, "--device", "cuda", "--vram-gb", 1, "--ram-gb", 4)
    assert found["plan"]["device"] == "cuda"
    assert {"CUDA context", "libraries"} <= {line["label"] for line in found["plan"]["lines"]}
    status, _, err = plan(capsys, model, "--device", "cuda")
    assert (status, "--vram-gb 8" in err) == (ExitCode.RESOURCE, True)
    for is_there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(forecast, "has_gpu", lambda is_there=is_there: is_there)
        assert document(capsys, model, "--vram-gb", 1)["device"] == device


def test_layers_that_ram_does_not_hold_are_drawn_as_from_disk(capsys, model):
    argv = (model, "--device", "cuda", "--vram-gb", 0.79, "--resident-layers", 0, "--context", 64)
    held = document(capsys, *argv)["plan"]
    assert held["ring_slots"] == 0
    ram = (held["host_bytes"] - 3 * MIB) / GIB
    status, out, _ = plan(capsys, *argv, "--ram-gb", f"{ram:.5f}")
    assert status == 0
    assert re.search(r"^layers +[·d]{12}$", out, re.M)
    assert "d streamed from disk" in out
    assert "pinned ring" in out


def test_a_hidden_gpu_is_no_gpu(monkeypatch, tmp_path):
    driver = tmp_path / "version"
    driver.write_text("NVRM")
    monkeypatch.setattr(host_memory, "_DRIVER", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert host_memory.has_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not host_memory.has_gpu()


def test_a_model_on_the_hub_costs_kilobytes_and_leaves_nothing_behind(capsys, server, cache, tmp_path):
    write_tokenizer(tmp_path)
    tensors = tiny_tensors()
    tensors["model.embed_tokens.weight"] = ("BF16", (65536, 32), bytes(4 << 20))
    server.files = {
        "config.json": json.dumps(tiny_config(vocab_size=65536)).encode(),
        "tokenizer.json": (tmp_path / "tokenizer.json").read_bytes(),
        "model.safetensors": safetensors_bytes(tensors),
    }
    found = document(capsys, MODEL, "--device", "cpu", "--memory-gb", 1)
    assert found["model_bytes"] > 4 << 20
    assert found["download_bytes"] == sum(map(len, server.files.values()))
    assert server.sent_bytes < 40 << 10
    assert not cache.exists()


def test_other_bits_are_advised_where_they_are_predicted_to_help(capsys, model):
    found = document(capsys, model, "--device", "cpu", "--memory-gb", 0.135, "--context", 64, "--bits", 2)
    assert found["plan"]["substitute_bits"] == 2
    assert "--bits" not in found["advice"], "the user has chosen"
    assert re.search(r"[0-9.]+ tok/s predicted, \d+% more|helps by 3 %|nothing is needed", found["advice"])


def test_planning_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from subspec_cli.__main__ import main\n"
        "assert main(['plan', 'demo', '--device', 'cpu', '--memory-gb', '0.5']) == 0\n"
        "heavy = {'torch', 'transformers', 'optimum', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    root = str(Path(subspec_cli.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


def test_times_are_those_of_earlier_downloads_and_preparations(capsys, model, monkeypatch):
    monkeypatch.setattr(kept_rates, "_LEAST_BYTES", 1)
    nothing = document(capsys, model, "--device", "cpu", "--memory-gb", 1)
    assert (nothing["download_s"], nothing["prepare_s"]) == (None, None)
    assert "not prepared yet plain" in " ".join(
        plan(capsys, model, "--device", "cpu", "--memory-gb", 1)[1].split()
    )
    keep_rate(preparing("minmax"), 10 * MIB, 5.0)
    keep_rate(DOWNLOAD, 200e6, 10.0)
    keep_rate(DOWNLOAD, 0, 10.0)
    found = document(capsys, model, "--device", "cpu", "--memory-gb", 1)
    layers_and_head = found["layers"] * found["layer_bytes"] + geometry_in(model).table_bytes
    assert found["prepare_s"] == pytest.approx(layers_and_head / (2 * MIB))
    out = " ".join(plan(capsys, model, "--device", "cpu", "--memory-gb", 1)[1].split())
    assert re.search(r"not prepared yet, which takes about [0-9.]+ s at the last one's rate", out)
    out = " ".join(plan(capsys, bare(model), "--device", "cpu", "--memory-gb", 1)[1].split())
    assert re.search(r"MiB to download, about [0-9.]+ (ms|s) at 20 MB/s, as measured last time", out)


def bare(model):
    directory = model.parent / "bare"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_bytes((model / "config.json").read_bytes())
    return directory


def test_config_json_alone_is_enough(capsys, model):
    """Its plan is that of the whole model, for a tokenizer of the same size."""
    argv = ("--device", "cpu", "--memory-gb", 0.2, "--context", 64)
    whole = document(capsys, model, *argv)
    directory = bare(model)
    for name in (directory, directory / "config.json"):
        status, out, err = plan(capsys, name, *argv, "--json")
        found = json.loads(out)
        assert status == 0
        assert "there are no weights: sizes are those that" in err
        assert (found["layers"], found["layer_bytes"]) == (whole["layers"], whole["layer_bytes"])
        assert found["model_bytes"] == whole["model_bytes"]
        assert found["download_bytes"] > found["model_bytes"]
        assert found["plan"]["resident_layers"] == whole["plan"]["resident_layers"]
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    assert json.loads(plan(capsys, directory, *argv, "--json")[1])["model_bytes"] == 2 * whole["model_bytes"]
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    assert plan(capsys, directory, *argv)[0] == ExitCode.UNSUPPORTED
    (directory / "pytorch_model.bin").write_bytes(b"pickled")
    assert "only pickle weights" in plan(capsys, directory, *argv)[2]


def test_a_hub_that_takes_no_connection_is_said_at_once(capsys, cache, monkeypatch):
    """A port that nobody listens on, and a name server that never answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        started = time.monotonic()
        status, _, err = plan(capsys, MODEL, "--device", "cpu", "--memory-gb", 1)
    assert status == ExitCode.NETWORK
    assert "cannot reach http://127.0.0.1" in err
    assert "config.json" in err
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: time.sleep(1.5) or taken)
    assert plan(capsys, MODEL, "--device", "cpu", "--memory-gb", 1)[0] == ExitCode.NETWORK
    assert time.monotonic() - started < 5


def test_without_a_hub_the_caches_config_is_planned(capsys, cache, model, monkeypatch):
    repo = Path(constants.HF_HUB_CACHE) / f"models--{MODEL.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("c" * 40)
    (snapshot / "config.json").write_bytes((model / "config.json").read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    status, out, err = plan(capsys, MODEL, "--device", "cpu", "--memory-gb", 1, "--json")
    assert status == 0
    assert json.loads(out)["layers"] == 12
    assert "offline mode is set" in err


def test_a_gpu_plan_says_that_nothing_was_measured(capsys, model):
    argv = ("--device", "cuda", "--vram-gb", 1, "--ram-gb", 4)
    assert "no figure was measured on this GPU" in plan(capsys, model, *argv)[1]
    assert "on this GPU" not in plan(capsys, model, "--device", "cpu", "--memory-gb", 1)[1]


def test_a_range_is_shown_until_a_run_has_learned(capsys, model):
    argv = ("--device", "cpu", "--memory-gb", 0.2, "--resident-layers", 0, "--link-gb-per-s", 0.01)
    found = document(capsys, model, *argv)["plan"]["prediction"]
    assert found["learned_tokens"] == 0
    assert found["low"]["tok_per_s"] < found["tok_per_s"] < found["high"]["tok_per_s"]
    out = " ".join(plan(capsys, model, *argv)[1].split())
    assert "acceptance assumed, as no run here has shown it yet low" in out
    assert "as published for a 7B model" in out
    commit = document(capsys, model, *argv)["revision"]
    subject = acceptance_subject(str(model), commit, SubstituteSettings(4, "minmax"), SamplingConfig())
    keep_acceptance(subject, Acceptance(1824.0, (1700.0,), (1500.0,)))
    learned = document(capsys, model, *argv)["plan"]["prediction"]
    assert (learned["learned_tokens"], learned["low"], learned["high"]) == (1824, None, None)
    out = " ".join(plan(capsys, model, *argv)[1].split())
    assert "acceptance learned from 1,824 tokens" in out
    assert "assumed, as no run" not in out


def test_a_plan_with_every_line_is_drawn(capsys, model):
    found = document(capsys, model, "--device", "cpu", "--memory-gb", "0.2", "--context", 64, "--parallel", 4)
    assert found["plan"]["parallel"] == 4
    every = [PlanLine(f"line {number}", 1 << 20) for number in range(24)]
    assert len({_line(number, line, 1 << 30).plain[0] for number, line in enumerate(every)}) == 24


def test_several_answers_are_planned_together(capsys, model):
    argv = (model, "--device", "cpu", "--memory-gb", "0.2", "--context", 64, "--parallel")
    status, out, err = plan(capsys, *argv, 4)
    assert (status, err) == (0, "")
    assert "4 answers at a time together" in " ".join(out.split())
    assert re.search(r"KV cache .* 4 x \d+ rows", out)
    for number in ("0", "65", "x"):
        assert plan(capsys, *argv, number)[0] == 2
