"""Requests as JSON: UTF-8, no key twice, and text that is whole characters."""

from __future__ import annotations

import json
from typing import Any

from subspec_cli.errors import UsageError
from subspec_cli.files.json_object import parse_json_object


def parse_request(data: bytes, what: str) -> dict[str, Any]:
    """Parse the JSON object of a request, whose length the caller bounds.

    Raises UsageError, which names it `what`.
    """
    values = parse_json_object(data.removeprefix(b"\xef\xbb\xbf"), what, UsageError)
    check_characters(values, what)
    return values


def check_characters(values: dict[str, Any], what: str) -> None:
    """Refuse halves of characters: JSON can write them, and no tokenizer reads them. Raises UsageError."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise UsageError(f"{what} holds \\u{half:04x} alone, which is half of a character") from error
    except RecursionError as error:
        raise UsageError(f"{what} is nested too deeply") from error
