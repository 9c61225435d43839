"""`subspec plan`: what is shown, what is read, and how it ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import safetensors_bytes, tiny_config, tiny_tensors, write_checkpoint, write_tokenizer
from fake_hub import MODEL

import subspec_cli
from subspec_cli.__main__ import main
from subspec_cli.errors import ExitCode
from subspec_cli.session import forecast
from subspec_cli.streaming import host_memory
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
