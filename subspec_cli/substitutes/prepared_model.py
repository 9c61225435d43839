"""Prepared models on this machine: their directories, the choice among them, and checked loads of their layers."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from subspec_cli.checkpoint.checkpoint import Checkpoint
from subspec_cli.checkpoint.geometry import geometry_from_config
from subspec_cli.checkpoint.safetensors_header import TensorEntry, header_length, parse_entries
from subspec_cli.checkpoint.tensor_reader import read_hashed_file, view_tensor
from subspec_cli.errors import IntegrityError, SubspecError, UnsupportedModelError, UsageError
from subspec_cli.files.home import prepared_root
from subspec_cli.hub.command_hints import prepare_command, repair_command
from subspec_cli.hub.model_name import parse_model_name
from subspec_cli.substitutes.manifest import MANIFEST_NAME, LayerFile, Manifest, file_path, read_manifest
from subspec_cli.substitutes.prepared_names import full_name, last_used_id, manifests_by_recency, near_name
from subspec_cli.substitutes.settings import SubstituteSettings
from subspec_cli.substitutes.source_stamp import has_same_times, is_of_source, is_same_content
from subspec_cli.units import counted, printable

if TYPE_CHECKING:
    import torch

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A complete set of substitutes on disk."""

    directory: Path
    manifest: Manifest


def prepared_directory(model_id: str, commit: str, settings: SubstituteSettings) -> Path:
    """The directory of these substitutes of this commit. Its name is safe on every file system."""
    digest = hashlib.sha256(f"{model_id}\0{commit}\0{settings.label}".encode()).hexdigest()[:12]
    return (
        prepared_root()
        / f"{directory_slug(model_id)}--{_safe_name(commit)[:8]}--{_safe_name(settings.label)}--{digest}"
    )


def find_prepared(model: str | None, bits: int | None = None) -> PreparedModel:
    """The most recently prepared set of substitutes of a model, with one width or any.

    Args:
        model: as the user names it: `demo`, a directory, a hub id, or the last name of a prepared model; None takes
            the model used last, or if none was ever used any.
        bits: width of the substitutes; None takes any width.

    Raises:
        UsageError: there is no such set; the hint is the command that prepares it.
        IntegrityError, UnsupportedModelError: the set that is meant has a damaged or newer manifest.
    """
    model_id = last_used_id(bits) if model is None else parse_model_name(full_name(model)).model_id
    other_labels = set()
    for path in manifests_by_recency():
        try:
            manifest = read_manifest(path)
        except SubspecError:
            # Damaged sets of other models are skipped. One of this model is an error: no older set replaces it.
            if model_id is None or path.parent.name.startswith(f"{directory_slug(model_id)}--"):
                raise
            continue
        if model_id not in (None, manifest.model_id):
            continue
        if bits in (None, manifest.settings.bits):
            return PreparedModel(path.parent, manifest)
        other_labels.add(manifest.settings.label)
    raise _not_prepared(model_id, bits, sorted(other_labels))


def find_prepared_sets(model: str | None, bits: int | None = None) -> tuple[PreparedModel, ...]:
    """The set of `find_prepared`, and after it the latest set of every other width for the same weights.

    With `bits` there is only the first. Damaged sets among the others are skipped. Errors as `find_prepared`.
    """
    latest = find_prepared(model, bits)
    if bits is not None:
        return (latest,)
    sets = {latest.manifest.settings.bits: latest}
    for path in manifests_by_recency():
        with contextlib.suppress(SubspecError):
            manifest = read_manifest(path)
            if _is_same_source(manifest, latest.manifest):
                sets.setdefault(manifest.settings.bits, PreparedModel(path.parent, manifest))
    return tuple(sets.values())


def _is_same_source(manifest: Manifest, other: Manifest) -> bool:
    return (manifest.model_id, manifest.commit, manifest.fingerprint) == (
        other.model_id,
        other.commit,
        other.fingerprint,
    ) and is_same_content(manifest.source_stamp, other.source_stamp)


def load_layer(prepared: PreparedModel, layer: int) -> dict[str, torch.Tensor]:
    """The substitute tensors of a decoder layer. The whole file is read once and hashed before use.

    Raises:
        IntegrityError: the file is missing, is a link out of its directory, or has another size or hash than
            the manifest says.
        ResourceError: the file cannot be read.
    """
    expected = _layer_file(prepared, layer)
    hint = repair_command(prepared.manifest.model_id)
    try:
        path = file_path(prepared.directory, expected.name)
        data, found_sha256 = read_hashed_file(path, expected.size_bytes)
        if found_sha256 != expected.sha256:
            raise IntegrityError(
                f"{printable(str(path))} has the SHA-256 {found_sha256}, expected {expected.sha256}"
            )
        entries = _parse_substitute_entries(data, path)
    except IntegrityError as error:
        raise IntegrityError(error.message, hint) from error
    return {
        entry.name: view_tensor(data[entry.offset_bytes : entry.offset_bytes + entry.size_bytes], entry)
        for entry in entries
    }


def check_pairing(prepared: PreparedModel, checkpoint: Checkpoint) -> None:
    """Check that substitutes and 16-bit weights belong together, as far as `source_stamp` can tell unread weights.

    Raises:
        UnsupportedModelError: the weights are of another version than the substitutes.
        IntegrityError: the manifest does not cover every layer.
    """
    manifest = prepared.manifest
    shown = printable(manifest.model_id)
    again = prepare_command(manifest.model_id, bits=manifest.settings.bits)
    if manifest.fingerprint != checkpoint.fingerprint:
        raise UnsupportedModelError(
            f"{shown} is another version than the one prepared: fingerprint {checkpoint.fingerprint}, "
            f"prepared from {manifest.fingerprint} (commit {printable(manifest.commit)})",
            again,
        )
    if not is_of_source(manifest.source_stamp, checkpoint):
        if has_same_times(manifest.source_stamp, checkpoint):
            what = "other weights are in place of those that were prepared, with the same sizes and times"
        else:
            what = (
                "the weight files were copied or written again since it was prepared (other sizes or times)"
            )
        raise UnsupportedModelError(
            f"{shown}: {what}", f"compare the bytes, and make only the layers that differ: {again}"
        )
    layer_count = geometry_from_config(checkpoint.config, manifest.dtype).layers
    if [file.layer for file in manifest.layers] != list(range(layer_count)):
        raise IntegrityError(
            f"{printable(str(prepared.directory / MANIFEST_NAME))} lists "
            f"{counted(len(manifest.layers), 'layer')}, the model has {layer_count}",
            repair_command(manifest.model_id),
        )


def _parse_substitute_entries(data: torch.Tensor, path: Path) -> tuple[TensorEntry, ...]:
    start = data[:512].numpy().tobytes()
    length = header_length(start, path, data.numel())
    return parse_entries(data[: 8 + length].numpy().tobytes(), path, data.numel())


def _layer_file(prepared: PreparedModel, layer: int) -> LayerFile:
    for file in prepared.manifest.layers:
        if file.layer == layer:
            return file
    raise IntegrityError(
        f"{printable(str(prepared.directory / MANIFEST_NAME))} lists no layer {layer}",
        repair_command(prepared.manifest.model_id),
    )


def _not_prepared(model_id: str | None, bits: int | None, other_labels: list[str]) -> UsageError:
    if model_id is None:
        width = f" with {bits}-bit substitutes" if bits else ""
        commands = [prepare_command(name, bits=bits) for name in ("demo", "Qwen/Qwen2.5-7B-Instruct")]
        return UsageError(
            f"no model is prepared{width} yet", f"{commands[0]} (shipped), or another: {commands[1]}"
        )
    shown = printable(model_id)
    if other_labels:
        text = f"{shown} is prepared with {', '.join(other_labels)}, not with {bits} bits"
        return UsageError(text, prepare_command(model_id, bits=bits))
    command, near = prepare_command(model_id, bits=bits), near_name(model_id)
    hint = f"did you mean --model {shlex.quote(printable(near))}? if not: {command}" if near else command
    return UsageError(f"{shown} is not prepared", hint)


def directory_slug(model_id: str) -> str:
    """The part before `--` in the names of a model's directories. Other models may share it."""
    return _safe_name(model_id.strip("/").replace("/", "--"))[-80:].lstrip(".-")


def _safe_name(text: str) -> str:
    return _UNSAFE.sub("_", text)
