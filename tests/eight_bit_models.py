"""Tiny models with matrices in 8 bits: the weights of a 16-bit one, quantized in each of the five forms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import AUTO
from torch import Tensor

FORMS = ("block", "static", "tensor", "channel", "block_structure")
"""Scales by block and per tensor as Mistral has them; compressed-tensors by tensor, channel and block."""
_PROJECTIONS = ("_proj.weight",)
_LARGEST_CODE = 448.0


def quantization_config(form: str) -> dict[str, Any]:
    """What config.json says of a form."""
    if form == "block":
        return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    if form == "static":
        return {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    weights = {
        "type": "float",
        "num_bits": 8,
        "symmetric": True,
        "dynamic": False,
        "strategy": form.removesuffix("_structure"),
        "block_structure": [128, 128] if form == "block_structure" else None,
    }
    inputs = {"type": "float", "num_bits": 8, "symmetric": True, "dynamic": form != "tensor"}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        },
    }


def quantized(weight: Tensor, form: str, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Codes `[R, C]` and scales of a matrix."""
    rows, columns = weight.shape
    block = {"channel": (1, columns), "block": (128, 128), "block_structure": (128, 128)}.get(
        form, weight.shape
    )
    block = (min(block[0], rows), min(block[1], columns))
    tiles = weight.float().reshape(rows // block[0], block[0], columns // block[1], block[1])
    scale = (tiles.abs().amax((1, 3)) / _LARGEST_CODE).to(scale_dtype)
    codes = (tiles / scale.float()[:, None, :, None]).clamp(-_LARGEST_CODE, _LARGEST_CODE)
    if form in ("static", "tensor"):
        scale = scale.reshape(() if form == "static" else (1,))
    return codes.reshape(rows, columns).to(torch.float8_e4m3fn), scale


def dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    """The definition: one product in float32, rounded once."""
    rows, columns = codes.shape
    grid = scale.float().reshape(scale.shape if scale.dim() == 2 else (1, 1))
    tiles = codes.float().reshape(len(grid), rows // len(grid), grid.shape[1], columns // grid.shape[1])
    return (tiles * grid[:, None, :, None]).to(torch.bfloat16).reshape(rows, columns)


def make_eight_bit(
    directory: Path,
    form: str,
    *,
    scale_dtype: torch.dtype = torch.float32,
    kept: tuple[str, ...] = (),
) -> Path:
    """Quantize the matrices of the 16-bit model in a directory, in place; those with `kept` in their names stay."""
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = quantization_config(form)
    (directory / "config.json").write_text(json.dumps(config))
    index = directory / "model.safetensors.index.json"
    placed = json.loads(index.read_text()) if index.exists() else None
    is_fp8 = config["quantization_config"]["quant_method"] == "fp8"
    for path in sorted(directory.glob("*.safetensors")):
        held: dict[str, Tensor] = {}
        for name, tensor in load_file(path).items():
            if not name.endswith(_PROJECTIONS) or any(part in name for part in kept):
                held[name] = tensor
                continue
            codes, scale = quantized(tensor, form, scale_dtype)
            held |= {name: codes, f"{name}_scale_inv" if is_fp8 else f"{name}_scale": scale}
            if form in ("static", "tensor"):
                what = "activation_scale" if is_fp8 else "input_scale"
                held[name.replace("weight", what)] = torch.full_like(scale, 0.02)
        if placed is not None:
            placed["weight_map"] |= dict.fromkeys(held, path.name)
        save_file(held, path, metadata={"format": "pt"})
    if placed is not None:
        index.write_text(json.dumps(placed))
    return directory


def widened_model(directory: Path, target: Path) -> Path:
    """A copy of an 8-bit model with its matrices in BF16 by the definition, as a plain checkpoint."""
    target.mkdir()
    for path in directory.iterdir():
        if not path.name.startswith("model"):
            (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    save_file(widened_weights(directory), target / "model.safetensors", metadata={"format": "pt"})
    return target


def widened_weights(directory: Path) -> dict[str, Tensor]:
    """All weights of an 8-bit model by the definition, under the names that they have in its files."""
    stored: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        stored |= load_file(path)
    return {
        name: dequantized(tensor, _scale_of(name, stored)) if tensor.dtype == torch.float8_e4m3fn else tensor
        for name, tensor in stored.items()
        if not name.endswith(("_scale", "_scale_inv"))
    }


def _scale_of(name: str, stored: Mapping[str, Tensor]) -> Tensor:
    return next(stored[f"{name}{end}"] for end in ("_scale", "_scale_inv") if f"{name}{end}" in stored)


def library_weights(directory: Path) -> dict[str, Tensor]:
    """What the library makes of a model on a machine without a GPU."""
    model = AUTO.from_pretrained(directory, dtype=torch.bfloat16)
    return dict(model.state_dict())
