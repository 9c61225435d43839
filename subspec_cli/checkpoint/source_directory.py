"""A model's directory before its weights are read: which files belong to it, and what makes it unusable."""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from subspec_cli.checkpoint.configured_model import unread_tensors
from subspec_cli.checkpoint.tokenizer_files import TOKENIZER_CHOICES
from subspec_cli.errors import IntegrityError, UnsupportedModelError, UsageError
from subspec_cli.files.io_errors import read_error
from subspec_cli.files.json_object import parse_json_object
from subspec_cli.files.regular_file import read_small_file, refuse_special
from subspec_cli.units import printable

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

MAX_CONFIG_BYTES = 8 << 20
MAX_INDEX_BYTES = 64 << 20
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_SHARD_NAME = re.compile(r"model-\d+-of-\d+\.safetensors")
_SMALL_FILES = (
    CONFIG_NAME,
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True, slots=True)
class WeightIndex:
    """Content of model.safetensors.index.json."""

    raw: bytes
    file_of: Mapping[str, str]
    """Tensor name to file name."""

    @property
    def file_names(self) -> tuple[str, ...]:
        """The weight files, each once, sorted."""
        return tuple(sorted(set(self.file_of.values())))


def confine(directory: Path, name: str) -> Path:
    """Path of the file `name` of a model in `directory`. The file need not exist; what exists is a regular file.

    A name comes from the model's own files, so it stays inside the directory. A link in a user's directory may lead
    to any file here: `check_links` has asked the user. A snapshot in the hub's cache comes from elsewhere: its links
    lead to the cache's own `blobs`, or stay in the snapshot.

    Raises:
        IntegrityError: the name or a snapshot's link leads out of the directory, a link leads to itself or to
            nothing, or a directory, a pipe or a device is in the file's place.
        ResourceError: the place cannot be read.
    """
    if not is_inner_path(name):
        raise IntegrityError(
            f"{ascii(name)[:200]} is outside the model directory {printable(str(directory))}",
            "the model is damaged or hostile: get it from another source",
        )
    path = directory / name
    root, target = Path(os.path.realpath(directory)), Path(os.path.realpath(path))
    is_snapshot = _is_snapshot(root)
    shown = f"{printable(name)} in {printable(str(directory))} is a link"
    if is_snapshot and not target.is_relative_to(root) and not _leads_to_blob(root, name):
        copy = f"cp -rL {shlex.quote(printable(str(root)))} DIRECTORY"
        raise IntegrityError(
            f"{shown} to {printable(str(target))}, outside the hub's cache of this model",
            f"copy the files behind the links, and give the copy: {copy}",
        )
    try:
        refuse_special(path, path.stat().st_mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise IntegrityError(f"{shown} that leads to itself", "replace the link by the file") from error
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise read_error(error, path) from error
        if path.is_symlink() and not is_snapshot:  # what the cache lacks is fetched again
            raise IntegrityError(
                f"{shown} to {printable(str(target))}, which is not there",
                "put the file there, or remove the link",
            ) from error
    return path


def check_links(directory: Path, weight_files: Iterable[str]) -> None:
    """Refuse links of a user's directory to files outside of it. Snapshots of the hub's cache have their own rule.

    Raises UsageError, which names the flag that follows them.
    """
    root = Path(os.path.realpath(directory))
    if _is_snapshot(root):
        return
    small = (name for name in os.listdir(directory) if is_small_file(name) or name == INDEX_NAME)
    for name in sorted({*small, *weight_files}):
        target = Path(os.path.realpath(directory / name))
        if not target.is_relative_to(root):
            raise UsageError(
                f"{printable(name)} in {printable(str(directory))} is a link to {printable(str(target))}, "
                "outside the directory",
                "--follow-links reads what such links lead to",
            )


def _is_snapshot(root: Path) -> bool:
    return root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--")


def _leads_to_blob(root: Path, name: str) -> bool:
    """Whether a file of a snapshot is a link into `blobs`. A blob may itself be on another disk."""
    place = Path(os.path.realpath((root / name).parent))
    if not place.is_relative_to(root) or not (root / name).is_symlink():
        return False
    blob = place / os.readlink(root / name)
    return os.path.realpath(blob.parent) == os.path.realpath(root.parent.parent / "blobs")


def check_small_files(directory: Path) -> None:
    """Check that all that a library reads beside the weights are regular files. Errors as `confine`."""
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise read_error(error, directory) from error
    for name in names:
        if is_small_file(name):
            confine(directory, name)


def is_small_file(name: str) -> bool:
    """Whether a name is that of a file that a model needs besides the weights and their index."""
    return any(fnmatchcase(name, like) for like in _SMALL_FILES)


def is_inner_path(name: str) -> bool:
    """Whether a name from untrusted data is a relative path that stays inside its directory."""
    if not name or "\0" in name or "\\" in name or _DRIVE.match(name):
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))


def read_config(directory: Path) -> tuple[bytes, dict[str, Any]]:
    """Bytes and content of config.json, checked by `check_config`.

    Raises:
        UnsupportedModelError: missing, too large, not a JSON object, or refused by `check_config`.
        IntegrityError: a link out of the directory, or not a regular file.
    """
    path = confine(directory, CONFIG_NAME)
    shown = printable(str(directory / CONFIG_NAME))
    if not path.exists():
        raise no_config_error((entry.name for entry in directory.iterdir()), printable(str(directory)))
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UnsupportedModelError(
            f"{shown} has {path.stat().st_size} bytes, at most {MAX_CONFIG_BYTES} are read"
        )
    raw = read_small_file(path, MAX_CONFIG_BYTES)
    return raw, parse_config(raw, shown)


def parse_config(raw: bytes, shown: str) -> dict[str, Any]:
    """Content of config.json, checked by `check_config`. Raises UnsupportedModelError."""
    config = parse_json_object(raw, shown, UnsupportedModelError)
    check_config(config)
    return config


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse what no family can run, judged by config.json alone.

    Raises:
        UnsupportedModelError: remote code.
    """
    if config.get("auto_map"):
        raise UnsupportedModelError(
            "the model needs remote code, which is not run (auto_map in config.json)",
            "if its model_type is a supported one, remove auto_map from config.json",
        )


def read_index(directory: Path) -> WeightIndex | None:
    """The index of a model in several files, of the tensors that text needs; None if there is no index.

    Raises:
        IntegrityError: too large, not JSON, or naming a file outside the directory.
        ResourceError: unreadable.
    """
    path = confine(directory, INDEX_NAME)
    if not path.exists():
        return None
    shown = printable(str(directory / INDEX_NAME))
    return parse_index(read_small_file(path, MAX_INDEX_BYTES), shown, read_config(directory)[1])


def parse_index(raw: bytes, shown: str, config: Mapping[str, Any]) -> WeightIndex:
    """Parse an index, and leave out what text does not need. Raises IntegrityError as `read_index`."""
    file_of = parse_json_object(raw, shown, IntegrityError, "download the file again").get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise IntegrityError(f"{shown} has no weight_map", "download the file again")
    for tensor, name in file_of.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or not is_inner_path(name):
            raise IntegrityError(
                f"{shown} puts {ascii(tensor)[:100]} into {ascii(name)[:200]}, "
                "which is no safetensors file inside the model directory"
            )
    unread = unread_tensors(config)
    return WeightIndex(raw, {name: file for name, file in file_of.items() if not name.startswith(unread)})


def first_missing_file(directory: Path) -> str | None:
    """Name of the first file that a model in `directory` lacks; None if it is complete.

    Raises:
        IntegrityError: as `confine` and `read_index`.
    """
    if not confine(directory, CONFIG_NAME).exists():
        return CONFIG_NAME
    if not has_tokenizer(directory):
        return "tokenizer.json"
    if confine(directory, SINGLE_NAME).exists():
        return None
    index = read_index(directory)
    if index is None:
        return SINGLE_NAME
    return next((name for name in index.file_names if not confine(directory, name).exists()), None)


def has_tokenizer(directory: Path) -> bool:
    """Whether the directory holds a complete tokenizer. Raises IntegrityError as `confine`."""
    return any(all(confine(directory, name).exists() for name in names) for names in TOKENIZER_CHOICES)


def read_if_present(directory: Path, name: str, most_bytes: int) -> bytes | None:
    """Content of a small file of a model; None if there is none.

    Raises:
        IntegrityError: as `confine` and `read_small_file`.
        ResourceError: unreadable.
    """
    path = confine(directory, name)
    return read_small_file(path, most_bytes) if path.exists() else None


def no_config_error(names: Iterable[str], where: str) -> UnsupportedModelError:
    """The error for a place without config.json; `names` are its files."""
    present = set(names)
    if "adapter_config.json" in present:
        return UnsupportedModelError(
            f"{where} holds an adapter alone, not a model",
            "merge it into its base model (peft: merge_and_unload, then save_pretrained) and give the result",
        )
    return UnsupportedModelError(f"no {CONFIG_NAME} in {where}: it holds no model", _other_form(present))


def no_weights_error(names: Iterable[str], where: str) -> UnsupportedModelError:
    """The error for a model without usable safetensors; `names` are its files, `where` the place that holds them."""
    present = sorted(names)
    pickles = [name for name in present if os.path.basename(name).endswith(_PICKLE_SUFFIXES)]
    shards = [name for name in present if _SHARD_NAME.fullmatch(name)]
    if shards:
        way_out = f"fetch {INDEX_NAME} too"
        if len(shards) == 1 and shards[0].endswith("-00001-of-00001.safetensors"):
            way_out = f"it is the whole model: rename {shards[0]} to {SINGLE_NAME}"
        return UnsupportedModelError(
            f"{where} has {printable(', '.join(shards[:4]))}, but neither {SINGLE_NAME} nor {INDEX_NAME}",
            way_out,
        )
    if pickles:
        more = f" and {len(pickles) - 4} more" if len(pickles) > 4 else ""
        shown = printable(", ".join(pickles[:4])) + more
        return UnsupportedModelError(
            f"{where} has only pickle weights ({shown}); subspec reads safetensors",
            "look for a revision or a copy of the model with .safetensors files",
        )
    return UnsupportedModelError(
        f"{where} has neither {SINGLE_NAME} nor {INDEX_NAME}; subspec reads safetensors",
        _other_form(set(present)),
    )


def _other_form(names: set[str]) -> str:
    """Hint that names the form in which the model is there, if it is a known one."""
    if any(name.startswith("consolidated") for name in names):
        return "consolidated files are the vendor's own format: take a copy in the Hugging Face layout"
    if any(name.endswith(".gguf") for name in names):
        return "GGUF files are not read: take the 16-bit original in the Hugging Face layout"
    if any(name.startswith("adapter_model") for name in names):
        return "it is an adapter: merge it into its base model and give the result"
    return "give the directory that holds config.json, the tokenizer and the .safetensors files of one model"


def tokenizer_bytes_in(directory: Path) -> int:
    """Size of the tokenizer's files in a model's directory."""
    return sum(path.stat().st_size for path in directory.glob("tokenizer*") if path.is_file())
