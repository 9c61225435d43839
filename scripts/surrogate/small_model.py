"""The small model that a surrogate is made from: its configuration, tensors and fingerprint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from surrogate.values import DTYPES, Source

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class SurrogateError(Exception):
    """A request that cannot be met, with the reason."""


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise SurrogateError(f"{path} holds no JSON object")
    return content


def _weight_files(small: Path) -> list[Path]:
    index = small / "model.safetensors.index.json"
    places = read_json(index).get("weight_map", {}) if index.is_file() else {"all": "model.safetensors"}
    return [small / name for name in sorted(set(places.values()))]


def read_sources(small: Path) -> dict[str, Source]:
    """Return the small model's tensors by name."""
    found: dict[str, Source] = {}
    for file in _weight_files(small):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a mapping)
                part = weights.get_slice(name)
                found[name] = Source(file, name, tuple(part.get_shape()), part.get_dtype())
                if found[name].dtype not in DTYPES:
                    raise SurrogateError(f"{name} is {found[name].dtype}, not one of {', '.join(DTYPES)}")
    return found


def read_config(small: Path) -> dict[str, Any]:
    """Return the small model's config, with the sizes that a config may leave out filled in."""
    config = read_json(small / "config.json")
    if config.get("model_type") not in FAMILIES:
        raise SurrogateError(f"model type {config.get('model_type')!r}: only {', '.join(FAMILIES)} are known")
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"):
        if not isinstance(config.get(key), int):
            raise SurrogateError(f"{small / 'config.json'} has no {key}")
    heads = config["num_attention_heads"]
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    return config


def is_tied(sources: dict[str, Source], config: dict[str, Any]) -> bool:
    """Return whether the head is the embedding."""
    return bool(config.get("tie_word_embeddings", HEAD not in sources))


def fingerprint(small: Path) -> str:
    digest = hashlib.sha256()
    for path in [small / "config.json", *_weight_files(small)]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
