"""`subspec prepare`: from the name of a model to substitutes on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.layer_tensors import LAYER_MATRICES
from subspec_cli.checkpoint.repository import Repository, check_fields, check_tokenizer_in, read_repository
from subspec_cli.config import Config
from subspec_cli.errors import SubspecError, UsageError
from subspec_cli.hub.model_name import name_of_id
from subspec_cli.hub.source_model import open_model
from subspec_cli.probe.kept_rates import DOWNLOAD, keep_rate, preparing
from subspec_cli.reporter import SILENT, Reporter
from subspec_cli.session.openmp import set_openmp_defaults
from subspec_cli.session.residuals import add_residuals
from subspec_cli.streaming.process_limits import check_libraries_fit
from subspec_cli.substitutes.head_file import HEAD_BITS
from subspec_cli.substitutes.integrity import Finding
from subspec_cli.substitutes.inventory import StoredModel
from subspec_cli.substitutes.layer_file import Quantizer
from subspec_cli.substitutes.manifest import MANIFEST_NAME, Manifest, read_manifest
from subspec_cli.substitutes.preparation import PrepareProgress, prepare_model
from subspec_cli.substitutes.prepared_model import PreparedModel, find_prepared, prepared_directory
from subspec_cli.substitutes.quality import MatrixQuality, OutputQuality, by_kind, matrix_kind, summed
from subspec_cli.substitutes.recipe import SubstituteRecipe
from subspec_cli.substitutes.repair import drop_damaged, is_of_residuals, is_source_damaged, kept_recency
from subspec_cli.substitutes.residual_set import RESIDUALS_NAME
from subspec_cli.substitutes.settings import TUNED, SubstituteSettings
from subspec_cli.versions import library_versions

if TYPE_CHECKING:
    from torch import Tensor

    from subspec_cli.hub.weight_downloads import DownloadProgress


@dataclass(frozen=True, slots=True)
class KindReport:
    """Size and quality of the substitutes of one kind of matrix, over all layers, or of the draft's head."""

    kind: str
    bits: int
    bits_per_weight: float
    """Scales included."""
    sqnr_db: float | None
    """Signal-to-quantization-noise ratio; None if nothing was lost."""
    outputs: OutputQuality | None = None
    """Of the outputs on the model's own text, if the set was tuned."""


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """Result of a preparation."""

    model_id: str
    commit: str
    directory: Path
    layers: int
    bits: int
    optimizer: str
    source_bytes: int
    """16-bit bytes of the layers and the head."""
    substitute_bytes: int
    """Bytes on disk."""
    kinds: tuple[KindReport, ...]
    """Each kind of matrix in the layers, in the order of use."""
    head: KindReport | None
    """The draft's head; None if no low-bit kernel takes its shape."""
    bits_per_weight: float
    """Of all matrices in the layers, scales included."""
    sqnr_db: float | None
    """Signal-to-quantization-noise ratio of all matrices in the layers; None if nothing was lost."""
    elapsed_s: float
    already_prepared: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "directory": str(self.directory)}


@dataclass(frozen=True, slots=True)
class _Source:
    """The model to prepare, as the user names it."""

    model: str
    revision: str | None
    follow_links: bool


def prepare(
    model: str,
    wanted: SubstituteSettings,
    *,
    revision: str | None = None,
    force: bool = False,
    follow_links: bool = False,
    progress: Callable[[PrepareProgress], None],
    reporter: Reporter = SILENT,
) -> PrepareReport:
    """Download what is missing and write the substitutes of every layer and the head; what is there is kept.

    The names in `wanted.overrides` may be patterns. Waits and repeated attempts are reported as notes. Raises what
    `open_model` and `prepare_model` raise, and UsageError for a pattern that matches nothing.
    """
    settings = replace(wanted, overrides=_matching(wanted.overrides, wanted.bits))
    source = _Source(model, revision, follow_links)
    return _prepare(source, _recipe(settings, _quantizer(settings)), force, progress, reporter)


def tune(
    model: str,
    base: SubstituteSettings,
    config: Config,
    *,
    revision: str | None = None,
    force: bool = False,
    progress: Callable[[PrepareProgress], None],
    reporter: Reporter = SILENT,
) -> PrepareReport:
    """Write tuned substitutes of a model that is prepared with the settings `base`; what is there is kept.

    `config` bounds the memory of the session that decodes the model's own text. Raises what `prepare` and
    `open_session` raise, and UsageError if all matrices have 8 bits.
    """
    if base.widths == {8}:
        raise UsageError("substitutes of 8 bits lose next to nothing and are not tuned", "--tune --bits 4")
    from subspec_cli.session.tuning import Tuner

    settings = replace(base, optimizer=TUNED, overrides=_matching(base.overrides, base.bits))
    source = _Source(model, revision, follow_links=True)  # the user was asked when the first set was made
    with Tuner(model, settings, config, reporter) as tuner:
        recipe = replace(_recipe(settings, tuner.quantize), find_text=tuner.find_text)
        return _prepare(source, recipe, force, progress, reporter)


def tuned_commit(model: str, base: SubstituteSettings) -> str | None:
    """The commit whose tuned set is the latest with this width, if that set was made after `base`; else None."""
    settings = replace(base, optimizer=TUNED, overrides=_matching(base.overrides, base.bits))
    with contextlib.suppress(SubspecError):
        latest = find_prepared(model, base.bits).manifest
        if latest.settings == settings and base.optimizer == "minmax":
            return latest.commit
    return None


def _prepare(
    source: _Source,
    recipe: SubstituteRecipe,
    force: bool,
    progress: Callable[[PrepareProgress], None],
    reporter: Reporter,
) -> PrepareReport:
    started = time.perf_counter()
    set_openmp_defaults()
    check_libraries_fit()
    latest: list[PrepareProgress] = []
    while_loading: list[DownloadProgress] = []

    def watch(state: PrepareProgress) -> None:
        latest[:] = [state]
        if state.download is not None and not _is_loaded(while_loading):
            while_loading[:] = [state.download]
        progress(state)

    with open_model(
        source.model,
        source.revision,
        follow_links=source.follow_links,
        accept_config=check_fields,
        reporter=reporter,
    ) as opened:
        repository = read_repository(opened.checkpoint)
        geometry = repository.geometry
        for note in repository.notes:
            reporter.note(note)
        _check_tokenizer(opened.checkpoint.directory, repository)
        prepared = prepare_model(
            replace(opened, checkpoint=replace(opened.checkpoint, tensors=repository.tensors)),
            geometry,
            recipe,
            force=force,
            progress=watch,
            reporter=reporter,
        )
    for download in while_loading:
        keep_rate(DOWNLOAD, download.received_bytes, download.elapsed_s)
    for state in latest:
        _keep_making_rate(state, recipe.settings)
    return _report(
        prepared,
        geometry,
        already_prepared=all(state.reused_bytes == state.total_bytes for state in latest),
        elapsed_s=time.perf_counter() - started,
    )


def _is_loaded(seen: Sequence[DownloadProgress]) -> bool:
    return any(download.done_files == download.total_files for download in seen)


def _keep_making_rate(state: PrepareProgress, settings: SubstituteSettings) -> None:
    made_bytes = state.done_bytes - state.reused_bytes
    if made_bytes and not state.copied_layers:
        keep_rate(preparing(settings.optimizer), made_bytes, state.elapsed_s)


def repair(
    stored: StoredModel, findings: Sequence[Finding], progress: Callable[[PrepareProgress], None]
) -> None:
    """Make the damaged files of a prepared model again, and only those; nothing while its own weights are damaged.

    Raises what `drop_damaged` and `prepare` raise.
    """
    if is_source_damaged(stored, findings):
        return
    had_residuals = (stored.directory / RESIDUALS_NAME).exists()
    manifest = drop_damaged(stored, findings)
    first = manifest.settings
    if first.optimizer == TUNED:
        first = replace(first, optimizer="minmax")
    with kept_recency(stored, prepared_directory(manifest.model_id, manifest.commit, first)):
        if not is_of_residuals(stored, findings):
            _make_again(manifest, first, progress)
        if had_residuals:
            add_residuals(
                PreparedModel(stored.directory, read_manifest(stored.directory / MANIFEST_NAME)),
                progress=lambda state: progress(
                    PrepareProgress(
                        state.done_layers,
                        state.total_layers,
                        0,
                        0,
                        state.done_bytes,
                        state.total_bytes,
                        state.elapsed_s,
                    )
                ),
            )


def _make_again(
    manifest: Manifest, first: SubstituteSettings, progress: Callable[[PrepareProgress], None]
) -> None:
    """Make what is missing of a set, and of the `first` set if it is tuned."""
    is_on_hub = name_of_id(manifest.model_id).directory is None
    revision = manifest.commit if is_on_hub else None
    prepare(
        manifest.model_id,
        first,
        revision=revision,
        follow_links=True,  # the user was asked when the set was made
        progress=progress,
    )
    if manifest.settings.optimizer == TUNED:
        tune(manifest.model_id, first, Config(), revision=revision, progress=progress)


def _check_tokenizer(directory: Path, repository: Repository) -> None:
    """Load the tokenizer as `run` will, so that a fault in it shows before weights are fetched."""
    check_tokenizer_in(directory, repository)
    from subspec_cli.modeling.pretrained import ModelTokenizer

    ModelTokenizer(directory, repository.tokenizer)


def _report(
    prepared: PreparedModel, geometry: ModelGeometry, *, already_prepared: bool, elapsed_s: float
) -> PrepareReport:
    """Report from the manifest alone, so that a run that finds everything done reports the same."""
    manifest, head = prepared.manifest, prepared.manifest.head
    kinds = by_kind(file.quality for file in manifest.layers)
    total = summed(kinds.values())
    bits = {matrix_kind(name): manifest.settings.bits_of(name) for name in LAYER_MATRICES}
    return PrepareReport(
        model_id=manifest.model_id,
        commit=manifest.commit,
        directory=prepared.directory,
        layers=geometry.layers,
        bits=manifest.settings.bits,
        optimizer=manifest.settings.optimizer,
        source_bytes=geometry.matrix_bytes + (geometry.table_bytes if head else 0),
        substitute_bytes=sum(file.size_bytes for file in manifest.files),
        kinds=tuple(_kind_report(kind, bits[kind], item) for kind, item in kinds.items()),
        head=_kind_report("head", HEAD_BITS, head.quality) if head else None,
        bits_per_weight=total.bits_per_weight if total else 0.0,
        sqnr_db=total.sqnr_db if total else None,
        elapsed_s=elapsed_s,
        already_prepared=already_prepared,
    )


def _kind_report(kind: str, bits: int, quality: MatrixQuality) -> KindReport:
    return KindReport(kind, bits, quality.bits_per_weight, quality.sqnr_db, quality.outputs)


def _recipe(settings: SubstituteSettings, quantizer: Quantizer) -> SubstituteRecipe:
    versions = {name: version for name, version in library_versions().items() if name in _QUANTIZERS}
    return SubstituteRecipe(settings, quantizer, _quantize_head, versions)


def _quantizer(settings: SubstituteSettings) -> Quantizer:
    def quantize(
        _layer: int, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, MatrixQuality]]:
        from subspec_cli.modeling.quantization import quantize_layer

        made = quantize_layer(tensors, settings)
        return made.tensors, made.quality

    return quantize


def _quantize_head(rows: Tensor) -> tuple[dict[str, Tensor], MatrixQuality]:
    from subspec_cli.modeling.quantization import quantize_head

    return quantize_head(rows)


def _matching(overrides: Iterable[tuple[str, int]], bits: int) -> tuple[tuple[str, int], ...]:
    """Return the matrices of another width than `bits`, sorted: equal choices make equal settings."""
    names = sorted(name.removesuffix(".weight") for name in LAYER_MATRICES)
    chosen: dict[str, int] = {}
    for pattern, wanted in overrides:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise UsageError(
                f"[substitute.overrides] {ascii(pattern)[:80]} matches no matrix of a layer",
                f"the matrices: {' '.join(names)}",
            )
        for name in found:
            chosen.setdefault(name, wanted)
    return tuple((name, chosen[name]) for name in names if chosen.get(name, bits) != bits)


_QUANTIZERS: Final = ("torch", "optimum-quanto")
"""Libraries that determine the bytes of substitutes."""
