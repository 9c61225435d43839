"""Makes the model's folder: all files in a temporary folder first, which gets its name once it is on the disk."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import save

from smollm2.config import llama_config, token_ids
from smollm2.errors import SmolLM2Error
from smollm2.gguf_model import read_gguf
from smollm2.source import Source
from smollm2.tokenizer import read_tokenizer, tokenizer_config
from smollm2.weights import read_weights

MARKER = "smollm2.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
README = """# SmolLM2-135M-Instruct

Made by `scripts/make_smollm2.py` of subspec from a 4-bit GGUF file of HuggingFaceTB/SmolLM2-135M-Instruct.
Its weights lie on a 4-bit grid of groups of 32 (the embedding: 8 bits), so quantized copies come closer to it
than to the original model. Licence: Apache-2.0, that of the original.
"""


def make_smollm2(
    source: Source, out: Path, dtype: str, *, force: bool = False, log: TextIO | None = None
) -> None:
    """Write the model with weights of `dtype`, a key of DTYPES, to the folder `out`; a complete one stays."""
    log = log or sys.stderr
    out = out.absolute()
    settings = {"dtype": dtype, "source_sha256": source.fingerprint()}
    if _is_done(out, settings, force=force):
        print(f"{out} is complete already: left untouched", file=log)
        return
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        with source.opened() as gguf:
            _write_model(gguf, temporary, dtype)
        files = _sizes(temporary, sorted(path.name for path in temporary.iterdir()))
        _write_json(temporary / MARKER, {"settings": settings, "files": files})
        _put_in_place(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out}: {sum(files.values()) / 1e9:.2f} GB, {dtype}", file=log)


def _write_model(gguf: Path, folder: Path, dtype: str) -> None:
    model = read_gguf(gguf)
    config = llama_config(model, dtype)
    read_tokenizer(model).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(model))
    _write_json(folder / "generation_config.json", token_ids(model))
    _write_json(folder / "config.json", config)
    (folder / "README.md").write_text(README, encoding="utf-8")
    weights = read_weights(model, config, DTYPES[dtype])
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))


def _is_done(out: Path, settings: dict[str, Any], *, force: bool) -> bool:
    """Whether `out` already holds this model. Raises SmolLM2Error if it must not be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        marker = json.loads((out / MARKER).read_bytes())
        files = dict(marker["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SmolLM2Error(f"{out} is there and holds no SmolLM2 of ours: choose another folder") from error
    if force:
        return False
    if marker.get("settings") != settings:
        raise SmolLM2Error(f"{out} holds a SmolLM2 with other settings: --force replaces it")
    return files == _sizes(out, files)


def _sizes(folder: Path, names: Iterable[str]) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _put_in_place(temporary: Path, out: Path) -> None:
    """Give the temporary folder its name once its files are on the disk; an older model goes then."""
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    _sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    if path.is_dir() and sys.platform == "win32":  # folders cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
