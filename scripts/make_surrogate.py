#!/usr/bin/env python3
"""Make a model of real size from a small trained one without changing its function.

Every hidden channel, attention head, key/value head and feed-forward unit is copied k times, and the
columns of each projection are divided among the copies, so the wide layers compute copies of what the
small ones compute. Identity layers, whose output projections are zero, bring the depth to what is asked;
feed-forward units that lead nowhere and vocabulary rows that never win fill up what no multiple reaches.
Such a surrogate streams and offloads like a model of its size and writes what the small model writes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch
from safetensors import SafetensorError, safe_open
from surrogate_values import DTYPES, Form, Plan, Source, make_blocks, shares, workers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
GB = 10**9
ALIGNMENT = 4096  # of a shard's data section, so that it can be read by direct I/O
REPORT_SECONDS = 2
MARKER = "surrogate.json"
COPIED = ("*token*.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.*", "gen*config.json")
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_MATRIX = re.compile(r"self_attn\.[qkvo]_proj\.weight")
_UNIT_ROWS = re.compile(r"mlp\.(gate|up)_proj\.weight")
_UNIT_COLUMNS = re.compile(r"mlp\.down_proj\.weight")
_UNIT_VECTOR = re.compile(r"mlp\.(gate|up)_proj\.bias")
_VECTOR = re.compile(r"(self_attn\.[qkvo]_proj|mlp\.down_proj)\.bias|\w+_layernorm\.weight")
_PER_HEAD = re.compile(r"self_attn\.[qk]_norm\.weight")
_OUTPUT = re.compile(r"(self_attn\.o_proj|mlp\.down_proj)\.\w+")


class SurrogateError(Exception):
    """A request that cannot be met; the text says why."""


@dataclass(frozen=True)
class Widths:
    """How much larger the surrogate is in each direction."""

    hidden_copies: int
    unit_copies: int
    extra_units: int
    extra_tokens: int
    tied: bool


def owners(small_layers: int, layers: int) -> list[int]:
    """Return for each layer which of the small model's it is or, as an identity layer, comes after."""
    return [((at + 1) * small_layers - 1) // layers for at in range(layers)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise SurrogateError(f"{path} holds no JSON object")
    return content


def _weight_files(small: Path) -> list[Path]:
    index = small / "model.safetensors.index.json"
    places = _read_json(index).get("weight_map", {}) if index.is_file() else {"all": "model.safetensors"}
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
    """Return the small model's config with the sizes that it may leave out made explicit."""
    config = _read_json(small / "config.json")
    if config.get("model_type") not in FAMILIES:
        raise SurrogateError(f"model type {config.get('model_type')!r}: only {', '.join(FAMILIES)} are known")
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"):
        if not isinstance(config.get(key), int):
            raise SurrogateError(f"{small / 'config.json'} has no {key}")
    heads = config["num_attention_heads"]
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    return config


def wide_config(config: dict[str, Any], hidden: int, layers: int, widths: Widths) -> dict[str, Any]:
    """Return the surrogate's config: `config` with the new sizes."""
    wide, small_layers = dict(config), config["num_hidden_layers"]
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"):
        wide[key] = config[key] * hidden // config["hidden_size"]
    wide["intermediate_size"] = config["intermediate_size"] * widths.unit_copies + widths.extra_units
    if widths.extra_tokens:
        wide["vocab_size"] = config["vocab_size"] + widths.extra_tokens
    wide["num_hidden_layers"] = layers
    order = owners(small_layers, layers)
    if config.get("layer_types"):
        # A real layer keeps its kind of attention; for an identity layer any kind will do.
        wide["layer_types"] = [config["layer_types"][owner] for owner in order]
    if (first := config.get("max_window_layers")) is not None:
        wide["max_window_layers"] = order.index(first) if first < small_layers else max(first, layers)
    return wide


def find_widths(
    config: dict[str, Any], hidden: int, feed_forward: int | None, vocab: int | None, *, tied: bool
) -> Widths:
    """Return how the sizes asked for are reached: as many whole copies as fit, the rest filled up."""
    small_units, copies = config["intermediate_size"], hidden // config["hidden_size"]
    units = small_units * copies if feed_forward is None else feed_forward
    tokens = 0 if vocab is None else vocab - config["vocab_size"]
    return Widths(copies, units // small_units, units % small_units, tokens, tied)


def layout(part: str, widths: Widths) -> Form:
    """Return in which form `part` becomes a tensor of the surrogate."""
    k, units = widths.hidden_copies, widths.unit_copies
    # A tied head cannot be divided without dividing the embedding, so the norm before it is.
    if part == NORM and widths.tied:
        return Form(1, shares(k))
    if part in (HEAD, EMBEDDING):
        # The mean of rows scores the mean of their scores, which is never the highest.
        columns = shares(k) if part == HEAD else (1.0,) * k
        return Form(1, columns, extra_rows=widths.extra_tokens, is_mean=True)
    if _UNIT_ROWS.fullmatch(part):
        return Form(units, shares(k), extra_rows=widths.extra_units)
    if _UNIT_COLUMNS.fullmatch(part):
        return Form(k, shares(units), extra_columns=widths.extra_units)
    if _UNIT_VECTOR.fullmatch(part):
        return Form(1, (1.0,) * units, extra_columns=widths.extra_units)
    if _MATRIX.fullmatch(part):
        # Whole heads are tiled, so that query head i keeps the key/value head i // (heads / kv heads).
        return Form(k, shares(k))
    if part == NORM or _VECTOR.fullmatch(part):
        return Form(1, (1.0,) * k)
    if _PER_HEAD.fullmatch(part):
        return Form(1, (1.0,))
    raise SurrogateError(f"cannot widen {part}: the known families have no such tensor")


def is_tied(sources: dict[str, Source], config: dict[str, Any]) -> bool:
    """Return whether the head is the embedding."""
    return bool(config.get("tie_word_embeddings", HEAD not in sources))


def plan_tensors(
    sources: dict[str, Source], config: dict[str, Any], widths: Widths, layers: int
) -> list[Plan]:
    """Return every tensor of the surrogate in the order of use."""
    tied = widths.tied
    parts: dict[str, dict[str, Source]] = {}  # by layer number, "" for what is outside of the layers
    for name, source in sources.items():
        layer, part = match.groups() if (match := _LAYER.fullmatch(name)) else ("", name)
        # Old checkpoints store rotary frequencies, which are computed anyway, or a tied head once more.
        if not part.endswith("rotary_emb.inv_freq") and not (part == HEAD and tied):
            parts.setdefault(layer, {})[part] = source
    needed = {"", *map(str, range(config["num_hidden_layers"]))}
    ends = [EMBEDDING, NORM] if tied else [EMBEDDING, NORM, HEAD]
    if parts.keys() != needed or parts[""].keys() != set(ends):
        raise SurrogateError("the weights do not match config.json: layers or tensors are missing or unknown")
    order = owners(config["num_hidden_layers"], layers)
    plans: list[Plan] = []
    for at, owner in enumerate(order):
        for part, source in sorted(parts[str(owner)].items()):
            idle = (
                "ones" if part.endswith("norm.weight") else "zeros" if _OUTPUT.fullmatch(part) else "random"
            )
            fill = "copy" if order.index(owner) == at else idle
            plans.append(Plan(f"model.layers.{at}.{part}", source, layout(part, widths), fill))
    first, *last = (Plan(name, parts[""][name], layout(name, widths)) for name in ends)
    return [first, *plans, *last]


def shard_plans(plans: list[Plan], limit: float) -> list[list[Plan]]:
    """Return `plans` cut into shards of at most `limit` bytes, or of one tensor if that is larger."""
    shards: list[list[Plan]] = [[]]
    for plan in plans:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + plan.nbytes > limit:
            shards.append([])
        shards[-1].append(plan)
    return shards


def header_bytes(plans: list[Plan]) -> bytes:
    """Return a safetensors header for `plans` that ends at a multiple of `ALIGNMENT` bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for plan in plans:
        start, end = end, end + plan.nbytes
        entries[plan.name] = {"dtype": plan.source.dtype, "shape": plan.shape, "data_offsets": (start, end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the name `path` once it is complete and on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def write_shards(out: Path, shards: list[list[Plan]], noise: float, seed: int, log: TextIO) -> None:
    """Write the weights, with an index if there are several files, and tell `log` now and then how far."""
    total = sum(plan.nbytes for plans in shards for plan in plans)
    weight_map: dict[str, str] = {}
    begun = told = time.monotonic()
    done = 0
    for number, plans in enumerate(shards, start=1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        with replacing(out / f"model{part}.safetensors") as file, workers() as pool:
            file.write(header_bytes(plans))
            for plan in plans:
                for block in make_blocks(plan, noise, seed, pool):
                    file.write(block.view(torch.uint8).numpy().data)
                weight_map[plan.name] = f"model{part}.safetensors"
                done, now = done + plan.nbytes, time.monotonic()
                if now - told >= REPORT_SECONDS or done == total:
                    told, rate = now, done / max(now - begun, 1e-6) / 1e6
                    print(f"{done / GB:.2f} of {total / GB:.2f} GB, {rate:.0f} MB/s", file=log, flush=True)
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(out / "model.safetensors.index.json", content)


def _fingerprint(small: Path) -> str:
    digest = hashlib.sha256()
    for path in [small / "config.json", *_weight_files(small)]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _is_done(out: Path, settings: dict[str, Any], *, force: bool) -> bool:
    """Return whether `out` is this surrogate already; refuse a folder that may not be written over."""
    if not out.is_dir() or not any(out.iterdir()):
        return False
    if not (out / MARKER).is_file():
        raise SurrogateError(f"{out} is not empty and holds no surrogate: choose another folder")
    marker = _read_json(out / MARKER)
    if force or "files" not in marker:  # what an interrupted run left is worth nothing
        return False
    if marker["settings"] != settings:
        raise SurrogateError(f"{out} holds a surrogate with other settings: --force writes over it")
    return bool(marker["files"] == _sizes(out, marker["files"]))


def _sizes(out: Path, names: Iterable[str]) -> dict[str, int]:
    return {name: (out / name).stat().st_size for name in names if (out / name).is_file()}


def _readme(settings: dict[str, Any], small: Path, plans: list[Plan]) -> str:
    parameters = sum(math.prod(plan.shape) for plan in plans)
    return f"""# {small.name} surrogate, hidden {settings["hidden"]}, {settings["layers"]} layers

This is a **surrogate**: a model of {parameters / 1e6:,.0f} M parameters that computes what the small model
`{small.name}` computes and knows no more than that. It serves to measure decoding and offloading at its size.

`scripts/make_surrogate.py` of subspec made it with noise {settings["noise"]:g} and seed {settings["seed"]}:
channels, heads and feed-forward units are copies, and identity layers, whose output projections are zero,
stand between the {settings["small_layers"]} real layers. Units and tokens beyond whole copies do nothing.
The licence and the terms of the small model apply.
"""


def _check_sizes(
    config: dict[str, Any], hidden: int, layers: int, units: int | None, vocab: int | None
) -> None:
    small_hidden, small_layers = config["hidden_size"], config["num_hidden_layers"]
    if hidden < small_hidden or hidden % small_hidden:
        raise SurrogateError(f"hidden {hidden} is no multiple of the small model's {small_hidden}")
    if layers < small_layers:
        raise SurrogateError(f"{layers} layers are fewer than the small model's {small_layers}")
    if units is not None and units < config["intermediate_size"]:
        raise SurrogateError(
            f"feed-forward {units} is less than the small model's {config['intermediate_size']}"
        )
    if vocab is not None and vocab < config["vocab_size"]:
        raise SurrogateError(f"a vocabulary of {vocab} is less than the small model's {config['vocab_size']}")


def _check_numbers(noise: float, shard_gb: float) -> None:
    if not (0 <= noise < math.inf and 0 < shard_gb < math.inf):
        raise SurrogateError("the noise must be a number from 0 up and the shard size a positive one")


def make_surrogate(
    small: Path,
    out: Path,
    *,
    hidden: int,
    layers: int | None = None,
    feed_forward: int | None = None,
    vocab: int | None = None,
    noise: float = 0.0,
    seed: int = 0,
    shard_gb: float = 1.0,
    force: bool = False,
    log: TextIO | None = None,
) -> None:
    """Write a surrogate of `small` with `hidden` channels and `layers` layers to the folder `out`.

    `feed_forward` units (default: as much wider as `hidden`) and `vocab` tokens (default: the small model's).
    """
    log = log or sys.stderr
    config = read_config(small)
    layers = config["num_hidden_layers"] if layers is None else layers
    _check_sizes(config, hidden, layers, feed_forward, vocab)
    _check_numbers(noise, shard_gb)
    sizes = {"hidden": hidden, "layers": layers, "small_layers": config["num_hidden_layers"]}
    asked = {"feed_forward": feed_forward, "vocab": vocab}
    sizes |= {name: size for name, size in asked.items() if size is not None}
    settings = sizes | {"noise": noise, "seed": seed, "shard_gb": shard_gb, "small": _fingerprint(small)}
    if small.resolve() == out.resolve():
        raise SurrogateError("OUT is the small model's own folder")
    if _is_done(out, settings, force=force):
        print(f"{out} is complete already: left untouched", file=log)
        return
    sources = read_sources(small)
    widths = find_widths(config, hidden, feed_forward, vocab, tied=is_tied(sources, config))
    plans = plan_tensors(sources, config, widths, layers)
    total = sum(plan.nbytes for plan in plans)
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / MARKER, {"settings": settings})  # without files: begun, not complete
    for old in [*out.glob("model*.safetensors"), *out.glob("model*.index.json"), *out.glob(".model*.tmp")]:
        old.unlink()
    if shutil.disk_usage(out).free < total:
        raise SurrogateError(f"{out} lacks room for {total / GB:.2f} GB")
    write_shards(out, shard_plans(plans, shard_gb * GB), noise, seed, log)
    for path in (path for pattern in COPIED for path in small.glob(pattern)):
        shutil.copyfile(path, out / path.name)
    _write_json(out / "config.json", wide_config(config, hidden, layers, widths))
    (out / "README.md").write_text(_readme(settings, small, plans), encoding="utf-8")
    files = _sizes(out, sorted(path.name for path in out.iterdir() if path.name != MARKER))
    _write_json(out / MARKER, {"settings": settings, "files": files})


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("small", type=Path, metavar="SMALL", help="folder of the small model")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--hidden", type=int, required=True, help="hidden size, a multiple of the small one")
    parser.add_argument("--layers", type=int, help="layers in all (default: as many as the small model)")
    parser.add_argument("--feed-forward", type=int, help="feed-forward units (default: in proportion)")
    parser.add_argument("--vocab", type=int, help="tokens in all (default: as many as the small model)")
    parser.add_argument("--noise", type=float, default=0.0, help="relative noise on the copied matrices")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise and of the identity layers")
    parser.add_argument("--shard-gb", type=float, default=1.0, help="largest weight file (default: 1 GB)")
    parser.add_argument("--force", action="store_true", help="write over another surrogate in OUT")
    try:
        make_surrogate(**vars(parser.parse_args(arguments)))
    except (SafetensorError, SurrogateError, OSError, KeyboardInterrupt) as error:
        print(f"make_surrogate: {str(error) or 'interrupted'}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
