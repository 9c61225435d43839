"""8-bit sources: the library's weights bit for bit, half of the link's bytes, and refusals by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import eight_bit_models
import pytest
import tiny_models
import torch
from eight_bit_models import FORMS, dequantized, make_eight_bit, widened_model, widened_weights
from fakes_session import answer_to, audit_of, open_tiny, prepare_quietly
from safetensors.torch import load_file, save_file
from tiny_models import Tiny, make_tiny_model
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.quantizers import quantizer_finegrained_fp8

from subspec_cli.__main__ import main
from subspec_cli.checkpoint import compiled_widening
from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.checkpoint.tensor_reader import read_tensors
from subspec_cli.checkpoint.widening import widen, widened_tensors
from subspec_cli.planning.assumed_costs import assumed_costs
from subspec_cli.planning.timing import widen_s
from subspec_cli.probe.widening import widen_rate
from subspec_cli.substitutes.prepared_model import find_prepared

one_thread = tiny_models.one_thread
PROMPT = "Why is the sky blue, and the sea, and what else is blue? " * 3
NUMBERS = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
"""All codes but the two that are NaN."""
Held = dict[str, Tensor]


def made(root: Path, family: str = "llama", form: str = "block", **how: Any) -> Path:
    """A tiny model in 8 bits, with blocks on both sides of each border."""
    more = {"pad_token_id": 0} if family == "phi3" else {}
    make_tiny_model(root, family, hidden=256, layers=2, tied=False, **more)
    return make_eight_bit(root, form, **how)


def wrapped(directory: Path) -> Path:
    """Make a Mistral the text part of a larger model, with a tensor of its vision part."""
    config = json.loads((directory / "config.json").read_text())
    outer = {
        "model_type": "mistral3",
        "architectures": ["Mistral3ForConditionalGeneration"],
        "quantization_config": config.pop("quantization_config"),
        "tie_word_embeddings": False,
        "text_config": config,
    }
    (directory / "config.json").write_text(json.dumps(outer))

    def rename(held: Held) -> Held:
        return {f"language_model.{name}": value for name, value in held.items()} | {
            "vision_tower.patch.weight": torch.ones(3)
        }

    return changed(directory, rename)


def changed(directory: Path, change: Callable[[Held], Held | None]) -> Path:
    """Write the weights again after a change."""
    path = directory / "model.safetensors"
    held = load_file(path)
    save_file(change(held) or held, path, metadata={"format": "pt"})
    return directory


def own_weights(directory: Path) -> Held:
    """The matrices of layers as this program reads them."""
    found = widened_tensors(read_tensors(Tiny(directory).repository.tensors.values()), torch.bfloat16)
    return {name: value for name, value in found.items() if name.endswith("_proj.weight")}


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused projections among the families that can be written."""
    monkeypatch.setitem(tiny_models.FAMILIES, "phi3", type(CONFIG_MAPPING["phi3"]()))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_of_the_definition(tmp_path, form, scale_dtype):
    directory = made(tmp_path, form=form, scale_dtype=scale_dtype)
    expected, found = widened_weights(directory), own_weights(directory)
    assert len(found) == 14
    assert all(same_bits(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("form", ["block", "static"])
def test_weights_are_those_of_the_library(tmp_path, monkeypatch, form, scale_dtype):
    # The library wants its companion for the devices that it does not use here.
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    directory = made(tmp_path, form=form, scale_dtype=scale_dtype)
    library, found = eight_bit_models.library_weights(directory), own_weights(directory)
    assert all(same_bits(found[name], library[name]) for name in found)


@pytest.fixture(params=["compiled", "operations"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widening by numba, and where it is not installed."""
    if request.param == "operations":
        monkeypatch.setattr(compiled_widening, "_compiled_rows", lambda: None)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(way, threads):
    torch.set_num_threads(threads)
    codes = NUMBERS[torch.randint(len(NUMBERS), (1026, 1024))].view(torch.float8_e4m3fn)
    scales, out = torch.rand(3, 2), torch.empty(codes.shape, dtype=torch.bfloat16)
    widen(codes, scales, out)
    assert same_bits(out, dequantized(codes, scales))


@pytest.mark.parametrize("scale", [1.0, -0.37, 3e-5, 1e-38, 127.9, 129.0, 7e5, 5e37])
def test_every_code_is_widened_exactly(way, scale):
    codes = NUMBERS.repeat(3, 1).view(torch.float8_e4m3fn)
    scales = torch.tensor([scale])
    out = torch.empty(codes.shape, dtype=torch.bfloat16)
    widen(codes, scales, out)
    assert same_bits(out, dequantized(codes, scales))


@pytest.mark.parametrize(
    ("rows", "columns", "grid"),
    [(256, 384, (2, 3)), (4096, 256, (1, 1)), (4099, 130, (4099, 1)), (1, 1, (1, 1))],
)
def test_strips_and_units_of_every_shape(way, rows, columns, grid):
    codes = NUMBERS[torch.randint(len(NUMBERS), (rows, columns))].view(torch.float8_e4m3fn)
    scales = torch.rand(grid) * 1e-3
    out = torch.empty(codes.shape, dtype=torch.bfloat16)
    widen(codes, scales, out)
    assert same_bits(out, dequantized(codes, scales))


def outcomes(directory: Path, **flags: Any) -> tuple[Any, Any]:
    with open_tiny(directory, **flags) as session:
        answer = answer_to(session, PROMPT, 16)
        assert session.description.exactness == "exact"
        if answer.stats.passes:
            assert answer.stats.streamed_bytes == session.plan.streamed_bytes_per_pass * answer.stats.passes
        return answer.outcome, session


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *(
            pytest.param("llama", form, marks=() if form == "block" else pytest.mark.slow)
            for form in FORMS
            if form not in ("static", "channel")
        ),
        pytest.param("phi3", "block", marks=pytest.mark.slow),
        ("mistral", "static"),
        ("mistral", "channel"),
    ],
)
def test_tokens_are_those_of_the_widened_model_from_half_the_bytes(
    tmp_path, monkeypatch, families, family, form
):
    """Speculative and plain, streamed and resident; Mistral is the text part of a larger model."""
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))
    directory = made(tmp_path / "8", family, form)
    wide = widened_model(directory, tmp_path / "16")
    if family == "mistral":
        wrapped(directory)
    prepare_quietly(directory)
    prepare_quietly(wide)
    digests = [
        [file.sha256 for file in find_prepared(str(path)).manifest.layers] for path in (directory, wide)
    ]
    assert digests[0] == digests[1]
    expected, plain = outcomes(wide, draft={"no_speculation": True})
    found = [
        outcomes(directory, memory={"resident_layers": resident}, draft={"no_speculation": no_draft})
        for resident, no_draft in ((0, False), (1, False), (0, True), (None, True))
    ]
    assert [outcome for outcome, _ in found] == [expected] * len(found)
    assert found[0][1].description.speculation
    assert not found[3][1].plan.streamed
    widened = [any(line.label == "widened weights" for line in session.plan.lines) for _, session in found]
    assert widened == [True, True, True, False]
    share = found[2][1].plan.streamed_bytes_per_pass / plain.plan.streamed_bytes_per_pass
    assert 0.5 < share < 0.51
    assert main(["models", "verify", str(directory)]) == 0


def test_matrices_of_other_types_beside_8_bits_are_cast(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))
    directory = made(tmp_path / "8", kept=("layers.0.mlp.up", "layers.1.self_attn"))

    def cast(held: Held) -> None:
        held["model.layers.1.self_attn.k_proj.weight"] = (
            held["model.layers.1.self_attn.k_proj.weight"].float() + 1e-4
        )
        held["model.norm.weight"] = held["model.norm.weight"].float()

    changed(directory, cast)
    assert "2 tensors stored as F32 are used as BF16" in Tiny(directory).repository.notes[1]
    wide = widened_model(directory, tmp_path / "16")
    changed(wide, lambda held: {name: value.bfloat16() for name, value in held.items()})
    prepare_quietly(directory)
    prepare_quietly(wide)
    assert outcomes(directory)[0] == outcomes(wide, draft={"no_speculation": True})[0]


def test_a_layer_waits_for_scales_in_another_file(tmp_path):
    """The scale belongs to its layer wherever it is, so its bytes are hashed with it."""
    make_tiny_model(tmp_path, "llama", hidden=256, layers=2, tied=False, sharded=True)
    make_eight_bit(tmp_path, "channel")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    here = index["weight_map"][name]
    other = next(file for file in sorted(set(index["weight_map"].values())) if file != here)
    held, further = load_file(tmp_path / here), load_file(tmp_path / other)
    further[name] = held.pop(name)
    save_file(held, tmp_path / here)
    save_file(further, tmp_path / other)
    index["weight_map"][name] = other
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    expected, found = widened_weights(tmp_path), own_weights(tmp_path)
    assert all(same_bits(found[name], expected[name]) for name in found)
    assert Tiny(tmp_path).repository.tensors[name].path.name == other


def test_a_changed_scale_is_found_and_the_note_names_what_is_not_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))
    directory = made(tmp_path / "8", form="static")
    assert main(["prepare", str(directory)]) == 0
    assert "14 scales of activations left unused" in capsys.readouterr().err
    entry: TensorEntry = Tiny(directory).repository.tensors["model.layers.1.mlp.up_proj.weight_scale"]
    before = entry.path.stat()
    data = bytearray(entry.path.read_bytes())
    data[entry.offset_bytes] ^= 1
    entry.path.write_bytes(data)
    os.utime(entry.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert main(["models", "verify", str(directory)]) == 6
    captured = capsys.readouterr()
    assert "wrong SHA-256 of the 16-bit layer 1" in captured.out + captured.err


@pytest.mark.parametrize("form", ["block", "channel"])
def test_an_audit_widens_as_the_library_does(tmp_path, monkeypatch, form):
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))
    directory = made(tmp_path / "8", form=form)
    prepare_quietly(directory)
    with open_tiny(directory) as session:
        report = audit_of(session, PROMPT, answer_to(session, PROMPT, 12))
    assert report.problems == ()


def test_widening_takes_computing_time(tmp_path):
    geometry = Tiny(made(tmp_path)).geometry
    cpu = torch.device("cpu")
    assert widen_rate(geometry, cpu) > 0
    assert widen_rate(replace(geometry, stored=None), cpu) == 0
    costs = assumed_costs(geometry, "cpu")
    assert widen_s(costs, geometry, 2) == pytest.approx(
        sum(geometry.link_layer_bytes) / costs.widen_bytes_per_s
    )


def retyped(part: str, dtype: torch.dtype) -> Callable[[Held], Held]:
    return lambda held: {name: t.to(dtype) if part in name else t for name, t in held.items()}


def added(name: str, value: Tensor) -> Callable[[Held], Held]:
    return lambda held: held | {f"model.layers.0.{name}": value}


def dropped(part: str) -> Callable[[Held], Held]:
    return lambda held: {name: t for name, t in held.items() if part not in name}


def ragged(held: Held) -> Held:
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    return held | {name: torch.ones(3, 2)}


def kept_wide(held: Held) -> None:
    held["model.layers.0.mlp.up_proj.weight"] = held["model.layers.0.mlp.up_proj.weight"].bfloat16()


def nan_code(held: Held) -> None:
    held["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)[3, 5] = 0xFF


def quantization(form: str, *path: str, **fields: Any) -> dict[str, Any]:
    table = eight_bit_models.quantization_config(form)
    inner = table
    for part in path:
        inner = inner[part]
    inner.update(fields)
    return table


WEIGHTS = ("config_groups", "group_0", "weights")
REFUSED: dict[str, tuple[str, dict[str, Any] | None, Callable[[Held], Held | None] | None, int, str]] = {
    "scales of powers of two": ("block", quantization("block", scale_fmt="ue8m0"), None, 3, "scale_fmt 'ue8m0'"),
    "their type": ("block", None, retyped("weight_scale_inv", torch.float8_e8m0fnu), 3, "F8_E8M0 (ue8m0)"),
    "scales of 16 bits": ("block", None, retyped("weight_scale_inv", torch.float16), 3, "are of type F16"),
    "zero points": ("channel", None, added("mlp.up_proj.weight_zero_point", torch.zeros(1)), 3, "zero points"),
    "asymmetric": ("channel", quantization("channel", *WEIGHTS, symmetric=False), None, 3, "symmetric False"),
    "a ragged block": ("block", None, ragged, 3, "is not whole units of block 128 x 128"),
    "scales of a cache": ("tensor", None, added("self_attn.k_scale", torch.ones(1)), 3, "scales of a KV cache"),
    "a cache in 8 bits": (
        "tensor", quantization("tensor", kv_cache_scheme={"num_bits": 8}), None, 3, "kv_cache_scheme"),
    "a code that is NaN": ("block", None, nan_code, 6, "holds 1 values that are NaN (codes 0x7F and 0xFF)"),
    "no scale": ("block", None, dropped("up_proj.weight_scale_inv"), 3, "without weight_scale_inv"),
    "a scale of 16-bit weights": ("block", None, kept_wide, 3, "is a scale, but no"),
    "a head in 8 bits": ("block", None, retyped("lm_head", torch.float8_e4m3fn), 3, "lm_head.weight is stored in 8"),
    "integers": ("channel", quantization("channel", *WEIGHTS, type="int"), None, 3, "type 'int'"),
    "groups": ("channel", quantization("channel", *WEIGHTS, strategy="group"), None, 3, "strategy 'group'"),
    "outputs": (
        "channel", quantization("channel", "config_groups", "group_0", output_activations={"num_bits": 8}), None,
        3, "output_activations"),
    "another method": ("block", {"quant_method": "fbgemm_fp8"}, None, 3, "already quantized (fbgemm_fp8)"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "table", "change", "status", "message"), REFUSED.values(), ids=REFUSED.keys()
)
def test_what_is_not_run_is_refused_by_name(
    tmp_path, monkeypatch, capsys, form, table, change, status, message
):
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))
    directory = made(tmp_path / "8", form=form)
    if table is not None:
        config = json.loads((directory / "config.json").read_text()) | {"quantization_config": table}
        (directory / "config.json").write_text(json.dumps(config))
    if change is not None:
        changed(directory, change)
    assert main(["prepare", str(directory)]) == status
    assert message in capsys.readouterr().err
