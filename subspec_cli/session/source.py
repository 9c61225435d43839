"""The model that was asked for: found, checked and refused, if it must be, without any heavy library."""

from __future__ import annotations

from dataclasses import dataclass

from subspec_cli.config import Config
from subspec_cli.placement.geometry import ModelGeometry, read_geometry
from subspec_cli.store.checkpoint import Checkpoint, open_checkpoint
from subspec_cli.store.hub import find_local
from subspec_cli.store.prepared import PreparedModel, check_source, find_prepared


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The model that was asked for, found and checked."""

    prepared: PreparedModel
    checkpoint: Checkpoint
    geometry: ModelGeometry


def find_source(config: Config) -> ModelSource:
    """The prepared model of the settings, or the latest one, with its checked 16-bit checkpoint."""
    prepared = find_prepared(config.model.model, config.model.bits)
    manifest = prepared.manifest
    checkpoint = open_checkpoint(find_local(manifest.model_id, manifest.commit))
    check_source(prepared, checkpoint)
    return ModelSource(prepared, checkpoint, read_geometry(checkpoint.config, checkpoint.tensors))
