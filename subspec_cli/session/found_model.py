"""The requested model, found and checked without any heavy library."""

from __future__ import annotations

from dataclasses import dataclass, replace

from subspec_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.repository import Repository, read_repository
from subspec_cli.config import Config
from subspec_cli.errors import IntegrityError, SubspecError, UsageError
from subspec_cli.hub.command_hints import prepare_command
from subspec_cli.hub.model_name import check_revision, name_of_id
from subspec_cli.hub.source_model import find_source_directory
from subspec_cli.substitutes.manifest import Manifest
from subspec_cli.substitutes.prepared_model import PreparedModel, check_pairing, find_prepared_sets
from subspec_cli.units import printable


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A prepared model with its 16-bit checkpoint, found and checked."""

    prepared: PreparedModel
    checkpoint: Checkpoint
    """Its tensors are those that the model needs."""
    repository: Repository
    others: tuple[PreparedModel, ...] = ()
    """Substitutes of other widths for the same weights. The plan may take them if the user named no width."""

    @property
    def geometry(self) -> ModelGeometry:
        """Sizes of the model."""
        return self.repository.geometry


def find_model(config: Config) -> FoundModel:
    """Return the prepared model of the settings, or the one used last.

    Raises UsageError if it is not prepared, UnsupportedModelError or IntegrityError if files do not match.
    """
    prepared, *others = find_prepared_sets(config.model.model, config.model.bits)
    manifest = prepared.manifest
    _check_prepared_revision(manifest, config.model.revision)
    checkpoint = open_checkpoint(find_source_directory(manifest.model_id, manifest.commit))
    check_pairing(prepared, checkpoint)
    repository = read_repository(checkpoint)
    checkpoint = replace(checkpoint, tensors=repository.tensors)
    return FoundModel(
        prepared, checkpoint, repository, tuple(item for item in others if _fits(item, checkpoint))
    )


def _fits(prepared: PreparedModel, checkpoint: Checkpoint) -> bool:
    """Whether a set that the user did not name may be used."""
    try:
        check_pairing(prepared, checkpoint)
    except SubspecError:
        return False
    return True


def _check_prepared_revision(manifest: Manifest, revision: str | None) -> None:
    """Refuse a revision other than the prepared one; a branch or tag means its last commit in the hub's cache."""
    check_revision(name_of_id(manifest.model_id), revision)
    if revision is None or revision == manifest.commit:
        return
    try:
        commit = find_source_directory(manifest.model_id, revision).name
    except IntegrityError:
        commit = "not in the cache"
    if commit != manifest.commit:
        raise UsageError(
            f"{printable(manifest.model_id)} is prepared at commit {printable(manifest.commit)}, "
            f"not at {revision} ({commit})",
            prepare_command(manifest.model_id, revision=revision, bits=manifest.settings.bits),
        )
