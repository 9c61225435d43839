"""The record of a benchmark: when, where and how it was made, and reading such a file again."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from subspec_cli.bench.suites import Question
from subspec_cli.errors import IntegrityError, UsageError
from subspec_cli.files.json_object import parse_json_object
from subspec_cli.files.regular_file import read_small_file
from subspec_cli.streaming.processors import gpu_models, processor_model, usable_processors
from subspec_cli.units import counted, printable
from subspec_cli.versions import __version__, library_versions

_KIND: Final = "subspec bench"
_MOST_BYTES: Final = 256 << 20


def made_here() -> dict[str, Any]:
    """Return date, machine and command line, as plain values for JSON."""
    processors = usable_processors()
    return {
        "kind": _KIND,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "host": platform.node(),
        "cpu": processor_model()[0],
        "cores": processors.cores,
        "physical_cores": processors.physical_cores,
        "processor_quota": processors.quota,
        "gpus": gpu_models(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "command": command_line(),
    }


def command_line() -> str:
    """Return the command that this process runs, as it is typed in a shell."""
    return shlex.join(["subspec", *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Return the versions of this package and of the libraries that results depend on."""
    return {"subspec": __version__, **library_versions()}


def fingerprint(questions: Sequence[Question]) -> str:
    """Return a digest of the questions in their order."""
    asked = [[item.question_id, item.category, *item.turns] for item in questions]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """Return the document of an earlier benchmark.

    Raises UsageError if the file cannot be read or holds something else.
    """
    name = printable(str(path))
    try:
        document = parse_json_object(read_small_file(path, _MOST_BYTES), name, UsageError)
    except IntegrityError as error:
        raise UsageError(error.message, error.hint) from error
    record = document.get("record")
    if not isinstance(record, dict) or record.get("kind") != _KIND:
        raise UsageError(
            f"{name} is no record of a benchmark", "subspec bench SUITE --output FILE writes one"
        )
    return document


def check_target(path: Path, *, force: bool) -> None:
    """Refuse to overwrite a file unless it is the complete record of the same command, or `force` is given.

    Raises UsageError.
    """
    name = printable(str(path))
    if not path.parent.is_dir() or path.is_dir():
        raise UsageError(f"--output {name} cannot be written", "name a file in a directory that exists")
    if force or not path.exists():
        return
    try:
        document = read_record(path)
    except UsageError:
        document = {"record": {}}
    if document["record"].get("command") != command_line():
        raise UsageError(f"{name} exists and is not a record of the same command", "--force overwrites it")
    if document.get("interrupted"):
        raise UsageError(
            f"{name} holds {counted(len(document.get('answers', ())), 'answer')} of an interrupted run",
            f"--resume {name} goes on; --force begins anew",
        )
