"""Writes the residuals of a prepared model layer by layer, with about one layer in memory. Safe to kill and rerun."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from subspec_cli.checkpoint.checkpoint import Checkpoint, check_unchanged, layer_entries
from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.layer_tensors import layer_prefix, matrices_of
from subspec_cli.checkpoint.residual_names import parts_of
from subspec_cli.checkpoint.safetensors_bytes import safetensors_bytes
from subspec_cli.checkpoint.safetensors_header import read_header
from subspec_cli.checkpoint.tensor_reader import read_hashed_tensors, read_tensors
from subspec_cli.errors import IntegrityError
from subspec_cli.files.atomic_write import atomic_write, sweep_stale_temps
from subspec_cli.files.free_space import check_free_space
from subspec_cli.files.lock import directory_lock
from subspec_cli.files.regular_file import has_size, sha256_file
from subspec_cli.substitutes.manifest import LayerFile
from subspec_cli.substitutes.prepared_model import PreparedModel, load_layer
from subspec_cli.substitutes.residual_set import (
    ResidualFile,
    compared_residuals,
    complete_residuals,
    problem_of,
    read_residuals,
    write_residuals,
)
from subspec_cli.substitutes.settings import SubstituteSettings
from subspec_cli.units import printable

if TYPE_CHECKING:
    from torch import Tensor

_SLACK_BYTES = 16 << 20


class ResidualCodec(Protocol):
    """Makes the residuals of a layer, and checks them; tensors are by the name inside the layer."""

    def make(self, weights: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The residuals of 16-bit matrices over the tensors of their substitute."""
        ...

    def differing(
        self, residuals: Mapping[str, Tensor], weights: Mapping[str, Tensor], stored: Mapping[str, Tensor]
    ) -> str | None:
        """The first matrix that its residual does not give bit for bit."""
        ...


@dataclass(frozen=True, slots=True)
class ResidualProgress:
    """How far the residuals are. Bytes are those of the 16-bit layers."""

    done_layers: int
    total_layers: int
    done_bytes: int
    total_bytes: int
    elapsed_s: float


def why_no_residuals(geometry: ModelGeometry, settings: SubstituteSettings) -> str | None:
    """Why a model's matrices are streamed as they are; None if they can have residuals."""
    if geometry.stored is not None:
        return "its matrices are stored in 8 bits"
    if geometry.dtype != "BF16":
        return f"its matrices are {geometry.dtype}, and residuals are of bfloat16"
    if 4 not in settings.widths:
        return f"its substitutes have {settings.bits} bits, and residuals are over 4-bit codes"
    return None


def prepare_residuals(
    prepared: PreparedModel,
    checkpoint: Checkpoint,
    codec: ResidualCodec,
    *,
    progress: Callable[[ResidualProgress], None],
    note: Callable[[str], None],
) -> list[ResidualFile]:
    """Write the residuals of every layer, each checked bit for bit in the written file. Finished ones are kept.

    Raises:
        IntegrityError: weights or substitutes that are not those of the manifest, or a file that does not give them.
        ResourceError: the disk is too small or cannot be written.
    """
    with contextlib.suppress(IntegrityError):  # finished ones need no lock: the directory may be read-only
        if found := complete_residuals(prepared.directory, prepared.manifest):
            return list(compared_residuals(found, prepared.manifest, note).files)
    with directory_lock(prepared.directory, on_wait=note):
        sweep_stale_temps(prepared.directory)
        work = _Residuals(prepared, checkpoint, codec, progress)
        return work.run()


class _Residuals:
    """One run of `prepare_residuals`."""

    def __init__(
        self,
        prepared: PreparedModel,
        checkpoint: Checkpoint,
        codec: ResidualCodec,
        progress: Callable[[ResidualProgress], None],
    ) -> None:
        self._prepared, self._checkpoint, self._codec, self._progress = prepared, checkpoint, codec, progress
        layers = prepared.manifest.layers
        self._layer_bytes = [
            sum(entry.size_bytes for entry in layer_entries(checkpoint, file.layer)) for file in layers
        ]
        self._done = {file.layer: file for file in self._reusable()}

    def run(self) -> list[ResidualFile]:
        """Make what is missing."""
        missing = [file for file in self._prepared.manifest.layers if file.layer not in self._done]
        if missing:
            # At most the bytes of the weights, since a residual that is not smaller is not written.
            need_bytes = sum(self._layer_bytes[file.layer] for file in missing) + _SLACK_BYTES
            what = f"the residuals of {printable(self._prepared.manifest.model_id)}"
            check_free_space(self._prepared.directory, need_bytes, what)
        started_s = time.monotonic()
        self._report(0.0)
        for file in missing:
            self._done[file.layer] = self._make(file)
            write_residuals(self._prepared.directory, self._files())
            self._report(time.monotonic() - started_s)
        check_unchanged(self._checkpoint)
        return self._files()

    def _files(self) -> list[ResidualFile]:
        return [self._done[layer] for layer in sorted(self._done)]

    def _reusable(self) -> list[ResidualFile]:
        """The listed files that are still there, with their bytes, and belong to the present substitutes."""
        try:
            listed = read_residuals(self._prepared.directory)
        except IntegrityError:  # its hashes cannot be trusted: all is made again
            return []
        found = []
        for file in listed:
            path = self._prepared.directory / file.name
            if problem_of(file, self._prepared.manifest):
                continue
            if path.is_symlink() or not has_size(path, file.size_bytes):
                continue
            status = path.stat()
            if sha256_file(path) == file.sha256:
                found.append(file.with_times(status))
        return found

    def _make(self, layer: LayerFile) -> ResidualFile:
        prefix = layer_prefix(layer.layer)
        tensors, source_sha256 = read_hashed_tensors(layer_entries(self._checkpoint, layer.layer))
        if source_sha256 != layer.source_sha256:
            raise IntegrityError(
                f"layer {layer.layer} of {printable(self._prepared.manifest.model_id)} has other weights than its "
                "substitute was made from",
                "subspec models verify says which files changed",
            )
        weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        weights = {name: weights[name] for name in matrices_of(weights)}
        stored = load_layer(self._prepared, layer.layer)
        made = self._codec.make(weights, stored)
        sizes = {name: weight.numel() for name, weight in weights.items()}
        data = safetensors_bytes(made)
        file = ResidualFile(
            layer=layer.layer,
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            source_sha256=source_sha256,
            substitute_sha256=layer.sha256,
            weights=sum(sizes.values()),
            raw_weights=sum(size for name, size in sizes.items() if parts_of(name)[0] not in made),
        )
        path = self._prepared.directory / file.name
        made.clear()
        atomic_write(path, data)
        del data
        file = file.with_times(path.stat())  # what is read next has these times
        written = read_tensors(read_header(path).entries)
        if (name := self._codec.differing(written, weights, stored)) is not None:
            path.unlink(missing_ok=True)
            raise IntegrityError(
                f"{printable(str(path))} did not give {name} bit for bit", "run the command again"
            )
        return file

    def _report(self, elapsed_s: float) -> None:
        done_bytes = sum(self._layer_bytes[layer] for layer in self._done)
        self._progress(
            ResidualProgress(
                len(self._done), len(self._layer_bytes), done_bytes, sum(self._layer_bytes), elapsed_s
            )
        )
