"""When the text of a token is settled: what a tokenizer's decoder may still change once more tokens follow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Literal

Settling = Literal["at once", "whole characters", "byte runs", "at the end"]
"""- `at once`: each token has its own text.
- `whole characters`: tokens are bytes of UTF-8; only an unfinished last character can change.
- `byte runs`: a run of byte tokens that is not UTF-8 as a whole loses all its characters. So it settles with the next
  token of another kind, or with the byte that spoils it.
- `at the end`: nothing is known.
"""
_OF_ONE_TOKEN: Final = ("Replace", "Metaspace", "WordPiece")
"""Steps that change a token by itself, or by being the first."""
_PRINTED: Final = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTES: Final = {
    **{chr(byte): byte for byte in _PRINTED},
    **{chr(256 + number): byte for number, byte in enumerate(sorted(set(range(256)) - set(_PRINTED)))},
}
"""The bytes by the characters that stand for them where each token is written in bytes."""
_BYTE_TOKEN: Final = re.compile("<0x([0-9A-Fa-f+][0-9A-Fa-f])>")


def settling_of(decoder: Mapping[str, Any] | None) -> Settling:
    """Return how a decoder, as `tokenizer.json` describes it, settles; without one, tokens are joined by spaces."""
    steps = [] if decoder is None else _steps(decoder)
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return "whole characters"
    kinds = [step["type"] for step in steps]
    fused = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    of_tokens, of_text = steps[:fused], steps[fused + 1 :]
    if not all(_keeps_to_characters(step) for step in of_text):
        return "at the end"
    if "ByteFallback" in kinds[:fused]:
        bytes_at = kinds.index("ByteFallback")
        before, after = of_tokens[:bytes_at], of_tokens[bytes_at + 1 :]
        keeps = all(_keeps_byte_tokens(step) for step in before) and all(map(_keeps_to_tokens, after))
        return "byte runs" if keeps else "at the end"
    return "at once" if all(map(_keeps_to_tokens, of_tokens)) else "at the end"


def _steps(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _steps(inner)]


def _keeps_to_tokens(step: Mapping[str, Any]) -> bool:
    """Whether a step over tokens changes none for what comes later."""
    return step["type"] in _OF_ONE_TOKEN or (step["type"] == "Strip" and step["stop"] == 0)


def _keeps_to_characters(step: Mapping[str, Any]) -> bool:
    """Whether a step over the whole text changes no character for what comes later."""
    if step["type"] == "Replace":
        return len(step["pattern"].get("String", "")) == 1
    return step["type"] == "Strip" and bool(step["stop"] == 0)


def _keeps_byte_tokens(step: Mapping[str, Any]) -> bool:
    """Whether a step before the byte tokens are read makes and breaks none of them."""
    pattern: str = step["pattern"].get("String", "") if step["type"] == "Replace" else ""
    return bool(pattern) and not pattern.isascii() and step["content"] == " "


def byte_of_token(token: str) -> int | None:
    """Return the byte of a byte token, such as `<0xE4>`; None for any other token."""
    found = _BYTE_TOKEN.fullmatch(token)
    return int(found[1], 16) if found else None


def bytes_of_piece(piece: str) -> bytes:
    """Return the bytes that a token stands for where each of its characters is a byte, else those of its text."""
    try:
        return bytes(map(_BYTES.__getitem__, piece))
    except KeyError:
        return piece.encode()
