"""What the MODEL argument of a command means: the demo, a local directory or a model on the hub."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from subspec_cli.checkpoint.source_directory import CONFIG_NAME
from subspec_cli.errors import SubspecError, UsageError
from subspec_cli.files.regular_file import read_small_file
from subspec_cli.hub.command_hints import prepare_command
from subspec_cli.units import printable

DEMO = "demo"
DEMO_DIRECTORY = Path(__file__).parent.parent / "demo"
_CACHE_PREFIX = "models--"
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

    A model's folder in a hub cache, here or copied from elsewhere, means its snapshot of `main`.

    Raises:
        UsageError: no such directory, no snapshot that is meant, or neither a path nor a hub id.
    """
    shown = printable(model)
    if model == DEMO:
        return ModelName(DEMO, DEMO_DIRECTORY)
    path = os.path.expanduser(model)
    if os.path.isdir(path):
        directory = _snapshot_of(Path(os.path.realpath(path)))
        return ModelName(str(directory), directory)
    if model.lower().endswith(".gguf") and not os.path.isdir(path):
        raise UsageError(
            f"{shown}: GGUF files are not read",
            "give the 16-bit original: its directory, or its name on the hub",
        )
    if os.path.isfile(path):
        raise UsageError(f"{shown} is a file", "give the directory that holds config.json and the weights")
    if os.path.lexists(path):  # a name on the hub could be meant only by who does not see it
        what = "a link that leads nowhere" if os.path.islink(path) else "neither a directory nor a file"
        raise UsageError(
            f"{shown} is {what}", "give the directory that holds config.json and the weights, or rename it"
        )
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


def _snapshot_of(directory: Path) -> Path:
    """The snapshot that is meant by `models--org--name` or its `snapshots`; any other directory is itself."""
    repo = directory.parent if directory.name == "snapshots" else directory
    root = repo / "snapshots"
    if not repo.name.startswith(_CACHE_PREFIX) or not root.is_dir() or (directory / CONFIG_NAME).exists():
        return directory
    found = sorted(path for path in root.glob("*") if os.path.exists(path / CONFIG_NAME))
    with contextlib.suppress(SubspecError):
        commit = read_small_file(repo / "refs" / "main", 200).decode("ascii", "replace").strip()
        found = [path for path in found if path.name == commit] or found
    if len(found) == 1:
        return found[0]
    shown = printable(str(directory))
    if not found:
        model_id = repo.name.removeprefix(_CACHE_PREFIX).replace("--", "/", 1)
        raise UsageError(
            f"{shown} is a folder of the hub's cache, and none of its snapshots has a {CONFIG_NAME}",
            f"fetch the model: {prepare_command(model_id)}",
        )
    raise UsageError(
        f"{shown} is a folder of the hub's cache with {len(found)} snapshots, and none of them is its main one",
        f"give a snapshot: {' or '.join(shlex.quote(printable(str(path))) for path in found[:4])}",
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
