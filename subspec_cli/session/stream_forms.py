"""How a prepared model's layers can be streamed: raw, or as residuals over the draft's codes. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.config import Config
from subspec_cli.errors import SubspecError
from subspec_cli.hub.command_hints import repair_command
from subspec_cli.planning.costs import MachineCosts
from subspec_cli.substitutes.prepared_model import PreparedModel
from subspec_cli.substitutes.residual_set import ResidualSet, compared_residuals, usable_residuals


@dataclass(frozen=True, slots=True)
class StreamForm:
    """One form, with the sizes and costs that a plan sees."""

    prepared: PreparedModel
    geometry: ModelGeometry
    costs: MachineCosts
    residuals: ResidualSet | None
    """None for raw layers."""


def has_residuals(prepared: PreparedModel, config: Config) -> bool:
    """Whether residuals may be streamed: they are there, and the draft's codes are in memory."""
    return _residuals(prepared, config)[0] is not None


def stream_forms(
    prepared: PreparedModel,
    geometry: ModelGeometry,
    tensors: Mapping[str, TensorEntry],
    costs: MachineCosts,
    config: Config,
    note: Callable[[str], None],
) -> list[StreamForm]:
    """The forms of one set, raw first. Residuals that cannot be used are left out, with a note."""
    forms = [StreamForm(prepared, geometry, costs, None)]
    residuals, problem = _residuals(prepared, config)
    if residuals is not None:
        try:
            residuals = compared_residuals(residuals, prepared.manifest, note)
            streamed = residuals.streamed(geometry, tensors)
        except SubspecError as error:
            problem = f"{error.message}; {error.hint or repair_command(prepared.manifest.model_id)}"
        else:
            share = sum(streamed.layers) / sum(geometry.layer_bytes)
            rebuilding = replace(costs, widen_bytes_per_s=costs.rebuild_bytes_per_s * share)
            if costs.rebuild_bytes_per_s:
                forms.append(StreamForm(prepared, replace(geometry, stored=streamed), rebuilding, residuals))
    if problem:
        note(f"the residuals are not used: {problem}")
    return forms


def _residuals(prepared: PreparedModel, config: Config) -> tuple[ResidualSet | None, str]:
    if config.draft.no_speculation or config.memory.no_residual:
        return None, ""
    return usable_residuals(prepared.directory, prepared.manifest)
