"""Makes a surrogate from start to end: checks the request, writes the weights, marks the result as complete."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from surrogate.shards import GB, shard_plans, write_json, write_shards
from surrogate.small_model import SurrogateError, fingerprint, is_tied, read_config, read_json, read_sources
from surrogate.values import Plan
from surrogate.widening import find_widths, plan_tensors, wide_config

MARKER = "surrogate.json"
COPIED = ("*token*.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.*", "gen*config.json")


@dataclass(frozen=True)
class Wanted:
    """The surrogate to make; None takes the small model's own size, or the size in proportion to `hidden`."""

    hidden: int
    layers: int | None = None
    feed_forward: int | None = None
    vocab: int | None = None
    noise: float = 0.0
    """Relative noise on the copied matrices."""
    seed: int = 0
    shard_gb: float = 1.0

    def check(self, config: dict[str, Any]) -> None:
        """Raise SurrogateError if no surrogate of these sizes can be made from a model of `config`."""
        hidden, layers, units = (
            config[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size")
        )
        if self.hidden < hidden or self.hidden % hidden:
            raise SurrogateError(f"hidden {self.hidden} is no multiple of the small model's {hidden}")
        if self.layers is not None and self.layers < layers:
            raise SurrogateError(f"{self.layers} layers are fewer than the small model's {layers}")
        if self.feed_forward is not None and self.feed_forward < units:
            raise SurrogateError(f"feed-forward {self.feed_forward} is less than the small model's {units}")
        if self.vocab is not None and self.vocab < config["vocab_size"]:
            vocab = config["vocab_size"]
            raise SurrogateError(f"a vocabulary of {self.vocab} is less than the small model's {vocab}")
        if not (0 <= self.noise < math.inf and 0 < self.shard_gb < math.inf):
            raise SurrogateError("the noise must be a number from 0 up and the shard size a positive one")


def make_surrogate(
    small: Path, out: Path, wanted: Wanted, *, force: bool = False, log: TextIO | None = None
) -> None:
    """Write a surrogate of the model in `small` to the folder `out`; a complete one is left as it is."""
    log = log or sys.stderr
    config = read_config(small)
    wanted.check(config)
    layers = config["num_hidden_layers"] if wanted.layers is None else wanted.layers
    settings = _settings(small, config, wanted, layers)
    if small.resolve() == out.resolve():
        raise SurrogateError("OUT is the small model's own folder")
    if _is_done(out, settings, force=force):
        print(f"{out} is complete already: left untouched", file=log)
        return
    sources = read_sources(small)
    tied = is_tied(sources, config)
    widths = find_widths(config, wanted.hidden, wanted.feed_forward, wanted.vocab, tied=tied)
    plans = plan_tensors(sources, config, widths, layers)
    total = sum(plan.nbytes for plan in plans)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / MARKER, {"settings": settings})  # without files: begun, not complete
    for old in [*out.glob("model*.safetensors"), *out.glob("model*.index.json"), *out.glob(".model*.tmp")]:
        old.unlink()
    if shutil.disk_usage(out).free < total:
        raise SurrogateError(f"{out} lacks room for {total / GB:.2f} GB")
    write_shards(out, shard_plans(plans, wanted.shard_gb * GB), wanted.noise, wanted.seed, log)
    for path in (path for pattern in COPIED for path in small.glob(pattern)):
        shutil.copyfile(path, out / path.name)
    write_json(out / "config.json", wide_config(config, wanted.hidden, layers, widths))
    (out / "README.md").write_text(_readme(settings, small, plans), encoding="utf-8")
    files = _sizes(out, sorted(path.name for path in out.iterdir() if path.name != MARKER))
    write_json(out / MARKER, {"settings": settings, "files": files})


def _settings(small: Path, config: dict[str, Any], wanted: Wanted, layers: int) -> dict[str, Any]:
    """Everything that decides the bytes of the result, in the order in which the marker lists it."""
    asked = {"feed_forward": wanted.feed_forward, "vocab": wanted.vocab}
    return {
        "hidden": wanted.hidden,
        "layers": layers,
        "small_layers": config["num_hidden_layers"],
        **{name: size for name, size in asked.items() if size is not None},
        "noise": wanted.noise,
        "seed": wanted.seed,
        "shard_gb": wanted.shard_gb,
        "small": fingerprint(small),
    }


def _is_done(out: Path, settings: dict[str, Any], *, force: bool) -> bool:
    """Whether `out` already holds this surrogate. Raises SurrogateError if the folder must not be overwritten."""
    if not out.is_dir() or not any(out.iterdir()):
        return False
    if not (out / MARKER).is_file():
        raise SurrogateError(f"{out} is not empty and holds no surrogate: choose another folder")
    marker = read_json(out / MARKER)
    if force or "files" not in marker:  # an interrupted run leaves nothing worth keeping
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
