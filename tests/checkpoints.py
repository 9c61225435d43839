"""Tiny checkpoints in the Hugging Face layout, of plain bytes: a Qwen2 shape, a byte-level tokenizer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from subspec_cli.checkpoint.checkpoint import open_checkpoint
from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.repository import read_repository

RawTensor = tuple[str, tuple[int, ...], bytes]
"""dtype as safetensors spells it, shape, data."""

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1, "I64": 8}


def geometry_in(directory: Path) -> ModelGeometry:
    """Geometry of the checkpoint in a directory."""
    return read_repository(open_checkpoint(directory)).geometry


def safetensors_bytes(tensors: dict[str, RawTensor]) -> bytes:
    """A safetensors file with the tensors in the order given."""
    header: dict[str, Any] = {}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        assert len(data) == math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + len(data)],
        }
        position += len(data)
    return framed(json.dumps(header)) + b"".join(data for _, _, data in tensors.values())


def framed(header: str | bytes) -> bytes:
    """A header text with its length before it, padded to 8 bytes as the writers do."""
    text = header if isinstance(header, bytes) else header.encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bf16(values: np.ndarray) -> RawTensor:
    """Float32 values cut to bfloat16."""
    halves = (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return ("BF16", values.shape, halves.tobytes())


def tiny_config(*, layers: int = 3, hidden: int = 32, **more: Any) -> dict[str, Any]:
    """config.json of a Qwen2 with 4 heads, 2 of them for keys and values."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": 256,
        "eos_token_id": 0,
    } | more


def tiny_tensors(*, layers: int = 3, hidden: int = 32, seed: int = 0) -> dict[str, RawTensor]:
    """Random weights that fit `tiny_config`."""
    generator = np.random.default_rng(seed)
    half = hidden // 2
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (256, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.q_proj.bias": (hidden,),
            f"{prefix}.self_attn.k_proj.weight": (half, hidden),
            f"{prefix}.self_attn.k_proj.bias": (half,),
            f"{prefix}.self_attn.v_proj.weight": (half, hidden),
            f"{prefix}.self_attn.v_proj.bias": (half,),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate_proj.weight": (2 * hidden, hidden),
            f"{prefix}.mlp.up_proj.weight": (2 * hidden, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, 2 * hidden),
        }
    shapes["model.norm.weight"] = (hidden,)
    return {name: bf16(0.2 * generator.standard_normal(shape)) for name, shape in shapes.items()}


def write_checkpoint(
    directory: Path, *, layers: int = 3, hidden: int = 32, shards: int = 1, seed: int = 0, **config: Any
) -> Path:
    """Write a complete model; with several shards, layers straddle them."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(tiny_config(layers=layers, hidden=hidden, **config)))
    write_tokenizer(directory)
    write_weights(directory, tiny_tensors(layers=layers, hidden=hidden, seed=seed), shards=shards)
    return directory


def write_weights(directory: Path, tensors: dict[str, RawTensor], *, shards: int = 1) -> None:
    """Write one file, or several with an index, cut into runs of equally many tensors."""
    if shards == 1:
        (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return
    names = list(tensors)
    file_of = {}
    for shard, part in enumerate(np.array_split(np.arange(len(names)), shards), start=1):
        name = f"model-{shard:05d}-of-{shards:05d}.safetensors"
        chosen = {names[number]: tensors[names[number]] for number in part}
        (directory / name).write_bytes(safetensors_bytes(chosen))
        file_of |= dict.fromkeys(chosen, name)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": file_of})
    )


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer of 256 tokens, with a chat template."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet = {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {alphabet[byte]: byte for byte in range(256)}, "merges": []},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def as_hub_snapshot(directory: Path, cache: Path, commit: str, repo: str = "models--org--tiny") -> Path:
    """Move a checkpoint's files into the hub cache's layout: blobs, and a snapshot of links to them."""
    blobs, snapshot = cache / repo / "blobs", cache / repo / "snapshots" / commit
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(directory.iterdir())):
        path.rename(blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    refs = cache / repo / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    return snapshot
