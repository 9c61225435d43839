"""The tokenizer of a repository by its files alone: what kind it is, and whether its ids fit the model's tables.

The `tokenizers` package parses a tokenizer.json as the library does. transformers itself is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from subspec_cli.errors import IntegrityError, UnsupportedModelError
from subspec_cli.files.json_object import parse_json_object
from subspec_cli.units import MIB, printable

TOKENIZER_CHOICES: Final = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
"""Each of these sets of files is a complete tokenizer."""
TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""The files that decide about ids. Others, such as chat templates, do not."""
MAX_SMALL_FILE_BYTES: Final = 256 * MIB
ReadFile = Callable[[str, int], bytes | None]
"""Content of a repository's small file by its name, of at most so many bytes; None if there is no such file."""


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What a model says of its tokenizer."""

    model_type: str
    """The family, by which the library chooses a class."""
    class_name: str
    """The class that config.json names; empty if it names none."""
    rows: int
    """Rows of the embedding and the head."""


def check_tokenizer(read: ReadFile, where: str, rows: int) -> None:
    """Check that there is a tokenizer whose files can be parsed, and that each id in them has a row in the tables.

    A special token that no file gives an id gets one beyond the vocabulary when the library loads the tokenizer. That
    is no fault: a prompt that holds it is refused.

    Args:
        read: gives the files.
        where: the repository, as errors name it.
        rows: rows of the embedding and the head.

    Raises:
        UnsupportedModelError: no tokenizer that can be read here, or ids beyond the tables.
        IntegrityError: a damaged file.
    """
    ids = _vocabulary(read, where)
    settings = _json(read, where, "tokenizer_config.json")
    ids |= {
        text: number for text, number in _json(read, where, "added_tokens.json").items() if _is_id(number)
    }
    listed = settings.get("added_tokens_decoder")
    for number, token in (listed if isinstance(listed, dict) else {}).items():
        if number.isdecimal():
            ids[_content(token) or number] = int(number)
    longest = settings.get("model_max_length")
    if longest is not None and not isinstance(longest, int | float):
        raise UnsupportedModelError(
            f"model_max_length in tokenizer_config.json of {where} is {ascii(longest)[:60]}, not a number",
            "correct the file",
        )
    _json(read, where, "special_tokens_map.json")
    token, largest = max(ids.items(), key=lambda item: item[1])
    if largest >= rows:
        raise UnsupportedModelError(
            f"the tokenizer in {where} has token {ascii(token)[:60]} with id {largest}, "
            f"the model's tables only have {rows} rows",
            "take tokenizer and weights from one repository and revision; a token that was added later needs a row",
        )


def missing_tokenizer(names: Iterable[str], where: str) -> UnsupportedModelError | None:
    """The error for a repository with these files, if none of them is a tokenizer; None if there is one."""
    present = set(names)
    if any(all(name in present for name in choice) for choice in TOKENIZER_CHOICES):
        return None
    if any(name.startswith(("tekken", "tokenizer.model.v")) for name in present):
        return UnsupportedModelError(
            f"{where} has a tokenizer in Mistral's own format alone (tekken.json), which needs mistral-common",
            "take a copy of the model with tokenizer.json",
        )
    return UnsupportedModelError(
        f"no tokenizer in {where}: expected tokenizer.json, tokenizer.model, or vocab.json with merges.txt"
    )


def _vocabulary(read: ReadFile, where: str) -> dict[str, int]:
    """Ids by token. A token of SentencePiece or Unigram may stand twice; its largest id counts."""
    if (raw := read("tokenizer.json", MAX_SMALL_FILE_BYTES)) is not None:
        return _parsed_tokenizer(raw, where)
    if (raw := read("tokenizer.model", MAX_SMALL_FILE_BYTES)) is not None:
        return _sentencepiece(raw, where)
    vocabulary = _json(read, where, "vocab.json")
    ids = {text: number for text, number in vocabulary.items() if _is_id(number)}
    if not ids:
        raise IntegrityError(f"vocab.json in {where} holds no tokens", "download the file again")
    return ids


def _parsed_tokenizer(raw: bytes, where: str) -> dict[str, int]:
    from tokenizers import Tokenizer

    content = parse_json_object(raw, f"tokenizer.json in {where}", IntegrityError, "download the file again")
    try:
        tokenizer = Tokenizer.from_str(raw.decode("utf-8"))
    except Exception as error:  # the parser raises bare exceptions
        raise IntegrityError(
            f"tokenizer.json in {where} cannot be read: {printable(str(error))[:200]}",
            "download the file again, or take the tokenizer from the model's source",
        ) from error
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    model = content.get("model")
    pieces = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(pieces, list) and pieces:  # Unigram: the place in the list is the id
        ids = {f"piece {len(pieces) - 1}": len(pieces) - 1} | ids
    if not ids:
        raise IntegrityError(f"tokenizer.json in {where} holds no tokens", "download the file again")
    return ids


def _sentencepiece(raw: bytes, where: str) -> dict[str, int]:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(raw)
    except Exception as error:  # the parser raises RuntimeError with a line of its own source
        raise IntegrityError(
            f"tokenizer.model in {where} is no SentencePiece model",
            "download the file again, or take a copy of the model with tokenizer.json",
        ) from error
    return {processor.IdToPiece(number): number for number in range(processor.GetPieceSize())}


def _json(read: ReadFile, where: str, name: str) -> dict[str, Any]:
    raw = read(name, MAX_SMALL_FILE_BYTES)
    if raw is None:
        return {}
    return parse_json_object(raw, f"{name} in {where}", IntegrityError, "download the file again")


def _content(token: object) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _is_id(value: object) -> bool:
    return type(value) is int and value >= 0
