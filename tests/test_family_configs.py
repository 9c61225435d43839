"""Configurations that are written oddly: we compute what the library computes, or refuse the file by name.

The library fails on some of them; then we refuse too. No file may give other logits than the library's in silence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from family_cases import CASES, FULL, SLIDING
from test_families import quiet
from tiny_models import AUTO, VISION, WRAPPED, Tiny, make_tiny_model

from subspec_cli.errors import IntegrityError, UnsupportedModelError

GONE: Final = object()
"""A field that is taken out of the file."""
YARN: Final = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR_ROPE: Final = {"rope_type": "linear", "factor": 4.0}

ODD: Final[dict[str, tuple[dict[str, Any], ...]]] = {
    "mistral": ({"sliding_window": GONE}, {"sliding_window": 0}, {"head_dim": None}),
    "ministral3": (
        {"rope_parameters": GONE},
        {"rope_parameters": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.2}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"head_dim": GONE},
        {"head_dim": None},
    ),
    "ministral": (
        {"head_dim": None},
        {"head_dim": GONE},
        {"layer_types": GONE},
        {"layer_types": None, "sliding_window": None},
        {"layer_types": [FULL] * 3, "sliding_window": None},
        {"layer_types": None, "sliding_window": GONE},
        {"layer_types": [FULL, SLIDING]},
        {"layer_types": [SLIDING, FULL, "chunked_attention"]},
        {"sliding_window": None},
    ),
    "granite": (
        {"sliding_window": 5},
        {"embedding_multiplier": GONE},
        {"logits_scaling": 0},
        {"attention_multiplier": None},
        {"head_dim": 16},
        {"head_dim": None},
        {"rope_parameters": {FULL: {"rope_type": "default"}}},
    ),
    "seed_oss": (
        {"head_dim": GONE},
        {"head_dim": None},
        {"attention_bias": GONE},
        {"attention_out_bias": True},
    ),
    "phi3": (
        {"rope_parameters": GONE, "rope_scaling": None},
        {"rope_parameters": GONE, "partial_rotary_factor": 0.5},
        {"partial_rotary_factor": 0.5},
        {"rope_scaling": YARN},
        {"rope_scaling": LINEAR_ROPE},
        {"head_dim": 16},
        {"sliding_window": GONE},
        {"sliding_window": None},
    ),
    "smollm3": (
        {"no_rope_layers": GONE},
        {"no_rope_layers": GONE, "no_rope_layer_interval": 2},
        {"no_rope_layers": []},
        {"no_rope_layers": [1, 0]},
        {"no_rope_layers": [1, 0, 1, 0, 1, 0, 0]},
        {"layer_types": GONE, "use_sliding_window": True, "sliding_window": 5},
        {"layer_types": [SLIDING] * 5, "use_sliding_window": False, "sliding_window": 5},
        {"layer_types": [SLIDING] * 5},
        {"layer_types": [SLIDING] * 5, "use_sliding_window": True, "sliding_window": None},
        {"rope_parameters": GONE},
        {"rope_parameters": GONE, "rope_theta": 100.0},
    ),
    "olmo2": ({"head_dim": 32}, {"rope_scaling": YARN}, {"rope_parameters": GONE, "rope_theta": 100.0}),
    "olmo3": (
        {"layer_types": [FULL] * 5, "sliding_window": None},
        {"layer_types": GONE},
        {"sliding_window": None},
        {"sliding_window": GONE},
        {"rope_parameters": GONE, "rope_theta": 100.0},
        {"rope_parameters": GONE, "rope_scaling": YARN},
        {"rope_parameters": GONE, "rope_scaling": YARN, "rope_theta": 100.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"rope_parameters": {FULL: YARN}},
        {"rope_parameters": {SLIDING: LINEAR_ROPE}},
        {"sliding_window_pattern": 2, "layer_types": GONE},
    ),
    "glm4": (
        {"rope_parameters": GONE},
        {"partial_rotary_factor": 0.25},
        {"rope_parameters": GONE, "partial_rotary_factor": 0.25},
        {"head_dim": GONE},
        {"attention_bias": GONE},
    ),
    "gemma2": (
        {"layer_types": [FULL] * 3, "sliding_window": None},
        {"layer_types": GONE},
        {"sliding_window": None},
        {"sliding_window": GONE},
        {"attn_logit_softcapping": GONE},
        {"attn_logit_softcapping": None},
        {"final_logit_softcapping": GONE},
        {"query_pre_attn_scalar": GONE},
        {"hidden_activation": GONE},
        {"hidden_activation": "gelu"},
        {"hidden_act": "silu"},
        {"use_bidirectional_attention": True},
        {"sliding_window_pattern": 3, "layer_types": GONE},
        {"num_attention_heads": 10},
    ),
    "gemma3": (
        {"layer_types": [FULL] * 7, "sliding_window": None},
        {"layer_types": GONE},
        {"layer_types": GONE, "sliding_window_pattern": 3},
        {"layer_types": GONE, "_sliding_window_pattern": 3},
        {"sliding_window": None},
        {"sliding_window": GONE},
        {"rope_parameters": GONE},
        {"rope_parameters": GONE, "rope_theta": 100.0, "rope_local_base_freq": 50.0},
        {"rope_parameters": GONE, "rope_scaling": LINEAR_ROPE},
        {"rope_parameters": GONE, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"rope_parameters": {FULL: LINEAR_ROPE}},
        {"attn_logit_softcapping": 2.0},
        {"final_logit_softcapping": 2.0},
        {"use_bidirectional_attention": True},
    ),
    "exaone4": (
        {"layer_types": GONE},
        {"layer_types": GONE, "sliding_window_pattern": 2},
        {"layer_types": GONE, "sliding_window_pattern": "LLLG"},
        {"layer_types": GONE, "sliding_window_pattern": None},
        {"layer_types": GONE, "sliding_window": None},
        {"layer_types": [FULL] * 5, "sliding_window": None},
        {"layer_types": [FULL] * 5},
        {"layer_types": [SLIDING] * 5, "sliding_window": None},
        {"sliding_window": GONE},
        {"head_dim": 32},
    ),
    "cohere2": (
        {"layer_types": [FULL] * 5, "sliding_window": None},
        {"layer_types": GONE},
        {"layer_types": GONE, "sliding_window_pattern": 2},
        {"sliding_window": None},
        {"logit_scale": GONE},
        {"logit_scale": 1},
        {"head_dim": GONE},
        {"head_dim": 32},
        {"rope_parameters": GONE, "rope_theta": 100.0},
        {"use_qk_norm": True},
        {"tie_word_embeddings": GONE},
    ),
    "hunyuan": (
        {"head_dim": None},
        {"head_dim": GONE},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        {"rope_parameters": GONE, "rope_scaling": {"type": "dynamic", "alpha": 10.0, "factor": 1.0}},
        {"rope_parameters": GONE},
    ),
    "stablelm": (
        {"rope_parameters": GONE},
        {"rope_parameters": GONE, "partial_rotary_factor": 0.5},
        {"rope_parameters": GONE, "rope_scaling": LINEAR_ROPE},
        {"rope_scaling": YARN},
        {"head_dim": 24},
        {"head_dim": 12},
        {"head_dim": None},
        {"use_qkv_bias": GONE},
        {"use_parallel_residual": True},
        {"qk_layernorm": True},
        {"layer_norm_eps": GONE},
        {"hidden_act": "gelu"},
        {"sliding_window": 5},
    ),
    "stablelm, odd": ({"use_parallel_residual": GONE}, {"qk_layernorm": GONE}, {"num_attention_heads": 5}),
    "mistral in mistral3": (
        {"tie_word_embeddings": GONE},
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": True, "text_config.tie_word_embeddings": True},
        {"tie_word_embeddings": GONE, "text_config.tie_word_embeddings": GONE},
        {"tie_word_embeddings": False, "text_config.tie_word_embeddings": True},
        {"text_config.model_type": GONE},
        {"text_config.rope_parameters": GONE},
        {"text_config.rope_parameters": GONE, "rope_theta": 100.0},
        {"text_config.head_dim": GONE},
        {"text_config.sliding_window": GONE},
        {"text_config.sliding_window": GONE, "text_config.model_type": GONE},
        {"text_config.rms_norm_eps": GONE},
        {"text_config.rms_norm_eps": GONE, "text_config.model_type": GONE},
        {"text_config.architectures": ["LlamaForCausalLM"]},
        {"text_config.model_type": "llama"},
        {"architectures": GONE},
        {"sliding_window": 5},
    ),
    "mistral in mistral3, odd": (
        {"tie_word_embeddings": GONE},
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": GONE, "text_config.tie_word_embeddings": False},
        {"tie_word_embeddings": False, "text_config.tie_word_embeddings": True},
    ),
    "gemma3 in gemma3": (
        {"tie_word_embeddings": GONE},
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": GONE, "text_config.tie_word_embeddings": False},
        {"text_config.layer_types": GONE},
        {"text_config.rope_parameters": GONE},
        {"text_config.model_type": GONE},
        {"text_config.rope_parameters": GONE, "text_config.rope_scaling": LINEAR_ROPE},
        {"text_config.sliding_window": GONE},
        {"text_config.head_dim": GONE},
        {"text_config.vocab_size": GONE},
        {"text_config.final_logit_softcapping": 3.0},
    ),
    "gemma3 in gemma3, odd": ({"tie_word_embeddings": GONE}, {"tie_word_embeddings": True}),
    "gemma4 in gemma4": (
        {"tie_word_embeddings": GONE},
        {"tie_word_embeddings": False},
    ),
    "gemma4": (
        {"rope_parameters": {}},
        {"rope_scaling": LINEAR_ROPE},
        {"layer_types": GONE},
        {"hidden_size_per_layer_input": GONE},
        {"rope_parameters": GONE},
        {"global_head_dim": GONE},
        {"per_layer_config": GONE},
    ),
}
"""By the name of a case: fields that are set otherwise than the library wrote them, several at a time."""


def changed(directory: Path, target: Path, changes: dict[str, Any]) -> Path:
    """A copy of a model whose config.json is edited."""
    target.mkdir()
    for path in directory.iterdir():
        (target / path.name).symlink_to(path)
    config = json.loads((directory / "config.json").read_text())
    for name, value in changes.items():
        inside, _, field = name.rpartition(".")
        table = config[inside] if inside else config
        table.pop(field, None)
        if value is not GONE:
            table[field] = value
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config))
    return target


def library_logits(directory: Path, token_ids: list[int]) -> torch.Tensor:
    """What the library computes; it may fail in any way, or fill missing weights with random numbers."""
    kind = json.loads((directory / "config.json").read_text())["model_type"]
    auto = WRAPPED if kind in VISION else AUTO
    model, info = auto.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise ValueError(f"the weights do not fit: {info}")
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(torch.tensor([token_ids])).logits[0]
    return logits


def our_logits(directory: Path, token_ids: list[int]) -> torch.Tensor:
    """What we compute. Raises SubspecError for a repository that is refused."""
    model = Tiny(directory, context=64, scratch=8)
    decoder, kv = model.target(), model.kv()
    decoder.begin_answer(kv, len(token_ids))
    return model.prefill(decoder, kv, token_ids)


@pytest.mark.parametrize("name", ODD)
def test_odd_configurations_are_the_librarys_or_refused(tmp_path: Path, name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    token_ids = [(7 * n + n // 5) % 250 for n in range(40)]
    with quiet():
        model = make_tiny_model(tmp_path / "model", dtype=torch.float32, **case.how)
        for number, changes in enumerate(ODD[name]):
            directory = changed(model, tmp_path / str(number), changes)
            try:
                ours = our_logits(directory, token_ids)
            except (UnsupportedModelError, IntegrityError):
                continue
            theirs = library_logits(directory, token_ids)  # it fails if the library does
            assert float((ours - theirs).abs().max()) < 1e-4, changes
