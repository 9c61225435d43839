"""`subspec prepare --residual`: residuals beside the substitutes of a prepared model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from subspec_cli.checkpoint.repository import check_fields, read_repository
from subspec_cli.hub.model_name import name_of_id
from subspec_cli.hub.source_model import open_model
from subspec_cli.reporter import SILENT, Reporter
from subspec_cli.substitutes.prepared_model import PreparedModel, check_pairing
from subspec_cli.substitutes.residual_preparation import (
    ResidualProgress,
    prepare_residuals,
    why_no_residuals,
)
from subspec_cli.substitutes.settings import SubstituteSettings
from subspec_cli.units import printable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ResidualReport:
    """The residuals of a prepared model."""

    size_bytes: int
    """Bytes on disk, of the residuals alone."""
    bits_per_weight: float
    """Of what a pass streams, matrices that stay raw included."""
    raw_share: float
    """Share of the weights whose matrices have no residual."""
    elapsed_s: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class _Codec:
    """Residuals over the codes of one kind of substitutes."""

    settings: SubstituteSettings

    def make(self, weights: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The residuals of a layer."""
        from subspec_cli.modeling.residuals import residuals_of_layer

        return residuals_of_layer(weights, stored, self.settings)

    def differing(
        self, residuals: Mapping[str, Tensor], weights: Mapping[str, Tensor], stored: Mapping[str, Tensor]
    ) -> str | None:
        """The first matrix that does not come back."""
        from subspec_cli.modeling.residuals import differing_matrix

        return differing_matrix(residuals, weights, stored)


def add_residuals(
    prepared: PreparedModel,
    *,
    progress: Callable[[ResidualProgress], None],
    reporter: Reporter = SILENT,
) -> ResidualReport | None:
    """Write the residuals of a prepared model; None, with a note that says why, if it cannot have any.

    Raises what `open_model`, `check_pairing` and `prepare_residuals` raise.
    """
    started = time.perf_counter()
    manifest = prepared.manifest
    is_on_hub = name_of_id(manifest.model_id).directory is None
    with open_model(
        manifest.model_id,
        manifest.commit if is_on_hub else None,
        follow_links=True,  # the user was asked when the set was made
        accept_config=check_fields,
        reporter=reporter,
    ) as opened:
        check_pairing(prepared, opened.checkpoint)
        repository = read_repository(opened.checkpoint)
        if (why := why_no_residuals(repository.geometry, manifest.settings)) is not None:
            reporter.note(
                f"{printable(manifest.model_id)} gets no residuals: {why}; its layers are streamed raw"
            )
            return None
        files = prepare_residuals(
            prepared,
            replace(opened.checkpoint, tensors=repository.tensors),
            _Codec(manifest.settings),
            progress=progress,
            note=reporter.note,
        )
    weights, raw = sum(file.weights for file in files), sum(file.raw_weights for file in files)
    size_bytes = sum(file.size_bytes for file in files)
    if raw == weights:
        reporter.note(
            f"no residual of {printable(manifest.model_id)} is smaller than its matrix; all are streamed raw"
        )
    return ResidualReport(
        size_bytes, (8 * size_bytes + 16 * raw) / weights, raw / weights, time.perf_counter() - started
    )
