"""The surrogate maker: a wide, deep copy must compute what its small model computes."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))  # as for a script that is run
from make_surrogate import main
from surrogate import shards, values
from surrogate.maker import Wanted, make_surrogate
from surrogate.small_model import SurrogateError
from surrogate.values import shares

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": 6}),
    "qwen2": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, {"head_dim": 24}),
}
AUTO: Any = AutoModelForCausalLM  # its methods are not annotated
PROMPT = torch.arange(2 * 16).view(2, 16) * 7 % 97  # [batch, tokens]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose more to waiting threads than they gain from them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(
    folder: Path, family: str = "qwen2", *, tied: bool = True, dtype: torch.dtype = torch.float32
) -> Path:
    """Save a random model to `folder`, norms and biases too, with stand-ins for the other files."""
    config_class, extra = FAMILIES[family]
    torch.manual_seed(1)
    model = AUTO.from_config(config_class(**SIZES, **extra, tie_word_embeddings=tied))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand_like(parameter) + (0.5 if "norm" in name else -0.5))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def make(small: Path, out: Path, **settings: Any) -> Path:
    """Make a surrogate of three times the width, 2 real layers of 5 in all."""
    force, log = settings.pop("force", False), settings.pop("log", io.StringIO())
    make_surrogate(small, out, Wanted(**{"hidden": 192, "layers": 5} | settings), force=force, log=log)
    return out


def logits(folder: Path) -> torch.Tensor:
    """Return the logits of the model in `folder` for the prompt, [batch, tokens, vocabulary]."""
    model = AUTO.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: torch.Tensor = model(PROMPT).logits
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the model in `folder`."""
    return {name: part for file in folder.glob("*.safetensors") for name, part in load_file(file).items()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_small_model(tmp_path: Path, family: str, tied: bool) -> None:
    small = build(tmp_path / "small", family, tied=tied)
    out = make(small, tmp_path / "out")
    expected = logits(small)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(out), expected, rtol=0, atol=1e-5)
    assert ("lm_head.weight" in weights(out)) is not tied


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_filling_up_changes_nothing(tmp_path: Path, family: str, tied: bool) -> None:
    """Feed-forward and vocabulary of any size: units that lead nowhere, tokens that never win."""
    small = build(tmp_path / "small", family, tied=tied)
    out = make(small, tmp_path / "out", feed_forward=96 * 5 + 37, vocab=131)
    config = json.loads((out / "config.json").read_text())
    assert (config["intermediate_size"], config["vocab_size"]) == (517, 131)
    expected, found = logits(small), logits(out)
    assert found.shape[-1] == 131
    torch.testing.assert_close(found[..., :97], expected, rtol=0, atol=1e-5)
    # A mean of scores is no highest one, whatever the prompt.
    mean = expected.mean(-1, keepdim=True).expand(-1, -1, 34)
    torch.testing.assert_close(found[..., 97:], mean, rtol=0, atol=1e-5)
    up, down = (weights(out)[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("up", "down"))
    assert up.shape == (517, 192)
    assert up[-37:].std() > 0.01
    assert down.shape == (192, 517)
    assert not down[:, -37:].any()


def test_threads_make_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = build(tmp_path / "small")
    monkeypatch.setattr(values, "BLOCK_VALUES", 1 << 10)
    found = []
    for workers in (1, 5):
        monkeypatch.setattr(values, "WORKERS", workers)
        out = make(small, tmp_path / str(workers), noise=0.01, vocab=120, feed_forward=300)
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_division_rounds_no_weight(tmp_path: Path) -> None:
    small = build(tmp_path / "small", dtype=torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    wide, narrow = weights(make(small, tmp_path / "out"))[name], weights(small)[name]
    assert wide.dtype == torch.bfloat16
    copies = wide.view(3, 96, 3, 64).float()  # [row copies, rows, column copies, columns]
    assert torch.equal(copies.sum(2), narrow.float().expand(3, -1, -1))
    for k in range(1, 40):
        assert len(shares(k)) == k
        assert sum(shares(k)) == 1


def test_real_layers_are_spread_among_identity_layers(tmp_path: Path) -> None:
    out = make(build(tmp_path / "small"), tmp_path / "out", layers=6)
    config, tensors = json.loads((out / "config.json").read_text()), weights(out)
    real = [bool(tensors[f"model.layers.{i}.mlp.down_proj.weight"].any()) for i in range(6)]
    assert real == [True, False, False, True, False, False]
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert tensors[f"model.layers.1.{name}.weight"].std() > 0.01
    assert not tensors["model.layers.1.self_attn.o_proj.weight"].any()
    # The small model attends fully in its first layer and through a window in its second.
    assert config["layer_types"] == ["full_attention"] * 3 + ["sliding_attention"] * 3
    assert config["max_window_layers"] == 3
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    assert [config[key] for key in sizes] == [192, 288, 12, 6, 16]


def test_noise_breaks_the_copies_but_hardly_the_function(tmp_path: Path) -> None:
    small = build(tmp_path / "small")
    clean, noisy = make(small, tmp_path / "clean"), make(small, tmp_path / "noisy", noise=0.01)
    name = "model.layers.0.mlp.up_proj.weight"
    exact, rough = weights(clean)[name], weights(noisy)[name]
    assert torch.equal(exact[:96], exact[96:192])
    assert not torch.isclose(rough[:96], rough[96:192], rtol=1e-6).any(0).all()
    assert 0.005 < (rough - exact).norm() / exact.norm() < 0.02
    assert not weights(noisy)["model.layers.1.mlp.down_proj.weight"].any()
    change = (logits(noisy) - logits(small)).abs().max()
    assert 1e-4 < change < 0.1 * logits(small).std()


def test_shards_hold_the_same_tensors(tmp_path: Path) -> None:
    small = build(tmp_path / "small")
    one, many = make(small, tmp_path / "one"), make(small, tmp_path / "many", shard_gb=0.0005)
    assert [path.name for path in one.glob("model*")] == ["model.safetensors"]
    index = json.loads((many / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    for path in (many / file for file in files):
        assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 4096 == 0
        assert path.stat().st_size < 0.0005e9 + 10_000
    expected, found = weights(one), weights(many)
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert torch.equal(logits(many), logits(one))


def test_sharded_small_model_is_read(tmp_path: Path) -> None:
    small = make(build(tmp_path / "tiny"), tmp_path / "small", shard_gb=0.0005)
    out = make(small, tmp_path / "out", hidden=384, layers=7)
    torch.testing.assert_close(logits(out), logits(small), rtol=0, atol=1e-5)


def test_complete_result_is_left_untouched(tmp_path: Path) -> None:
    small, out, log = build(tmp_path / "small"), tmp_path / "out", io.StringIO()
    make(small, out, log=log)
    assert "MB/s" in log.getvalue()
    assert (out / "tokenizer.json").read_text() == "{}"
    assert "surrogate" in (out / "README.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    make(small, out, log=log)
    assert "left untouched" in log.getvalue()
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(SurrogateError, match="--force"):
        make(small, out, seed=1)
    make(small, out, seed=1, force=True, shard_gb=0.0005)
    assert not (out / "model.safetensors").exists()


def test_interrupted_result_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, out = build(tmp_path / "small"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "make_blocks", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            make(small, out)
    assert not [path for path in out.iterdir() if "model" in path.name]
    make(small, out)
    (out / "model.safetensors").unlink()
    make(small, out)
    torch.testing.assert_close(logits(out), logits(small), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "100"], "no multiple"),
        (["--hidden", "32"], "no multiple"),
        (["--hidden", "128", "--layers", "1"], "fewer"),
        (["--hidden", "128", "--feed-forward", "95"], "feed-forward"),
        (["--hidden", "128", "--vocab", "96"], "vocabulary"),
        (["--hidden", "128", "--noise", "nan"], "noise"),
        (["--hidden", "128", "--shard-gb", "0"], "shard size"),
    ],
)
def test_bad_request_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    small, out = build(tmp_path / "small"), tmp_path / "out"
    assert main([str(small), str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_bad_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, out = build(tmp_path / "small"), tmp_path / "out"
    before = {path: path.stat().st_mtime_ns for path in small.iterdir()}
    for wrong in (["missing", "out"], ["small", "small"], ["small", "small/config.json"]):
        assert main([*(str(tmp_path / name) for name in wrong), "--hidden", "128", "--force"]) == 2
    other = build(tmp_path / "other")
    assert main([str(small), str(other), "--hidden", "128", "--force"]) == 2
    assert "choose another folder" in capsys.readouterr().err
    (small / "config.json").write_text(json.dumps({**SIZES, "model_type": "gpt2"}))
    assert main([str(small), str(out), "--hidden", "128"]) == 2
    assert "gpt2" in capsys.readouterr().err
    assert not out.exists()
    assert {path: path.stat().st_mtime_ns for path in small.iterdir() if path.name != "config.json"} == {
        path: time for path, time in before.items() if path.name != "config.json"
    }
