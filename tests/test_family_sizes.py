"""Public checkpoints by the fields of their config.json: each is read at once, and has as many weights as published.

The counts are those of the repositories' own safetensors metadata ("total"), as public model lists quote them, but
for: Gemma 3, arXiv 2503.19786, table 1, without the vision encoder; Exaone 4 and StableLM 3B and 12B, the model
cards, the first without embeddings; Ministral 3 14B and Gemma 4 31B, the model cards, text alone; what llama.cpp
counts in the text of a converted checkpoint ("n_params" or "params"): Qwen 3.5 and 3.6, Ministral 3 8B, Gemma 4 12B,
GLM-4 32B and Command R7B; Ministral 3 3B, a public breakdown of its tensors; HunYuan, tables of benchmarks and the
name. The fields are quoted by the same sources and by the library's own configuration classes, whose defaults are
SmolLM3 3B, GLM-4 9B and StableLM 3B. Granite 4.1 has its sizes from IBM's article, and its 8B a head of its own by
its count.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytest

from subspec_cli.checkpoint.geometry import geometry_from_config
from subspec_cli.checkpoint.repository import check_fields

FULL = "full_attention"
LINEAR = "linear_attention"


@dataclass(frozen=True, slots=True)
class Published:
    """A checkpoint: some fields, and its count of weights."""

    count: float
    model_type: str
    sizes: tuple[int, int, int, int, int, int]
    """hidden_size, intermediate_size, layers, heads, key and value heads, vocab_size."""
    fields: dict[str, Any]
    inside: str = ""
    """The wrapper's model_type."""
    counts_tables: bool = True

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        names = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
        )
        text = {"model_type": self.model_type, **dict(zip(names, self.sizes, strict=True)), **self.fields}
        if not self.inside:
            return text
        tied = {"tie_word_embeddings": text.pop("tied")} if "tied" in text else {}
        return {"model_type": self.inside, "text_config": text, **tied}


LONG = {"head_dim": 128, "tied": False, "rms_norm_eps": 1e-5}
GEMMA4 = {"attention_k_eq_v": True, "final_logit_softcapping": 30.0, "use_bidirectional_attention": "vision"}
QWEN3_5 = {
    "attn_output_gate": True,
    "full_attention_interval": 4,
    "mamba_ssm_dtype": "float32",
    "tied": False,
}
HUNYUAN = {
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "mscale": 1.0},
    "tie_word_embeddings": True,
}
PUBLISHED = {
    "Mistral Small 24B": Published(
        23_572_403_200,
        "mistral",
        (5120, 32768, 40, 32, 8, 131072),
        {**LONG, "sliding_window": None},
        "mistral3",
    ),
    "Ministral 3 14B": Published(13.5e9, "ministral3", (5120, 16384, 40, 32, 8, 131072), LONG, "mistral3"),
    "Ministral 3 3B": Published(
        3_429_006_336,
        "ministral3",
        (3072, 9216, 26, 32, 8, 131072),
        {**LONG, "tied": True},
        "mistral3",
    ),
    "Ministral 3 8B": Published(8.49e9, "ministral3", (4096, 14336, 34, 32, 8, 131072), LONG, "mistral3"),
    "Phi-4": Published(14_659_507_200, "phi3", (5120, 17920, 40, 40, 10, 100352), {}),
    "Phi-4-mini": Published(
        3_836_021_760,
        "phi3",
        (3072, 8192, 32, 24, 8, 200064),
        {"tie_word_embeddings": True, "partial_rotary_factor": 0.75, "pad_token_id": 199999},
    ),
    "Granite 3.3 8B": Published(
        8_170_864_640, "granite", (4096, 12800, 40, 32, 8, 49159), {"tie_word_embeddings": True}
    ),
    "Granite 4.1 3B": Published(
        3_402_836_480, "granite", (2560, 8192, 40, 40, 8, 100352), {"tie_word_embeddings": True}
    ),
    "Granite 4.1 8B": Published(8_791_592_960, "granite", (4096, 12800, 40, 32, 8, 100352), {}),
    "SmolLM3 3B": Published(3_075_098_624, "smollm3", (2048, 11008, 36, 16, 4, 128256), {}),
    "Seed-OSS 36B": Published(
        36_151_104_512, "seed_oss", (5120, 27648, 64, 80, 8, 155136), {"head_dim": 128}
    ),
    "OLMo 2 7B": Published(7_298_617_344, "olmo2", (4096, 11008, 32, 32, 32, 100352), {}),
    "OLMo 2 32B": Published(32_234_279_936, "olmo2", (5120, 27648, 64, 40, 8, 100352), {}),
    "OLMo 3 7B": Published(7_298_011_136, "olmo3", (4096, 11008, 32, 32, 32, 100278), {}),
    "OLMo 3 32B": Published(32_233_522_176, "olmo3", (5120, 27648, 64, 40, 8, 100278), {}),
    "GLM-4 9B 0414": Published(9_400_279_040, "glm4", (4096, 13696, 40, 32, 2, 151552), {"head_dim": 128}),
    "GLM-4 32B 0414": Published(
        32.57e9,
        "glm4",
        (6144, 23040, 61, 48, 2, 151552),
        {"head_dim": 128, "attention_bias": False, "partial_rotary_factor": 0.5},
    ),
    "Gemma 2 2B": Published(2_614_341_888, "gemma2", (2304, 9216, 26, 8, 4, 256000), {}),
    "Gemma 2 9B": Published(9_241_705_984, "gemma2", (3584, 14336, 42, 16, 8, 256000), {}),
    "Gemma 2 27B": Published(
        27_227_128_320,
        "gemma2",
        (4608, 36864, 46, 32, 16, 256000),
        {"head_dim": 128, "query_pre_attn_scalar": 144},
    ),
    "Gemma 3 4B": Published(3.884e9, "gemma3_text", (2560, 10240, 34, 8, 4, 262208), {}, "gemma3"),
    "Gemma 3 12B": Published(11.771e9, "gemma3_text", (3840, 15360, 48, 16, 8, 262208), {}, "gemma3"),
    "Gemma 3 27B": Published(
        27.016e9,
        "gemma3_text",
        (5376, 21504, 62, 32, 16, 262208),
        {"head_dim": 128, "query_pre_attn_scalar": 168},
        "gemma3",
    ),
    "Gemma 4 31B": Published(
        30.7e9,
        "gemma4_text",
        (5376, 21504, 60, 32, 16, 262144),
        {**GEMMA4, "num_global_key_value_heads": 4, "hidden_size_per_layer_input": 0},
        "gemma4",
    ),
    "Gemma 4 12B": Published(
        11.91e9,
        "gemma4_unified_text",
        (3840, 15360, 48, 16, 8, 262144),
        {**GEMMA4, "num_global_key_value_heads": 1},
        "gemma4_unified",
    ),
    "Exaone 4 32B": Published(
        30.95e9, "exaone4", (5120, 27392, 64, 40, 8, 102400), {"sliding_window": 4096}, counts_tables=False
    ),
    "Exaone 4 1.2B": Published(
        1.07e9,
        "exaone4",
        (2048, 4096, 30, 32, 8, 102400),
        {"sliding_window": None, "layer_types": [FULL] * 30, "tie_word_embeddings": True},
        counts_tables=False,
    ),
    "Qwen 3.5 27B": Published(
        26_895_998_464,
        "qwen3_5_text",
        (5120, 17408, 64, 24, 4, 248320),
        {**QWEN3_5, "linear_num_value_heads": 48},
        "qwen3_5",
    ),
    "Qwen 3.6 27B": Published(
        26_895_998_464,
        "qwen3_5_text",
        (5120, 17408, 64, 24, 4, 248320),
        {**QWEN3_5, "linear_num_value_heads": 48, "layer_types": [*[LINEAR] * 3, FULL] * 16},
        "qwen3_5",
    ),
    "Qwen 3.5 9B": Published(
        8_953_803_264, "qwen3_5_text", (4096, 12288, 32, 16, 4, 248320), QWEN3_5, "qwen3_5"
    ),
    "Qwen 3.5 4B": Published(
        4_205_751_296,
        "qwen3_5_text",
        (2560, 9216, 32, 16, 4, 248320),
        {**QWEN3_5, "tied": True},
        "qwen3_5",
    ),
    "Qwen 3.5 2B": Published(
        1_881_825_088,
        "qwen3_5_text",
        (2048, 6144, 24, 8, 2, 248320),
        {**QWEN3_5, "linear_num_value_heads": 16, "tied": True},
        "qwen3_5",
    ),
    "Command R7B": Published(8.03e9, "cohere2", (4096, 14336, 32, 32, 8, 256000), {"logit_scale": 0.25}),
    "HunYuan 1.8B": Published(1.8e9, "hunyuan_v1_dense", (2048, 6144, 32, 16, 4, 120818), HUNYUAN),
    "HunYuan 4B": Published(4.22e9, "hunyuan_v1_dense", (3072, 8192, 36, 32, 8, 120818), HUNYUAN),
    "HunYuan 7B": Published(7.50e9, "hunyuan_v1_dense", (4096, 14336, 32, 32, 8, 128167), HUNYUAN),
    "StableLM 3B 4E1T": Published(2_795_443_200, "stablelm", (2560, 6912, 32, 32, 32, 50304), {}),
    "StableLM 2 1.6B": Published(
        1_644_515_328, "stablelm", (2048, 5632, 24, 32, 32, 100352), {"use_qkv_bias": True}
    ),
    "StableLM 2 12B": Published(
        12.144e9,
        "stablelm",
        (5120, 13824, 40, 32, 8, 100352),
        {"use_parallel_residual": True, "qk_layernorm": True, "use_norm_bias": False},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_those_of_the_fields(name: str) -> None:
    """Within 1 %; where the source gives every digit, to the digit."""
    published = PUBLISHED[name]
    check_fields(published.config)
    started = time.perf_counter()
    geometry = geometry_from_config(published.config, "BF16")
    assert geometry.model_bytes > 0
    assert time.perf_counter() - started < 0.1
    weights = geometry.model_bytes // 2
    if not published.counts_tables:
        weights -= geometry.table_bytes // 2 * (1 if geometry.tied_head else 2)
    assert weights == pytest.approx(published.count, rel=0.01)
    if isinstance(published.count, int):
        assert weights == published.count
