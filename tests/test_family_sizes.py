"""Public checkpoints by the fields of their config.json: each is read at once, and has as many weights as published.

The counts are those of the repositories' own safetensors metadata ("total"), as public model lists quote them, but
for: Gemma 3, arXiv 2503.19786, table 1, without the vision encoder; Exaone 4, the model card, without embeddings;
Ministral 3 14B, the model card, language model alone. The fields are quoted by the same sources and by the library's
own configuration classes, whose defaults are SmolLM3 3B and GLM-4 9B.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytest

from subspec_cli.checkpoint.geometry import geometry_from_config
from subspec_cli.checkpoint.repository import check_fields

FULL = "full_attention"


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
PUBLISHED = {
    "Mistral Small 24B": Published(
        23_572_403_200,
        "mistral",
        (5120, 32768, 40, 32, 8, 131072),
        {**LONG, "sliding_window": None},
        "mistral3",
    ),
    "Ministral 3 14B": Published(13.5e9, "ministral3", (5120, 16384, 40, 32, 8, 131072), LONG, "mistral3"),
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
    "SmolLM3 3B": Published(3_075_098_624, "smollm3", (2048, 11008, 36, 16, 4, 128256), {}),
    "Seed-OSS 36B": Published(
        36_151_104_512, "seed_oss", (5120, 27648, 64, 80, 8, 155136), {"head_dim": 128}
    ),
    "OLMo 2 7B": Published(7_298_617_344, "olmo2", (4096, 11008, 32, 32, 32, 100352), {}),
    "OLMo 2 32B": Published(32_234_279_936, "olmo2", (5120, 27648, 64, 40, 8, 100352), {}),
    "OLMo 3 7B": Published(7_298_011_136, "olmo3", (4096, 11008, 32, 32, 32, 100278), {}),
    "GLM-4 9B 0414": Published(9_400_279_040, "glm4", (4096, 13696, 40, 32, 2, 151552), {"head_dim": 128}),
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
