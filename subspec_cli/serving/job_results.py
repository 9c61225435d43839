"""A batch job's output: a record a line, each on the disk when it is written, so that a kill loses no answer."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from subspec_cli.errors import BusyError, IntegrityError, ResourceError, UsageError
from subspec_cli.files.atomic_write import atomic_write, sync_directory
from subspec_cli.files.io_errors import read_error, write_error
from subspec_cli.files.json_object import parse_json_object
from subspec_cli.files.lock import try_lock
from subspec_cli.files.regular_file import read_small_file, refuse_special
from subspec_cli.serving.job import JobLine
from subspec_cli.units import printable

_FORMAT: Final = 2
_MOST_SIDECAR_BYTES: Final = 1 << 20


class JobResults:
    """The records of one job, those of earlier runs included. Use as a context manager.

    Beside the file `OUT` lie `OUT.job`, which says whose records they are, and `OUT.lock`, which keeps a second
    process out.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, fresh_seed: int) -> None:
        """`identity` is everything that decides the answers, as values of JSON.

        If its seed is None, it is that of the earlier run, or `fresh_seed` if there is none.

        Raises:
            UsageError: the file holds something else, or records of a job that differs; the error says in what.
            BusyError: another process works on it.
            IntegrityError: a record in the middle is damaged.
        """
        self._path = path
        self._lock = self._locked()
        try:
            self.identity = self._agreed(dict(identity), fresh_seed)
            self._ids, self._bad_lines = set[str](), set[int]()
            self._file = self._recovered()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
        os.close(self._lock)

    @property
    def done(self) -> int:
        """Records in the file."""
        return len(self._ids) + len(self._bad_lines)

    def has(self, line: JobLine) -> bool:
        """Whether the record of a line is there."""
        return line.number in self._bad_lines or (line.body is not None and line.custom_id in self._ids)

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a record; it is on the disk when this returns. Raises ResourceError."""
        data = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError as error:
            raise _write_error(error, self._path) from error
        self._note(record)

    def _note(self, record: Mapping[str, Any]) -> None:
        error = record.get("error")
        if isinstance(error, dict):
            self._bad_lines.add(int(error["line"]))
        else:
            self._ids.add(str(record["custom_id"]))

    def _locked(self) -> int:
        path = self._path.with_name(self._path.name + ".lock")
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise _write_error(error, path) from error
        try:
            holder = try_lock(handle, path)
        except BaseException:
            os.close(handle)
            raise
        if holder is not None:
            os.close(handle)
            raise BusyError(
                f"another process (pid {holder}) writes {printable(str(self._path))}", "wait until it is done"
            )
        return handle

    def _agreed(self, identity: dict[str, Any], fresh_seed: int) -> dict[str, Any]:
        """Return the job's identity after comparing it with the sidecar's, which is written if there is none."""
        name = printable(str(self._path))
        known = _begun_as(self._path)
        if known is None:
            if self._path.exists() and self._path.stat().st_size:
                raise UsageError(f"{name} exists and is not of a job", "name another file for the results")
            if identity["seed"] is None:
                identity["seed"] = fresh_seed
            atomic_write(
                _sidecar_of(self._path), json.dumps({"format": _FORMAT, **identity}, indent=1).encode()
            )
            return identity
        if identity["seed"] is None:
            identity["seed"] = known.get("seed")
        # As JSON has it: a tuple is a list there.
        wanted: dict[str, Any] = json.loads(json.dumps(identity))
        for key in sorted(known.keys() | wanted.keys()):
            if known.get(key) != wanted.get(key):
                shown = _shown(known.get(key))
                goes_on = f"--context {shown} goes on; or " if key == "context" else ""
                raise UsageError(
                    f"{name} was begun with another {key}: {shown}, now {_shown(wanted.get(key))}",
                    goes_on + _other_file_hint(self._path),
                )
        return wanted

    def _recovered(self) -> int:
        """Open the file behind its last whole record; a torn last line is cut."""
        # O_NONBLOCK: do not wait if the path has just become a pipe. Regular files ignore the flag.
        flags = (
            os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        )
        try:
            handle = os.open(self._path, flags, 0o666)
        except OSError as error:
            raise _write_error(error, self._path) from error
        try:
            refuse_special(self._path, os.fstat(handle).st_mode)
            os.ftruncate(handle, self._read(handle))
            os.fsync(handle)
            sync_directory(self._path.parent)
        except OSError as error:
            os.close(handle)
            raise read_error(error, self._path) from error
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _read(self, handle: int) -> int:
        """Read the records; return where the last whole one ends."""
        end = 0
        with os.fdopen(os.dup(handle), "rb") as file:
            for number, data in enumerate(file, start=1):
                if not data.endswith(b"\n"):
                    break
                what = f"line {number} of {printable(str(self._path))}"
                record = parse_json_object(
                    data, what, IntegrityError, "it is damaged: remove the file and its .job"
                )
                try:
                    self._note(record)
                except (KeyError, TypeError, ValueError) as error:
                    raise IntegrityError(f"{what} is no record of a job") from error
                end += len(data)
        return end


def begun_context(path: Path) -> int | None:
    """Return the context with which the results in a file were begun; None if there are none.

    Raises UsageError as `JobResults` does.
    """
    known = _begun_as(path)
    context = None if known is None else known.get("context")
    return context if isinstance(context, int) else None


def _begun_as(path: Path) -> dict[str, Any] | None:
    """Return the identity of the job whose results a file holds; None if there is none."""
    sidecar = _sidecar_of(path)
    if not sidecar.exists():
        return None
    hint = _other_file_hint(path)
    data = read_small_file(sidecar, _MOST_SIDECAR_BYTES)
    known = parse_json_object(data, printable(str(sidecar)), UsageError, hint)
    if known.pop("format", None) != _FORMAT:
        raise UsageError(f"{printable(str(path))} was begun by another version of subspec", hint)
    return known


def _sidecar_of(path: Path) -> Path:
    return path.with_name(path.name + ".job")


def _other_file_hint(path: Path) -> str:
    name, sidecar = printable(str(path)), printable(_sidecar_of(path).name)
    return f"name another file for the results, or remove {name} and {sidecar}"


def _write_error(error: OSError, path: Path) -> ResourceError:
    """The error for results that cannot be written. They lie where the user said, not where models do."""
    message = write_error(error, path).message
    return ResourceError(
        message, "free space there and run the same command again, or name another OUT.jsonl"
    )


def _shown(value: object) -> str:
    text = json.dumps(value)
    return printable(text if len(text) <= 60 else text[:57] + "…")
