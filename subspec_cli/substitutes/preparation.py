"""Writes substitutes layer by layer, with about one layer in memory. Safe to kill and rerun at any moment.

A file counts once the journal lists it. The journal is written after each file, and removed at the end. The head is
the last file, because nothing waits for it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from subspec_cli.checkpoint.checkpoint import (
    Checkpoint,
    check_headers_unchanged,
    check_unchanged,
    layer_count_in_tensors,
    layer_entries,
)
from subspec_cli.checkpoint.dtypes import torch_dtype
from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.safetensors_header import TensorEntry
from subspec_cli.checkpoint.tensor_reader import read_hashed_tensors
from subspec_cli.checkpoint.widening import widened_tensors
from subspec_cli.errors import BusyError, IntegrityError, SubspecError
from subspec_cli.files.atomic_write import atomic_write, remove_file, sweep_stale_temps
from subspec_cli.files.home import make_home_directory
from subspec_cli.files.lock import directory_lock
from subspec_cli.files.regular_file import FileState, file_state, sha256_file
from subspec_cli.hub.source_model import OpenedModel
from subspec_cli.hub.weight_downloads import DownloadProgress, WeightDownloads
from subspec_cli.reporter import Reporter
from subspec_cli.substitutes.disk_space import check_disk_space, estimate_file_bytes
from subspec_cli.substitutes.head_file import (
    head_entry,
    head_file_bytes,
    head_pieces,
    write_head,
)
from subspec_cli.substitutes.in_use import users_of
from subspec_cli.substitutes.layer_file import made_layer
from subspec_cli.substitutes.manifest import (
    HEAD_NAME,
    JOURNAL_NAME,
    MANIFEST_NAME,
    TUNING_TEXT_NAME,
    LayerFile,
    Manifest,
    Part,
    StoredFile,
    file_path,
    layer_file_name,
    write_manifest,
)
from subspec_cli.substitutes.prepared_model import PreparedModel, prepared_directory
from subspec_cli.substitutes.recipe import SubstituteRecipe
from subspec_cli.substitutes.reuse import (
    Twins,
    earlier_record,
    find_twins,
    finished_manifest,
    has_text,
    read_twin,
    reusable_files,
)
from subspec_cli.substitutes.source_stamp import make_stamp
from subspec_cli.units import counted, printable
from subspec_cli.versions import __version__

_MOST_ROUNDS = 3  # of making what another process replaced meanwhile


@dataclass(frozen=True, slots=True)
class PrepareProgress:
    """How far a preparation is. Bytes are those of the 16-bit layers and of the head."""

    done_layers: int
    total_layers: int
    reused_layers: int
    """Done layers that an earlier run made."""
    reused_bytes: int
    """Bytes of what an earlier run made. If these are all bytes, the model was already prepared."""
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
    """Write the substitutes of every layer and of the head. Finished files are reused, unless `force` is set.

    Missing weights are downloaded in the background; a layer is made once its files are complete and verified.
    A head whose shape no kernel takes is left out.
    During the run, and after a kill, an earlier complete set in the same place stays usable. If another process
    prepares the same set, this one waits for it.

    Args:
        model: the source, opened.
        geometry: the geometry of the source.
        recipe: how substitutes are made.
        force: make all files again.
        progress: called after every change of the progress.
        reporter: gets a note if another process is waited for, and if the head is left out.

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
    work = _Preparation(goal, checkpoint, model.weight_downloads, directory, recipe, progress, reporter.note)
    work.find_sources(geometry)
    if directory.is_dir():
        sweep_stale_temps(directory)
        users_of(directory)  # deletes what killed processes left
    if not force and (finished := work.already_prepared()):
        return finished
    if not directory.exists():  # a refusal leaves nothing behind
        work.check_space()
    make_home_directory(directory)
    with directory_lock(directory, on_wait=reporter.note) as has_waited:
        if has_waited and not force and (finished := work.already_prepared()):
            return finished
        return work.run(force=force)


@dataclass
class _Preparation:
    """One run of `prepare_model`: what to make, and which files are done."""

    goal: Manifest
    checkpoint: Checkpoint
    weight_downloads: WeightDownloads
    directory: Path
    recipe: SubstituteRecipe
    progress: Callable[[PrepareProgress], None]
    note: Callable[[str], None]
    sources: dict[Part, Sequence[TensorEntry]] = field(default_factory=dict)
    """The 16-bit tensors of each part, in the order in which the parts are made."""
    head: TensorEntry | None = None
    """The table of the head; None if no kernel takes its shape."""
    earlier: Manifest | None = None
    """What an earlier run recorded of files that are still of the same weights."""
    twins: Twins = field(default_factory=dict)
    making_s: float = 0.0
    copied_layers: int = 0
    done: dict[Part, StoredFile] = field(default_factory=dict)
    reused: set[Part] = field(default_factory=set)
    states: dict[Part, FileState] = field(default_factory=dict)
    """The done files as they were when they were written or hashed."""

    def find_sources(self, geometry: ModelGeometry) -> None:
        """Find the 16-bit tensors of each layer and of the head."""
        _check_layer_count(self.checkpoint, geometry.layers)
        self.sources = {layer: layer_entries(self.checkpoint, layer) for layer in range(geometry.layers)}
        self.head = head_entry(self.checkpoint.tensors)
        if self.head is not None:
            self.sources["head"] = head_pieces(self.head)

    def already_prepared(self) -> PreparedModel | None:
        """The complete set of an earlier run, marked as the latest; None if there is none or weights are missing."""
        if not self.weight_downloads.is_complete:
            return None
        found = finished_manifest(self.directory, self.goal, list(self.sources))
        if found is None:
            return None
        # Only the order of sets depends on it; the directory may be read-only.
        with contextlib.suppress(OSError):
            os.utime(self.directory / MANIFEST_NAME)
        for file in found.files:
            self.reuse(file)
        return PreparedModel(self.directory, found)

    def run(self, *, force: bool) -> PreparedModel:
        """Make and record all files that are missing. The caller holds the lock."""
        if self.head is None:
            self.note("no 4-bit kernel takes the shape of the head, so the draft will use the 16-bit head")
        if not force:
            self.reuse_earlier()
        self.check_space()
        if force:  # an empty journal: from here on, the earlier set does not count as finished
            write_manifest(self.directory / JOURNAL_NAME, self.goal)
        self.weight_downloads.start()
        if self.recipe.find_text is not None:
            self.find_text(self.recipe.find_text)
        if not force:
            self.twins = find_twins(self.directory, self.goal, self.sources)
        for _ in range(_MOST_ROUNDS):
            self.make_missing()
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

    def reuse_earlier(self) -> None:
        """Count what an earlier run made of the same weights as done."""
        self.earlier = earlier_record(self.directory, self.goal, self.sources)
        if self.earlier is not None:
            self.goal = replace(self.goal, tuning_text_sha256=self.earlier.tuning_text_sha256)
            for file, state in reusable_files(self.directory, self.earlier):
                self.states[file.part] = state
                self.reuse(file)

    def find_text(self, find: Callable[[str | None], str]) -> None:
        """Find the text that missing layers are tuned with. Layers that were tuned with another are made again."""
        layers = self.sources.keys() - {"head"}
        if layers <= self.done.keys() and has_text(self.directory, self.goal.tuning_text_sha256):
            return
        if self.earlier is None:  # the text of other weights, or one that is to be decoded again
            remove_file(self.directory / TUNING_TEXT_NAME)
        # The journal says which weights the text is of, so that a run after a kill goes on with it.
        write_manifest(self.directory / JOURNAL_NAME, self._manifest())
        sha256 = find(self.goal.tuning_text_sha256)
        if sha256 != self.goal.tuning_text_sha256:
            for part in layers & self.done.keys():
                del self.done[part]
            self.reused &= self.done.keys()
            self.goal = replace(self.goal, tuning_text_sha256=sha256)

    def make_missing(self) -> None:
        """Make all layers that are not done, each as soon as its weights are there, and then the head."""
        waiting = [part for part in self.sources if isinstance(part, int) and part not in self.done]
        while waiting or not self.weight_downloads.is_complete:
            ready = next((layer for layer in waiting if self.has_arrived(layer)), None)
            if ready is None:
                self.weight_downloads.wait()
                self._report_progress()
            else:
                self.make_layer(ready)
                waiting.remove(ready)
        if self.head is not None and "head" not in self.done:
            self.make_head(self.head)

    def drop_replaced(self) -> bool:
        """Whether files have other bytes than recorded. They then count as missing.

        Where locks do not work, another preparation may have put its own files in place. Only files that were
        replaced since they were written or hashed are read again.
        """
        replaced = []
        for part, file in self.done.items():
            path = file_path(self.directory, file.name)
            with contextlib.suppress(OSError, SubspecError):
                state = file_state(path.stat())
                if state == self.states[part]:
                    continue
                if sha256_file(path) == file.sha256:
                    self.states[part] = state
                    continue
            replaced.append(part)
        for part in replaced:
            del self.done[part]
        return bool(replaced)

    def has_arrived(self, layer: int) -> bool:
        """Whether all weight files of a layer are complete."""
        root = self.checkpoint.directory
        entries = self.sources[layer]
        return self.weight_downloads.has({entry.path.relative_to(root).as_posix() for entry in entries})

    def reuse(self, file: StoredFile) -> None:
        """Count a file as done: an earlier run made it."""
        self.done[file.part] = file
        self.reused.add(file.part)
        self._report_progress()

    def check_space(self) -> None:
        """Refuse if there is too little space for the files and weights that are still to be written."""
        estimates = {
            layer_file_name(part): estimate_file_bytes(self.checkpoint, part, self.goal.settings)
            for part in self.sources
            if isinstance(part, int) and part not in self.done
        }
        if self.head is not None and "head" not in self.done:
            estimates[HEAD_NAME] = head_file_bytes(self.head.shape)
        check_disk_space(self.goal, self.weight_downloads, self.directory, estimates)

    def make_layer(self, layer: int) -> None:
        """Read one layer, quantize it or take what another set made of the same bytes, write it, then record it."""
        started_s = time.monotonic()
        tensors, source_sha256 = read_hashed_tensors(self.sources[layer])
        file, data = self._twin_of(layer, source_sha256) or made_layer(
            layer,
            widened_tensors(tensors, torch_dtype(self.goal.dtype)),
            source_sha256,
            self.recipe.quantizer,
        )
        self._record(file, atomic_write(self.directory / file.name, data), started_s)

    def make_head(self, head: TensorEntry) -> None:
        """Read and write the head a few rows at a time, then record it."""
        started_s = time.monotonic()
        dtype = torch_dtype(self.goal.dtype)
        self._record(*write_head(self.directory, head, self.recipe.head_quantizer, dtype), started_s)

    def _record(self, file: StoredFile, state: FileState, started_s: float) -> None:
        self.states[file.part] = state
        self.done[file.part] = file
        self.reused.discard(file.part)
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

        None if a file was replaced until then: the manifest does not describe it.
        """
        manifest = self._manifest()
        write_manifest(self.directory / MANIFEST_NAME, manifest)
        if self.drop_replaced():
            return None
        remove_file(self.directory / JOURNAL_NAME)
        return PreparedModel(self.directory, manifest)

    def _manifest(self) -> Manifest:
        return self.goal.with_files(self.done.values())

    def _bytes_of(self, parts: Iterable[Part]) -> int:
        return sum(entry.size_bytes for part in parts for entry in self.sources[part])

    def _report_progress(self) -> None:
        self.progress(
            PrepareProgress(
                done_layers=len(self.done.keys() - {"head"}),
                total_layers=len(self.sources.keys() - {"head"}),
                reused_layers=len(self.reused - {"head"}),
                reused_bytes=self._bytes_of(self.reused),
                done_bytes=self._bytes_of(self.done),
                total_bytes=self._bytes_of(self.sources),
                elapsed_s=self.making_s,
                copied_layers=self.copied_layers,
                download=self.weight_downloads.progress(),
            )
        )


def _check_layer_count(checkpoint: Checkpoint, layer_count: int) -> None:
    found = layer_count_in_tensors(checkpoint)
    if found != layer_count:
        raise IntegrityError(
            f"{printable(str(checkpoint.directory))} holds {counted(found, 'layer')}, its config says {layer_count}"
        )
