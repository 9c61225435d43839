"""The configuration of the model, from the metadata of its GGUF file."""

from __future__ import annotations

from typing import Any

import numpy as np

from smollm2.errors import SmolLM2Error
from smollm2.gguf_model import GgufModel


def llama_config(model: GgufModel, dtype: str) -> dict[str, Any]:
    """Content of `config.json`. Raises SmolLM2Error if the file holds another kind of model."""
    for key, wanted in {"general.architecture": "llama", "tokenizer.ggml.pre": "smollm"}.items():
        if (found := model.field(key, str)) != wanted:
            raise SmolLM2Error(f"{key} is {found!r}, expected {wanted!r}: this is no SmolLM2")
    hidden, heads, kv_heads = (
        model.field(f"llama.{key}", int)
        for key in ("embedding_length", "attention.head_count", "attention.head_count_kv")
    )
    if min(hidden, heads, kv_heads) < 1 or hidden % heads or heads % kv_heads:
        raise SmolLM2Error(f"hidden size {hidden}, {heads} heads and {kv_heads} kv heads do not fit together")
    if (rotary := model.field("llama.rope.dimension_count", int)) != hidden // heads or rotary % 2:
        raise SmolLM2Error(
            f"{rotary} rotary dimensions of heads of {hidden // heads}: all are needed, and even"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "hidden_size": hidden,
        "num_hidden_layers": model.field("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": model.field("llama.feed_forward_length", int),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": len(model.field("tokenizer.ggml.tokens", list)),
        "max_position_embeddings": model.field("llama.context_length", int),
        "rms_norm_eps": _decimal(model.field("llama.attention.layer_norm_rms_epsilon", float)),
        "rope_parameters": {
            "rope_theta": _decimal(model.field("llama.rope.freq_base", float)),
            "rope_type": "default",
        },
        # GGUF stores the head only if it differs from the embedding.
        "tie_word_embeddings": "output.weight" not in model.tensors,
        **token_ids(model),
    }


def token_ids(model: GgufModel) -> dict[str, int]:
    """The ids that begin, end and fill a sequence, as the configuration files name them."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: model.field(f"tokenizer.ggml.{name}_token_id", int) for key, name in names.items()}


def _decimal(value: float) -> float:
    """The shortest decimal number that rounds to the file's float32: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))
