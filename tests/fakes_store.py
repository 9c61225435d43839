"""Fakes for tests of hub and substitutes: short waits, a quantizer that counts calls, ready-made manifests."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from subspec_cli.checkpoint.checkpoint import open_checkpoint
from subspec_cli.checkpoint.repository import read_repository
from subspec_cli.hub.retry import RetryPolicy
from subspec_cli.hub.source_model import OpenedModel, ResolvedModel, open_model
from subspec_cli.hub.weight_downloads import WeightDownloads
from subspec_cli.hub.workers import WorkerChannel
from subspec_cli.reporter import Reporter
from subspec_cli.substitutes import preparation
from subspec_cli.substitutes.manifest import Manifest, write_manifest
from subspec_cli.substitutes.prepared_model import PreparedModel, prepared_directory
from subspec_cli.substitutes.quality import MatrixQuality
from subspec_cli.substitutes.recipe import SubstituteRecipe
from subspec_cli.substitutes.settings import TUNED, SubstituteSettings, group_size_for

LAYERS = 3
SETTINGS = SubstituteSettings(4, "minmax")
HASTE = RetryPolicy(tries=4, first_wait_s=0.01, longest_wait_s=1.0, stall_s=0.3)
SHA256 = "a" * 64
VERSIONS = {"torch": "2.13.0"}


def quantize_head(rows):
    """Codes from the top bytes of each bf16, scales and shifts of zero."""
    import torch

    groups = rows.view(-1, group_size_for(tuple(rows.shape)))
    top = groups.view(torch.uint8)[:, 1::2]
    scale = torch.zeros((len(groups), 1), dtype=torch.bfloat16)
    made = {"codes": top[::2] ^ top[1::2], "scale": scale, "shift": scale}
    return made, MatrixQuality(rows.numel(), rows.numel(), 40.0, 0.25)


class Quantizer:
    """Keeps the top byte of each bf16; counts its calls, and fails at one of them."""

    def __init__(self, fail_at: int = -1, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.calls = 0
        self.fail_at = fail_at
        self.error = error

    def __call__(self, layer, tensors):
        import torch

        self.calls += 1
        if self.calls - 1 == self.fail_at:
            raise self.error
        assert "self_attn.q_proj.weight" in tensors
        assert "input_layernorm.weight" in tensors
        made = {f"{name}.top": tensor.flatten().view(torch.uint8)[1::2] for name, tensor in tensors.items()}
        return made, {"q": MatrixQuality(1024, 512, 40.0, 0.25)}


def resolve_model(model: str, revision: str | None = None, **how) -> ResolvedModel:
    """A model with all its weights on this machine."""
    with opened(model, revision, **how) as found:
        found.weight_downloads.start()
        while not found.weight_downloads.is_complete:
            found.weight_downloads.wait()
    return found.resolved


def opened(model: str, revision: str | None = None, *, notices=None, **how):
    """`open_model` with short waits."""
    how = {"retry_policy": HASTE} | how
    return open_model(
        model, revision, reporter=Reporter(note=([] if notices is None else notices).append), **how
    )


def run(
    model: ResolvedModel | str,
    quantizer=None,
    *,
    bits=8,
    checkpoint=None,
    seen=None,
    notices=None,
    retry_policy=HASTE,
    versions=VERSIONS,
    head_quantizer=quantize_head,
    find_text=None,
    **changes,
):
    """`prepare_model` with a fake quantizer; `changes` go to it, or to the geometry (`layers`)."""
    layers = changes.pop("layers", None)
    recipe = SubstituteRecipe(
        SubstituteSettings(bits, "minmax" if find_text is None else TUNED),
        quantizer or Quantizer(),
        head_quantizer,
        versions,
        find_text,
    )
    how = {
        "force": False,
        "progress": (seen if seen is not None else []).append,
        "reporter": Reporter(note=([] if notices is None else notices).append),
    } | changes

    def prepare(found: OpenedModel) -> PreparedModel:
        geometry = read_repository(found.checkpoint).geometry
        if layers is not None:
            geometry = replace(geometry, mixers=geometry.mixers[:1] * layers)
        return preparation.prepare_model(found, geometry, recipe, **how)

    if isinstance(model, str):
        with opened(model, notices=notices, retry_policy=retry_policy) as found:
            return prepare(found)
    nothing = WeightDownloads(model.directory, (), WorkerChannel(Reporter()))
    return prepare(OpenedModel(model, checkpoint or open_checkpoint(model.directory), nothing))


def place_of(model: ResolvedModel, bits=8) -> Path:
    return prepared_directory(model.model_id, model.commit, SubstituteSettings(bits, "minmax"))


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != ".lock"}


def manifest_of(model_id="org/tiny", *, layers=(), settings=SETTINGS, **more) -> Manifest:
    fields = {
        "source_directory": "/models/tiny",
        "commit": "c" * 40,
        "fingerprint": "f" * 40,
        "source_stamp": "",
        "dtype": "bfloat16",
        "group_size": 128,
        "tool_version": "0.1.0",
        "library_versions": VERSIONS,
    }
    return Manifest(model_id=model_id, settings=settings, layers=tuple(layers), **(fields | more))


def write_prepared(manifest: Manifest, age_s: int = 0) -> PreparedModel:
    """Write a manifest where its set of substitutes lies, as if prepared `age_s` before the newest."""
    directory = prepared_directory(manifest.model_id, manifest.commit, manifest.settings)
    directory.mkdir(parents=True)
    write_manifest(directory / "manifest.json", manifest)
    os.utime(directory / "manifest.json", (2_000_000_000 - age_s,) * 2)
    return PreparedModel(directory, manifest)
