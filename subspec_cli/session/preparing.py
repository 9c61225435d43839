"""`subspec prepare`: from a model's name to substitutes on disk."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from subspec_cli.placement.geometry import GROUP_SIZES, geometry_from_config, read_geometry
from subspec_cli.store.hub import open_model
from subspec_cli.store.manifest import SubstituteSettings
from subspec_cli.store.prepare import PrepareProgress, prepare_model
from subspec_cli.store.source_directory import check_config
from subspec_cli.versions import library_versions

if TYPE_CHECKING:
    from torch import Tensor

_ASSUMED_DTYPE: Final = "BF16"


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What a preparation made."""

    model_id: str
    commit: str
    directory: Path
    layers: int
    bits: int
    optimizer: str
    source_bytes: int
    """16-bit bytes of the layers."""
    substitute_bytes: int
    """Bytes on disk."""
    bits_per_weight: float
    """Scales included."""
    sqnr_db: float | None
    """Signal-to-quantization-noise ratio of the layers made now; None if all were there."""
    elapsed_s: float
    already_prepared: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "directory": str(self.directory)}


class _MeteredQuantizer:
    """Quantizes layers and sums up how well the substitutes stand for the originals."""

    def __init__(self, settings: SubstituteSettings) -> None:
        self._settings = settings
        self._signal = 0.0
        self._noise = 0.0

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from subspec_cli.modeling.substitute import quantize_layer

        made = quantize_layer(tensors, self._settings.bits, self._settings.optimizer)
        self._signal += made.signal_power
        self._noise += made.noise_power
        return made.tensors

    @property
    def sqnr_db(self) -> float | None:
        """Ratio over everything quantized so far."""
        return 10 * math.log10(self._signal / self._noise) if self._noise > 0 else None


def _ignore(_text: str) -> None:
    """What becomes of messages that nobody asked for."""


def prepare(
    model: str,
    *,
    bits: int,
    optimizer: str,
    revision: str | None,
    force: bool,
    progress: Callable[[PrepareProgress], None],
    notify: Callable[[str], None] = _ignore,
) -> PrepareReport:
    """Download what is missing and write the substitutes of every layer; what is there is kept.

    `notify` is told of waits and of attempts that are repeated.
    """
    started = time.perf_counter()
    settings = SubstituteSettings(bits=bits, optimizer=optimizer)
    quantizer = _MeteredQuantizer(settings)
    latest: list[PrepareProgress] = []

    def watch(state: PrepareProgress) -> None:
        latest[:] = [state]
        progress(state)

    with open_model(model, revision, accept_config=_accept_config, notify=notify) as opened:
        geometry = read_geometry(opened.checkpoint.config, opened.checkpoint.tensors)
        prepared = prepare_model(
            opened,
            settings,
            quantizer,
            layer_count=geometry.layers,
            dtype=geometry.dtype,
            group_size=0 if bits == 8 else GROUP_SIZES[0],
            versions={name: version for name, version in library_versions().items() if name in _QUANTIZERS},
            force=force,
            progress=watch,
            notify=notify,
        )
    substitute_bytes = sum(file.size_bytes for file in prepared.manifest.layers)
    weights = geometry.layers * geometry.layer_matrix_bytes // geometry.element_bytes
    return PrepareReport(
        model_id=prepared.manifest.model_id,
        commit=prepared.manifest.commit,
        directory=prepared.directory,
        layers=geometry.layers,
        bits=bits,
        optimizer=optimizer,
        source_bytes=geometry.layers * geometry.layer_matrix_bytes,
        substitute_bytes=substitute_bytes,
        bits_per_weight=8 * substitute_bytes / weights,
        sqnr_db=quantizer.sqnr_db,
        elapsed_s=time.perf_counter() - started,
        already_prepared=not latest or latest[0].reused_layers == geometry.layers,
    )


_QUANTIZERS: Final = ("torch", "optimum-quanto")
"""Libraries that decide the substitutes' bytes."""


def _accept_config(config: Mapping[str, Any]) -> None:
    """Refuse a model that is not run before any of its weights is fetched."""
    check_config(config)
    geometry_from_config(config, _ASSUMED_DTYPE)
