"""Writes substitutes layer by layer, with about one layer in memory. Safe to kill and rerun at any moment.

A layer file counts once the journal lists it. The journal is written after each layer, and removed at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from subspec_cli.checkpoint.checkpoint import (
    Checkpoint,
    check_headers_unchanged,
    check_unchanged,
    layer_count_in_tensors,
    layer_entries,
)
from subspec_cli.checkpoint.dtypes import torch_dtype
from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.layer_tensors import layer_prefix
from subspec_cli.checkpoint.tensor_reader import check_finite, read_hashed_tensors
from subspec_cli.checkpoint.widening import widened_tensors
from subspec_cli.errors import BusyError, IntegrityError, SubspecError
from subspec_cli.files.atomic_write import atomic_write, sweep_stale_temps
from subspec_cli.files.home import make_home_directory
from subspec_cli.files.io_errors import write_error
from subspec_cli.files.lock import directory_lock
from subspec_cli.files.regular_file import FileState, file_state, sha256_file
from subspec_cli.hub.source_model import OpenedModel
from subspec_cli.hub.weight_downloads import DownloadProgress, WeightDownloads
from subspec_cli.reporter import Reporter
from subspec_cli.substitutes.disk_space import check_disk_space
from subspec_cli.substitutes.manifest import (
    JOURNAL_NAME,
    MANIFEST_NAME,
    LayerFile,
    Manifest,
    layer_file_name,
    layer_path,
    write_manifest,
)
from subspec_cli.substitutes.prepared_model import PreparedModel, prepared_directory
from subspec_cli.substitutes.quality import MatrixQuality
from subspec_cli.substitutes.reuse import Twins, find_twins, finished_manifest, read_twin, reusable_layers
from subspec_cli.substitutes.settings import SubstituteSettings
from subspec_cli.substitutes.source_stamp import make_stamp
from subspec_cli.units import counted, printable
from subspec_cli.versions import __version__

if TYPE_CHECKING:
    import torch

_MOST_ROUNDS = 3  # of making what another process replaced meanwhile

Quantizer: TypeAlias = (
    "Callable[[int, dict[str, torch.Tensor]], tuple[dict[str, torch.Tensor], dict[str, MatrixQuality]]]"
)
"""From a layer's number and 16-bit tensors, keyed by the name inside the layer, to the tensors to write and their
quality."""


@dataclass(frozen=True, slots=True)
class SubstituteRecipe:
    """What decides the bytes of substitutes, besides the 16-bit weights and this program."""

    settings: SubstituteSettings
    quantizer: Quantizer
    library_versions: Mapping[str, str]
    """Versions of the libraries that the quantizer uses."""


@dataclass(frozen=True, slots=True)
class PrepareProgress:
    """How far a preparation is. Bytes are those of the 16-bit layers."""

    done_layers: int
    total_layers: int
    reused_layers: int
    """Done layers that an earlier run made. If these are all layers, the model was already prepared."""
    done_bytes: int
    total_bytes: int
    elapsed_s: float
    """Time spent on making layers, without waiting for their weights."""
    copied_layers: int = 0
    """Done layers that were copied from another set of the same weights."""
    download: DownloadProgress | None = None
    """Download of the weights; None if all were there."""


def prepare_model(
    model: OpenedModel,
    geometry: ModelGeometry,
    recipe: SubstituteRecipe,
    *,
    force: bool,
    progress: Callable[[PrepareProgress], None],
    reporter: Reporter,
) -> PreparedModel:
    """Write the substitutes of every layer. Finished layers are reused, unless `force` is set.

    Missing weights are downloaded in the background; a layer is made once its files are complete and verified.
    During the run, and after a kill, an earlier complete set in the same place stays usable. If another process
    prepares the same set, this one waits for it.

    Args:
        model: the source, opened.
        geometry: the geometry of the source.
        recipe: how substitutes are made.
        force: make all layers again.
        progress: called after every change of the progress.
        reporter: gets a note if another process is waited for.

    Raises:
        IntegrityError: a damaged source, weights that are not finite, or a source that changed during the run.
        ResourceError: the disk is too small or cannot be written.
        NetworkError, AccessError: a download failed.
        UnsupportedModelError: the place holds a newer version's work (unless `force`).
    """
    resolved, checkpoint, settings = model.resolved, model.checkpoint, recipe.settings
    goal = Manifest(
        model_id=resolved.model_id,
        source_directory=str(resolved.directory),
        commit=resolved.commit,
        fingerprint=checkpoint.fingerprint,
        source_stamp=make_stamp(checkpoint) if resolved.is_local else "",
        dtype=geometry.dtype,
        settings=settings,
        group_size=settings.group_size,
        layers=(),
        tool_version=__version__,
        library_versions=dict(recipe.library_versions),
    )
    directory = prepared_directory(resolved.model_id, resolved.commit, settings)
    layer_bytes = _layer_bytes(checkpoint, geometry.layers)
    work = _Preparation(
        goal, checkpoint, model.weight_downloads, directory, layer_bytes, progress, reporter.note
    )
    if directory.is_dir():
        sweep_stale_temps(directory)
    if not force and (finished := work.already_prepared()):
        return finished
    if not directory.exists():  # a refusal leaves nothing behind
        work.check_space()
    make_home_directory(directory)
    with directory_lock(directory, on_wait=reporter.note) as has_waited:
        if has_waited and not force and (finished := work.already_prepared()):
            return finished
        return work.run(recipe.quantizer, force=force)


@dataclass
class _Preparation:
    """One run of `prepare_model`: what to make, and which layers are done."""

    goal: Manifest
    checkpoint: Checkpoint
    weight_downloads: WeightDownloads
    directory: Path
    layer_bytes: list[int]
    progress: Callable[[PrepareProgress], None]
    note: Callable[[str], None]
    twins: Twins = field(default_factory=dict)
    making_s: float = 0.0
    copied_layers: int = 0
    done: dict[int, LayerFile] = field(default_factory=dict)
    reused_layers: int = 0
    states: dict[int, FileState] = field(default_factory=dict)
    """Files of the done layers as they were when they were written or hashed."""

    def already_prepared(self) -> PreparedModel | None:
        """The complete set of an earlier run, marked as the latest; None if there is none or weights are missing."""
        if not self.weight_downloads.is_complete:
            return None
        found = finished_manifest(self.directory, self.goal, len(self.layer_bytes))
        if found is None:
            return None
        with contextlib.suppress(
            OSError
        ):  # only the order of sets depends on it; the directory may be read-only
            os.utime(self.directory / MANIFEST_NAME)
        for file in found.layers:
            self.reuse(file)
        return PreparedModel(self.directory, found)

    def run(self, quantizer: Quantizer, *, force: bool) -> PreparedModel:
        """Make and record all layers that are missing. The caller holds the lock."""
        if not force:
            for file, state in reusable_layers(self.directory, self.goal, self.checkpoint):
                self.states[file.layer] = state
                self.reuse(file)
            self.twins = find_twins(self.directory, self.goal)
        self.check_space()
        if force:  # an empty journal: from here on, the earlier set does not count as finished
            write_manifest(self.directory / JOURNAL_NAME, self.goal)
        self.weight_downloads.start()
        for _ in range(_MOST_ROUNDS):
            self.make_missing(quantizer)
            check_unchanged(self.checkpoint)
            if self.weight_downloads.progress():
                check_headers_unchanged(self.checkpoint)
            if not self.drop_replaced() and (prepared := self.finish()):
                return prepared
        raise BusyError(
            f"another process keeps writing other files into {printable(str(self.directory))}, "
            "and the disk's locks do not keep it out",
            "let it finish, then run the command again",
        )

    def make_missing(self, quantizer: Quantizer) -> None:
        """Make all layers that are not done, each as soon as its weights are there."""
        waiting = [layer for layer in range(len(self.layer_bytes)) if layer not in self.done]
        while waiting or not self.weight_downloads.is_complete:
            ready = next((layer for layer in waiting if self.has_arrived(layer)), None)
            if ready is None:
                self.weight_downloads.wait()
                self._report_progress()
            else:
                self.make_layer(ready, quantizer)
                waiting.remove(ready)

    def drop_replaced(self) -> bool:
        """Whether layers have other bytes than recorded. They then count as missing.

        Where locks do not work, another preparation may have put its own files in place. Only files that were
        replaced since they were written or hashed are read again.
        """
        replaced = []
        for layer, file in self.done.items():
            path = layer_path(self.directory, file)
            with contextlib.suppress(OSError, SubspecError):
                state = file_state(path.stat())
                if state == self.states[layer]:
                    continue
                if sha256_file(path) == file.sha256:
                    self.states[layer] = state
                    continue
            replaced.append(layer)
        for layer in replaced:
            del self.done[layer]
        return bool(replaced)

    def has_arrived(self, layer: int) -> bool:
        """Whether all weight files of a layer are complete."""
        root = self.checkpoint.directory
        entries = layer_entries(self.checkpoint, layer)
        return self.weight_downloads.has({entry.path.relative_to(root).as_posix() for entry in entries})

    def reuse(self, file: LayerFile) -> None:
        """Count a layer as done: an earlier run made it."""
        self.done[file.layer] = file
        self.reused_layers += 1
        self._report_progress()

    def check_space(self) -> None:
        """Refuse if there is too little space for the layers and weights that are still to be written."""
        left = [layer for layer in range(len(self.layer_bytes)) if layer not in self.done]
        check_disk_space(self.goal, self.checkpoint, self.weight_downloads, self.directory, left)

    def make_layer(self, layer: int, quantizer: Quantizer) -> None:
        """Read one layer, quantize it or take what another set made of the same bytes, write it, then record it."""
        started_s = time.monotonic()
        tensors, source_sha256 = read_hashed_tensors(layer_entries(self.checkpoint, layer))
        file, data = self._twin_of(layer, source_sha256) or _made_layer(
            layer, widened_tensors(tensors, torch_dtype(self.goal.dtype)), source_sha256, quantizer
        )
        self.states[layer] = atomic_write(self.directory / file.name, data)
        self.done[layer] = file
        write_manifest(self.directory / JOURNAL_NAME, self._manifest())
        self.making_s += time.monotonic() - started_s
        self._report_progress()

    def _twin_of(self, layer: int, source_sha256: str) -> tuple[LayerFile, bytes] | None:
        """What another set made of the same 16-bit bytes."""
        directory, file = self.twins.get((layer, source_sha256), (None, None))
        if directory is None or file is None or (data := read_twin(directory, file)) is None:
            return None
        self.copied_layers += 1
        if not self.done:
            self.note(f"layers of the same weights are in {printable(str(directory))}: they are copied")
        return file, data

    def finish(self) -> PreparedModel | None:
        """Write the manifest, which makes the directory a prepared model, and remove the journal.

        None if a layer was replaced until then: the manifest does not describe it.
        """
        manifest = self._manifest()
        write_manifest(self.directory / MANIFEST_NAME, manifest)
        if self.drop_replaced():
            return None
        journal = self.directory / JOURNAL_NAME
        try:
            journal.unlink(missing_ok=True)
        except OSError as error:
            raise write_error(error, journal) from error
        return PreparedModel(self.directory, manifest)

    def _manifest(self) -> Manifest:
        return replace(self.goal, layers=tuple(self.done[layer] for layer in sorted(self.done)))

    def _report_progress(self) -> None:
        self.progress(
            PrepareProgress(
                done_layers=len(self.done),
                total_layers=len(self.layer_bytes),
                reused_layers=self.reused_layers,
                done_bytes=sum(self.layer_bytes[layer] for layer in self.done),
                total_bytes=sum(self.layer_bytes),
                elapsed_s=self.making_s,
                copied_layers=self.copied_layers,
                download=self.weight_downloads.progress(),
            )
        )


def _made_layer(
    layer: int, tensors: dict[str, torch.Tensor], source_sha256: str, quantizer: Quantizer
) -> tuple[LayerFile, bytes]:
    """The record and the bytes of a layer's file. Raises IntegrityError for weights that are not finite."""
    from safetensors.torch import save

    check_finite(tensors)
    prefix = layer_prefix(layer)
    packed, quality = quantizer(
        layer, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    )
    tensors.clear()  # free them before the bytes of the file take memory
    data = save({name: packed[name].contiguous() for name in sorted(packed)})
    sha256 = hashlib.sha256(data).hexdigest()
    return LayerFile(layer_file_name(layer), layer, len(data), sha256, source_sha256, quality), data


def _layer_bytes(checkpoint: Checkpoint, layer_count: int) -> list[int]:
    found = layer_count_in_tensors(checkpoint)
    if found != layer_count:
        raise IntegrityError(
            f"{printable(str(checkpoint.directory))} holds {counted(found, 'layer')}, its config says {layer_count}"
        )
    return [
        sum(entry.size_bytes for entry in layer_entries(checkpoint, layer)) for layer in range(layer_count)
    ]
