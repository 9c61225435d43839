"""A model of which only config.json is there: what it would be, by the tensors that its family has."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from subspec_cli.checkpoint.dtypes import DTYPES, WEIGHT_DTYPES
from subspec_cli.checkpoint.geometry import geometry_from_config
from subspec_cli.checkpoint.repository import Repository, check_fields, decide_repository
from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.checkpoint.source_directory import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    parse_config,
    read_if_present,
)
from subspec_cli.files.regular_file import read_small_file
from subspec_cli.units import printable

_WEIGHTS: Final = frozenset((".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx"))
_INDEX_SUFFIX: Final = ".index.json"
_TOKENIZER_BYTES_PER_TOKEN: Final = 64
"""Size of a tokenizer's files: 43 to 71 bytes a token of the vocabulary in Qwen2.5, Llama 3 and SmolLM2."""


def find_bare_config(model: str) -> Path | None:
    """Return the config.json that a MODEL argument names, or that is all its directory has; None for others."""
    path = Path(os.path.expanduser(model))
    if path.is_file() and path.suffix == ".json":
        return path
    config = path / CONFIG_NAME
    if not config.is_file():
        return None
    names = [entry.name for entry in path.iterdir()]
    held = any(Path(name).suffix in _WEIGHTS or name.endswith(_INDEX_SUFFIX) for name in names)
    return None if held else config


def read_bare_config(path: Path) -> Repository:
    """Decide what the model of a config.json would be. Raises as `decide_repository`."""
    shown = printable(str(path))
    config = parse_config(read_small_file(path, MAX_CONFIG_BYTES), shown)
    check_fields(config)
    dtype, note = _dtype(config)
    shapes = geometry_from_config(config, dtype).tensor_shapes()
    tensors = {name: _entry(name, dtype, shape, path) for name, shape in shapes.items()}
    found = decide_repository(config, tensors, None, partial(read_if_present, path.parent), shown)
    note = f"there are no weights: sizes are those that {shown} describes{note}"
    return replace(found, notes=(*found.notes, note))


def likely_tokenizer_bytes(repository: Repository) -> int:
    """Return the size of a usual tokenizer's files for the model's vocabulary."""
    return repository.geometry.vocab * _TOKENIZER_BYTES_PER_TOKEN


def _dtype(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the type of the weights, and what is assumed of it."""
    named = config.get("dtype", config.get("torch_dtype"))
    found = next((name for name in WEIGHT_DTYPES if DTYPES[name].torch_name == named), None)
    if found is not None:
        return found, ""
    return WEIGHT_DTYPES[0], f", in {DTYPES[WEIGHT_DTYPES[0]].torch_name}, as it names no type"


def _entry(name: str, dtype: str, shape: tuple[int, ...], path: Path) -> TensorEntry:
    return TensorEntry(name, dtype, shape, path, 0, math.prod(shape) * DTYPES[dtype].size_bytes)
