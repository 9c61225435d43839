"""The weights under the names and in the row order of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from smollm2.errors import SmolLM2Error
from smollm2.gguf_model import GgufModel

PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names of a layer's tensors: llama.cpp's, transformers'."""


def read_weights(model: GgufModel, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors in `dtype`. Raises SmolLM2Error if the file's tensors are not those of `config`."""
    shapes = _shapes(config)
    if model.tensors.keys() != shapes.keys():
        odd = sorted(model.tensors.keys() ^ shapes.keys())
        raise SmolLM2Error(f"{len(odd)} tensors are missing or unknown, such as {odd[0]}")
    for name, shape in shapes.items():
        if model.shape(name) != shape:
            raise SmolLM2Error(f"{name} has shape {model.shape(name)}, expected {shape}")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for name in shapes:
        values, part = model.values(name), name.split(".")[-2]
        if part in heads:
            values = unpermuted(values, heads[part])
        weights[_name(name)] = values.to(dtype).contiguous()
    return weights


def unpermuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key matrix [heads x head size, hidden] in transformers' order.

    llama.cpp rotates neighbours, transformers rotates row i with row i + half; so llama.cpp's converter
    interleaves the two halves of each head, and this takes them apart.
    """
    rows, hidden = weight.shape
    return weight.view(heads, rows // heads // 2, 2, hidden).transpose(1, 2).reshape(rows, hidden)


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the file must hold, by llama.cpp's name, in the order of a forward."""
    hidden, units, vocab = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = config["num_key_value_heads"] * config["head_dim"]
    parts: dict[str, tuple[int, ...]] = dict.fromkeys(PARTS, (hidden,)) | {
        "attn_q": (hidden, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (units, hidden),
        "ffn_up": (units, hidden),
        "ffn_down": (hidden, units),
    }
    layers = range(config["num_hidden_layers"])
    shapes = {
        "token_embd.weight": (vocab, hidden),
        **{f"blk.{layer}.{part}.weight": shape for layer in layers for part, shape in parts.items()},
        "output_norm.weight": (hidden,),
    }
    return shapes if config["tie_word_embeddings"] else shapes | {"output.weight": (vocab, hidden)}


def _name(name: str) -> str:
    """The name in transformers of a tensor that llama.cpp calls `name`."""
    ends = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    *layer, part, kind = name.split(".")
    return f"model.layers.{layer[1]}.{PARTS[part]}.{kind}" if layer else f"{ends[part]}.{kind}"
