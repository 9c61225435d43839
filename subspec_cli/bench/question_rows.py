"""Rows of a question file, as untrusted as any download: JSON lines or parquet, of bounded size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from subspec_cli.errors import IntegrityError, UsageError
from subspec_cli.files.regular_file import open_regular, read_small_file
from subspec_cli.units import format_bytes, printable

_MOST_BYTES: Final = 64 << 20
_MOST_UNPACKED_BYTES: Final = 512 << 20
"""Largest size of a row group, as its file says it: parquet may be packed a thousand times."""
_MOST_LETTERS: Final = 1 << 20
"""Longest text of one column."""
_BATCH_ROWS: Final = 256
_PARQUET: Final = b"PAR1"


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each row is, and the row, of a file of JSON lines.

    Raises UsageError if the file cannot be read, or a line is no JSON object.
    """
    name = printable(str(path))
    try:
        lines = read_small_file(path, _MOST_BYTES).decode("utf-8").splitlines()
    except IntegrityError as error:
        raise UsageError(f"questions: {error.message}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 at byte {error.start}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{name}, line {number}: {printable(str(error))[:200]}") from error
        if not isinstance(row, dict):
            raise UsageError(f"{name}, line {number}: not a JSON object")
        yield f"{name}, line {number}", row


def is_parquet(path: Path) -> bool:
    """Whether a file begins as a parquet file does. Raises UsageError if it cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(len(_PARQUET)) == _PARQUET
    except IntegrityError as error:
        raise UsageError(f"questions: {error.message}") from error


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each row is, and the named columns of the row, of a parquet file.

    Raises UsageError if pyarrow is missing, the file is too large or damaged, or a column is missing or no text.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(
            "this question set is a parquet file, which pyarrow reads", "pip install 'subspec-cli[suites]'"
        ) from error
    name = printable(str(path))
    if path.stat().st_size > _MOST_BYTES:
        raise UsageError(
            f"{name} has {path.stat().st_size} bytes; at most {format_bytes(_MOST_BYTES)} are read"
        )
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(name, file.schema_arrow, columns)
            _check_sizes(name, file.metadata)
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns), use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}, row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UsageError(f"{name}, after row {number}: {printable(str(error))[:200]}") from error


def text_of(row: Mapping[str, Any], column: str, where: str, *, may_be_empty: bool = False) -> str:
    """Return the text of a column. Raises UsageError, with row and column, if it is none to ask a model."""
    value = row.get(column)
    if not isinstance(value, str):
        found = "missing" if value is None else f"not text but {type(value).__name__}"
        raise UsageError(f"{where}: column {column!r} is {found}")
    if not may_be_empty and not value.strip():
        raise UsageError(f"{where}: column {column!r} is empty")
    if len(value) > _MOST_LETTERS:
        raise UsageError(
            f"{where}: column {column!r} has {len(value)} letters; at most {_MOST_LETTERS} are read"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: column {column!r} is not Unicode at letter {error.start}") from error
    return value


def _check_columns(name: str, schema: Any, columns: Sequence[str]) -> None:  # noqa: ANN401 - pyarrow's
    from pyarrow import types

    for column in columns:
        index = schema.get_field_index(column)  # -1 also for a name that is there twice
        if index < 0:
            there = printable(", ".join(schema.names))[:200]
            raise UsageError(f"{name} has no column {column!r}; it has {there}")
        kind = schema.field(index).type
        if not (types.is_string(kind) or types.is_large_string(kind)):
            raise UsageError(f"{name}: column {column!r} is not text but {printable(str(kind))[:80]}")


def _check_sizes(name: str, metadata: Any) -> None:  # noqa: ANN401 - pyarrow's
    for group in range(metadata.num_row_groups):
        if (size := metadata.row_group(group).total_byte_size) > _MOST_UNPACKED_BYTES:
            limit = format_bytes(_MOST_UNPACKED_BYTES)
            raise UsageError(f"{name}: row group {group} unpacks to {size} bytes; at most {limit} are read")
