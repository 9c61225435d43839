"""Strict parsing of JSON objects from untrusted bytes: UTF-8, no duplicate keys, bounded, errors with an offset."""

from __future__ import annotations

import json
from typing import Any

from subspec_cli.errors import SubspecError

# Bound the memory that a hostile 25 MB text can take: an empty list costs 3 bytes of text and 64 of memory.
_MAX_CONTAINERS = 1_000_000
_MAX_COMMAS = 3_000_000


def parse_json_object(
    data: bytes, what: str, error_type: type[SubspecError], hint: str = ""
) -> dict[str, Any]:
    """Parse the JSON object in `data`, whose length the caller bounds.

    Args:
        what: the file, as the error names it.
        error_type: class of the error to raise.
        hint: the error's hint.

    Raises:
        SubspecError: of class `error_type`, if `data` is no such object; with the byte offset if it is known.
    """
    if data.count(b"[") + data.count(b"{") > _MAX_CONTAINERS or data.count(b",") > _MAX_COMMAS:
        raise error_type(f"{what} has too many values for a JSON text of {len(data)} bytes", hint)
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except _DuplicateKeyError as error:
        raise error_type(f"{what} has the key {error.key} twice", hint) from error
    except UnicodeDecodeError as error:
        raise error_type(f"{what} is not UTF-8 at byte {error.start}", hint) from error
    except json.JSONDecodeError as error:
        offset = len(text[: error.pos].encode("utf-8", "surrogatepass"))
        raise error_type(f"{what} is not JSON at byte {offset}: {error.msg}", hint) from error
    except RecursionError as error:
        raise error_type(f"{what} is nested too deeply", hint) from error
    except ValueError as error:  # a number with more digits than Python converts
        raise error_type(f"{what} holds a number that is too long", hint) from error
    if not isinstance(value, dict):
        raise error_type(f"{what} holds a {type(value).__name__}, expected a JSON object", hint)
    return value


class _DuplicateKeyError(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = ascii(key[:80])


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return found
