"""What a repository is: the same answer as the library's, or one refusal from every command (rows T of FAILURES)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes_session
import pytest
import tiny_models
import torch
from fakes_session import Shelf, answer_to, open_tiny
from library_answers import first_gap, library_answer, our_answer
from repository_fuzz import TOKENIZERS, Verdict, run_all
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM

from subspec_cli.__main__ import main
from subspec_cli.checkpoint.checkpoint import open_checkpoint
from subspec_cli.checkpoint.end_tokens import read_end_ids
from subspec_cli.errors import SubspecError

one_thread = tiny_models.one_thread
shelf = fakes_session.shelf
TEXT = "What does a lighthouse do?"
LIMIT = 12
Change = Callable[[Path], None]


def edit(name: str, **fields: Any) -> Change:
    """Set fields of a JSON file; `...` removes one."""

    def change(directory: Path) -> None:
        path = directory / name
        content = (json.loads(path.read_text()) if path.exists() else {}) | fields
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return change


def config(**fields: Any) -> Change:
    return edit("config.json", **fields)


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    """Write the weights again after a change."""

    def apply(directory: Path) -> None:
        path = directory / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return apply


def renamed(old: str, new: str) -> Change:
    return tensors(
        lambda held: {
            name.replace(old, new, 1) if name.startswith(old) else name: t for name, t in held.items()
        }
    )


def rope(**table: Any) -> Change:
    """A table in the old spelling, with nothing in the new one."""
    return config(rope_scaling=table, rope_parameters=...)


def both(*changes: Change) -> Change:
    def apply(directory: Path) -> None:
        for change in changes:
            change(directory)

    return apply


def written(name: str, text: str) -> Change:
    def write(directory: Path) -> None:
        (directory / name).write_text(text)

    return write


def as_type(part: str, dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Cast the tensors with this text in their names."""
    return lambda held: {name: t.to(dtype) if part in name else t for name, t in held.items()}


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"short_factor": [1.0 + 0.1 * n for n in range(16)], "long_factor": [2.0 + n for n in range(16)]}

SAME: dict[str, tuple[str, dict[str, Any], Change]] = {
    "T02 no architectures": ("llama", {}, config(architectures=...)),
    "T02 window null": ("mistral", {"sliding_window": 5}, config(sliding_window=None)),
    "T02 window of its own": ("mistral", {}, config(sliding_window=5)),
    "T02 window missing": ("mistral", {}, config(sliding_window=...)),
    "T02 head size missing": ("llama", {}, config(head_dim=...)),
    "T02 key heads null": ("llama", {"num_key_value_heads": 4}, config(num_key_value_heads=None)),
    "T03 ends null over a number": ("llama", {}, edit("generation_config.json", eos_token_id=None)),
    "T03 ends missing over a number": ("llama", {}, edit("generation_config.json", eos_token_id=...)),
    "T03 a list": ("llama", {}, edit("generation_config.json", eos_token_id=list(range(100)))),
    "T03 no generation config": (
        "qwen2",
        {},
        lambda directory: (directory / "generation_config.json").unlink(),
    ),
    "T05 old spelling beside the new": ("llama", {}, config(rope_scaling={"type": "linear", "factor": 2.0})),
    "T05 an empty old spelling": ("llama", {}, config(rope_scaling={})),
    "T05 theta beside": ("llama", {}, config(rope_parameters=..., rope_theta=500.0)),
    "T05 theta in both": ("llama", {}, config(rope_theta=500.0)),
    "T05 no rope at all": ("llama", {}, config(rope_parameters=...)),
    "T05 type and rope_type": ("llama", {}, rope(type="linear", rope_type="default", factor=2.0)),
    "T05 mrope that is plain": (
        "qwen2",
        {},
        rope(type="mrope", rope_type="default", mrope_section=[2, 3, 3]),
    ),
    "T06 short prompt": ("llama", {}, rope(type="longrope", original_max_position_embeddings=128, **LONG)),
    "T06 across the switch": (
        "llama",
        {},
        rope(type="longrope", original_max_position_embeddings=40, **LONG),
    ),
    "T06 long prompt": ("llama", {}, rope(type="longrope", original_max_position_embeddings=20, **LONG)),
    "T21 yarn without a factor of its own": (
        "llama",
        {},
        rope(type="yarn", factor=None, original_max_position_embeddings=64),
    ),
    "T21 yarn, original length beside": (
        "llama",
        {},
        config(
            rope_scaling={"type": "yarn", "factor": 4.0},
            rope_parameters=...,
            original_max_position_embeddings=64,
        ),
    ),
    "T21 yarn, nulls": ("qwen3", {}, rope(type="yarn", factor=4.0, beta_fast=None, attention_factor=None)),
    "T21 llama3, original length missing": ("llama", {}, rope(**LLAMA3)),
    "T30 stored frequencies": (
        "llama",
        {},
        tensors(lambda held: held | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}),
    ),
    "T31 a stored head that is the embedding": (
        "llama",
        {"tied": True},
        tensors(lambda held: held | {"lm_head.weight": held["model.embed_tokens.weight"].clone()}),
    ),
    "T32 the head alone": ("llama", {"tied": True}, renamed("model.embed_tokens.weight", "lm_head.weight")),
    "T32 a head that differs under ties": ("llama", {"tied": False}, config(tie_word_embeddings=True)),
    "T12 norms in float32": (
        "qwen3",
        {"dtype": torch.bfloat16},
        tensors(lambda held: {name: t.float() if "norm" in name else t for name, t in held.items()}),
    ),
    "T12 head in float32": (
        "llama",
        {"dtype": torch.bfloat16, "tied": False},
        tensors(
            lambda held: {name: t.float() if name == "lm_head.weight" else t for name, t in held.items()}
        ),
    ),
    "T12 biases and tables in float64": (
        "qwen2",
        {"dtype": torch.float16},
        tensors(
            lambda held: {
                name: t.double() if "bias" in name or "embed" in name else t for name, t in held.items()
            }
        ),
    ),
    "T42 settings of another generation": (
        "llama",
        {},
        config(temperature=0.3, max_length=9, torch_dtype="float8"),
    ),
}


@pytest.mark.parametrize(("family", "how", "change"), SAME.values(), ids=SAME)
def test_the_answer_is_the_librarys(tmp_path: Path, family: str, how: dict[str, Any], change: Change) -> None:
    directory = make_tiny_model(tmp_path / "model", family, **({"dtype": torch.float32} | how))
    change(directory)
    dtype = how.get("dtype", torch.float32)
    limit = 40 if dtype == torch.float32 else LIMIT
    theirs, model = library_answer(directory, TEXT, limit, dtype)
    ours, _ = our_answer(directory, TEXT, limit)
    assert ours.prompt_ids == theirs.prompt_ids
    if ours.token_ids != theirs.token_ids:
        assert dtype != torch.float32, "16 bits round: the first difference may be a near tie"
        assert first_gap(model, ours.prompt_ids, ours.token_ids, theirs.token_ids) < 0.05
    else:
        assert ours.text == theirs.text


REFUSED: dict[str, tuple[str, dict[str, Any], Change, int, str]] = {
    "T02 two families": (
        "llama",
        {},
        config(model_type="mistral", sliding_window=16),
        3,
        "model_type mistral and architectures LlamaForCausalLM",
    ),
    "T02 the other way": (
        "llama",
        {},
        config(architectures=["MistralForCausalLM"]),
        3,
        "model_type llama and architectures MistralForCausalLM",
    ),
    "T02 no model_type": ("llama", {}, config(model_type=...), 3, "names no model_type"),
    "T02 window a list": (
        "mistral",
        {},
        config(sliding_window=[16]),
        3,
        "sliding_window is [16], not a whole number or null",
    ),
    "T02 a window without a family": (
        "llama",
        {},
        config(sliding_window=16),
        3,
        "a llama has no sliding_window",
    ),
    "T02 a head of another kind": (
        "llama",
        {},
        config(architectures=["LlamaForSequenceClassification"]),
        3,
        "LlamaForSequenceClassification is not supported",
    ),
    "T03 a text": (
        "llama",
        {},
        edit("generation_config.json", eos_token_id="7"),
        3,
        "eos_token_id in generation_config.json is '7'",
    ),
    "T03 texts in a list": (
        "llama",
        {},
        edit("generation_config.json", eos_token_id=[7, "8"]),
        3,
        "eos_token_id in generation_config.json",
    ),
    "T03 a text in config.json": ("llama", {}, config(eos_token_id="7"), 3, "eos_token_id is '7'"),
    "T05 dynamic beside the new spelling": (
        "llama",
        {},
        config(rope_scaling={"type": "dynamic", "factor": 2.0}),
        3,
        "type dynamic are not run",
    ),
    "T05 mrope": ("qwen2", {}, rope(type="mrope", mrope_section=[2, 3, 3]), 3, "type mrope are not run"),
    "T05 a number": ("llama", {}, config(rope_scaling=2.0), 3, "rope_scaling is 2.0, not a table"),
    "T05 theta a text": (
        "llama",
        {},
        config(rope_parameters={"rope_theta": "1e4"}),
        3,
        "rope_theta of rotary positions of type default is '1e4'",
    ),
    "T21 tables by kind of layer": (
        "qwen3",
        {},
        config(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
        3,
        "differ by kind of layer",
    ),
    "T21 llama3 without low_freq_factor": (
        "llama",
        {},
        rope(rope_type="llama3", factor=8.0, high_freq_factor=4.0),
        3,
        "lack low_freq_factor",
    ),
    "T21 linear, factor null": (
        "llama",
        {},
        rope(type="linear", factor=None),
        3,
        "factor of rotary positions of type linear is None",
    ),
    "T21 longrope, too few factors": (
        "llama",
        {},
        rope(type="longrope", short_factor=[1.0], long_factor=[1.0]),
        3,
        "short_factor has 1 numbers, heads that turn 32 features need 16",
    ),
    "T12 two types of matrices": (
        "llama",
        {},
        tensors(as_type("up_proj", torch.float16)),
        3,
        "types BF16 and F16 are mixed",
    ),
    "T32 no head at all": (
        "llama",
        {"tied": True},
        config(tie_word_embeddings=False),
        3,
        "lm_head.weight is not stored",
    ),
    "T34 8 bits that no config speaks of": (
        "llama",
        {},
        tensors(as_type("proj", torch.float8_e4m3fn)),
        3,
        "type F8_E4M3 are not supported",
    ),
    "T34 8 bits of the other kind": (
        "llama",
        {},
        tensors(as_type("proj", torch.float8_e5m2)),
        3,
        "type F8_E5M2 are not supported",
    ),
    "T34 complex numbers": (
        "llama",
        {},
        tensors(as_type("model.norm", torch.complex64)),
        3,
        "model.norm.weight is of type C64",
    ),
    "T33 a method over weights of 8 bits": (
        "llama",
        {},
        both(
            config(quantization_config={"quant_method": "fbgemm_fp8"}),
            tensors(as_type("proj", torch.float8_e4m3fn)),
        ),
        3,
        "already quantized (fbgemm_fp8)",
    ),
    "T33 a method over whole weights": (
        "llama",
        {},
        config(quantization_config={"quant_method": "gptq"}),
        3,
        "already quantized (gptq), but its weights are whole",
    ),
    "T37 compiled": (
        "llama",
        {},
        renamed("", "_orig_mod."),
        3,
        "`_orig_mod.`: the weights of a compiled model",
    ),
    "T37 data parallel": (
        "llama",
        {},
        renamed("", "module."),
        3,
        "`module.`: the weights of a model inside a data-parallel wrapper",
    ),
    "T37 no prefix": ("llama", {}, renamed("model.", ""), 3, "`layers.`: a model without its head"),
    "T37 shapes of a sharded training": (
        "llama",
        {},
        tensors(lambda held: {n: t if "norm" in n else torch.empty(0) for n, t in held.items()}),
        3,
        "tensors are empty",
    ),
    "T01 a token beyond the tables": (
        "llama",
        {},
        lambda directory: _move_token(directory, 300),
        3,
        "with id 300, the model's tables only have 288 rows",
    ),
    "T35 junk in the tokenizer": ("llama", {}, written("tokenizer.json", "{}"), 6, "tokenizer.json in"),
    "T35 junk beside the tokenizer": (
        "llama",
        {},
        written("added_tokens.json", "["),
        6,
        "added_tokens.json in",
    ),
}


def _move_token(directory: Path, number: int) -> None:
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["\u0120t"] = number
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(("family", "how", "change", "code", "words"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_names_the_thing_and_comes_before_weights_are_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    family: str,
    how: dict[str, Any],
    change: Change,
    code: int,
    words: str,
) -> None:
    """`plan`, `prepare` and what `run` reads refuse with the same words."""
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))
    directory = make_tiny_model(tmp_path / "model", family, layers=2, **({"dtype": torch.bfloat16} | how))
    change(directory)
    with pytest.raises(SubspecError) as caught:
        our_answer(directory, TEXT, 1)
    assert words in caught.value.message
    assert caught.value.exit_code == code
    assert "\n" not in caught.value.message
    capsys.readouterr()
    for argv in (
        ["plan", str(directory), "--device", "cpu", "--memory-gb", "1"],
        ["prepare", str(directory)],
    ):
        assert main(argv) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert f"subspec: error: {caught.value.message}\n" in err
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_method_over_whole_weights_is_a_note(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path / "model", "llama", layers=1)
    config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})(directory)
    _, repository = our_answer(directory, TEXT, 1)
    assert repository.notes == (
        "config.json speaks of bitsandbytes quantization, but the weights are whole: it is not used",
    )


def test_a_single_file_beside_an_index_is_what_the_library_reads_and_is_said(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path / "model", "llama", layers=1)
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    _, repository = our_answer(directory, TEXT, 1)
    assert "remove the one that is left over" in repository.notes[0]
    (directory / "model.safetensors").write_bytes(b"")
    with pytest.raises(SubspecError) as caught:
        open_checkpoint(directory)
    assert "model.safetensors is left over, remove it" in caught.value.hint


def test_a_model_that_names_no_end_says_so(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path / "model", "llama", layers=1)
    edit("generation_config.json", eos_token_id=None)(directory)
    _, repository = our_answer(directory, TEXT, 1)
    assert "no file of the model names a token that ends an answer" in repository.notes[0]


@pytest.mark.parametrize(
    "generation", [None, {}, {"eos_token_id": None}, {"eos_token_id": 3}, {"eos_token_id": [3, 5]}]
)
@pytest.mark.parametrize("named", [..., None, 7, [7, 9]])
def test_what_ends_an_answer_is_what_the_library_reads(
    tmp_path: Path, generation: dict[str, Any] | None, named: Any
) -> None:
    directory = make_tiny_model(tmp_path / "model", "llama", layers=1)
    (directory / "generation_config.json").unlink()
    config(eos_token_id=named)(directory)
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    theirs = model.generation_config.eos_token_id
    expected = () if theirs is None else tuple(theirs) if isinstance(theirs, list) else (theirs,)
    assert read_end_ids(json.loads((directory / "config.json").read_text()), generation) == expected


def test_a_conversation_that_passes_the_switch_is_read_anew(shelf: Shelf) -> None:
    """Cached rows that were turned by the short factors are no part of a prompt that is turned by the long ones."""
    table = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 100, **LONG}
    model = shelf.model("llama", rope_parameters=table)
    prompts = ["one two three four", "one two three four " * 6, "one two three four"]
    with open_tiny(model) as session:
        kept = [answer_to(session, prompt, 20, raw=True, keep_cache=True) for prompt in prompts]
        fresh = [answer_to(session, prompt, 20, raw=True) for prompt in prompts]
        plain = [answer_to(session, prompt, 20, raw=True, plain=True) for prompt in prompts]
    assert [answer.outcome for answer in kept] == [answer.outcome for answer in fresh]
    assert [answer.outcome for answer in plain] == [answer.outcome for answer in fresh]
    assert [answer.stats.prefilled_tokens for answer in kept] == [18, 114, 18]


@pytest.mark.parametrize("context", [64, 120, 400])
def test_tokens_do_not_depend_on_room_that_is_not_used(shelf: Shelf, context: int) -> None:
    table = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128, **LONG}
    with open_tiny(shelf.model("llama", rope_parameters=table), memory={"context": context}) as session:
        answer = answer_to(session, "one two three four", 20, raw=True)
    with open_tiny(shelf.model("llama", rope_parameters=table), memory={"context": 200}) as session:
        assert answer.outcome == answer_to(session, "one two three four", 20, raw=True).outcome


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "holds an adapter alone"),
        (["params.json", "consolidated.safetensors", "tekken.json"], "the vendor's own format"),
        (["model.gguf"], "GGUF files are not read"),
        (
            ["config.json", "tokenizer.json", "model-00001-of-00001.safetensors"],
            "rename model-00001-of-00001",
        ),
        (["config.json", "tokenizer.json", "model-00001-of-00002.safetensors"], "index.json too"),
        (["config.json", "tokenizer.json", "consolidated.safetensors"], "the vendor's own format"),
        (["config.json", "tekken.json", "model.safetensors"], "mistral-common"),
        (["config.json", "tokenizer.json", "model.safetensors.index.json"], "lacks 1 of the 1 files"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_places_that_hold_no_usable_model_are_named(tmp_path: Path, names: list[str], words: str) -> None:
    for name in names:
        (tmp_path / name).write_text('{"model_type": "llama", "weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(SubspecError) as caught:
        open_checkpoint(tmp_path)
    assert words in f"{caught.value.message} {caught.value.hint}"
    assert caught.value.hint


@pytest.mark.parametrize("write", TOKENIZERS, ids=lambda write: write.__name__)
def test_other_forms_of_a_tokenizer(tmp_path: Path, write: Callable[[Path], None]) -> None:
    directory = make_tiny_model(tmp_path / "model", "llama", layers=1, dtype=torch.float32)
    write(directory)
    theirs, _ = library_answer(directory, TEXT, 3, torch.float32)
    ours, _ = our_answer(directory, TEXT, 3)
    assert (ours.prompt_ids, ours.token_ids) == (theirs.prompt_ids, theirs.token_ids)
    assert len(ours.prompt_ids) > 3


def test_changed_repositories_answer_as_the_library_does_or_are_refused(tmp_path: Path) -> None:
    """A part of `python tests/repository_fuzz.py`, which makes 2,000 of them."""
    faults: list[str] = []

    def keep(verdict: Verdict) -> None:
        if verdict.kind not in ("same", "refused"):
            faults.append(f"{verdict.kind}: {verdict.what}")

    counts = run_all(range(120), tmp_path, keep)
    assert faults == []
    assert counts["same"] > 20
    assert counts["refused"] > 20
