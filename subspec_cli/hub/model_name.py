"""What the MODEL argument of a command means: the demo, a local directory or a model on the hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from subspec_cli.errors import UsageError
from subspec_cli.units import printable

DEMO = "demo"
DEMO_DIRECTORY = Path(__file__).parent.parent / "demo"
_HUB_ID = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model as the user named it, in canonical form."""

    model_id: str
    """`demo`, the resolved path of a directory, or the hub's id."""
    directory: Path | None
    """Its directory; None for a model on the hub."""


def parse_model_name(model: str) -> ModelName:
    """Parse the demo's name, a directory or a hub id. A directory that exists wins over a hub id.

    Raises:
        UsageError: no such directory, or neither a path nor a hub id.
    """
    shown = printable(model)
    if model == DEMO:
        return ModelName(DEMO, DEMO_DIRECTORY)
    path = os.path.expanduser(model)
    if os.path.isdir(path):
        directory = Path(os.path.realpath(path))
        return ModelName(str(directory), directory)
    if os.path.isfile(path):
        raise UsageError(f"{shown} is a file", "give the directory that holds config.json and the weights")
    if model.startswith(("/", "./", "../", "~")) or model in (".", ".."):
        raise UsageError(f"no such directory: {shown}")
    if not _is_hub_id(model):
        raise UsageError(
            f"{ascii(model)[:200]} is neither a directory nor the name of a model on the hub",
            "give a directory, or a name such as Qwen/Qwen2.5-7B-Instruct",
        )
    return ModelName(model, None)


def name_of_id(model_id: str) -> ModelName:
    """The model of a canonical id, as manifests hold it. A local directory with a hub id's name does not count.

    Raises:
        UsageError: the id names a directory that is gone, or is no id.
    """
    if model_id != DEMO and not os.path.isabs(model_id) and _is_hub_id(model_id):
        return ModelName(model_id, None)
    return parse_model_name(model_id)


def check_revision(name: ModelName, revision: str | None) -> None:
    """Refuse what cannot be a revision.

    Raises:
        UsageError: the model is not on the hub, or the text is no branch, tag or commit.
    """
    if revision is None:
        return
    if name.directory is not None:
        raise UsageError(
            f"{printable(name.model_id)} is a directory and has no revisions", "leave --revision out"
        )
    if len(revision) > 200 or ".." in revision or not _REVISION.fullmatch(revision):
        raise UsageError(
            f"{ascii(revision)[:200]} is no revision", "give a branch, a tag or a commit: --revision main"
        )


def _is_hub_id(model: str) -> bool:
    return bool(_HUB_ID.fullmatch(model)) and all(_is_hub_part(part) for part in model.split("/"))


def _is_hub_part(part: str) -> bool:
    # The hub's own rules beyond the allowed characters. They also keep `..` out of paths made from the name.
    return (
        part[0] not in ".-"
        and part[-1] not in ".-"
        and "--" not in part
        and ".." not in part
        and len(part) <= 96
    )
