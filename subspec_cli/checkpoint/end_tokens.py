"""What ends an answer, by the files of a repository, as the library's `generate` reads them.

| generation_config.json | config.json | tokens that end an answer |
|---|---|---|
| names `eos_token_id`, a number or a list | anything | those |
| is there, the key is null or missing | anything | none |
| is not there | names it | those |
| is not there | null or missing | none |

The tokenizer's own end token does not count. A text, a fraction, an empty list
or one with anything but numbers is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subspec_cli.checkpoint.config_fields import shown
from subspec_cli.errors import UnsupportedModelError


def read_end_ids(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> tuple[int, ...]:
    """The tokens that end an answer, each once, in order; `generation` is generation_config.json, None without it.

    Raises:
        UnsupportedModelError: an entry that is no token id.
    """
    where, source = ("config.json", config) if generation is None else ("generation_config.json", generation)
    named = source.get("eos_token_id")
    listed = named if isinstance(named, list) else [] if named is None else [named]
    if named == [] or any(type(token) is not int for token in listed):
        raise UnsupportedModelError(
            f"eos_token_id in {where} is {shown(named)}, not a token id or a list of them",
            "correct the file; the end token's id stands in the tokenizer's files",
        )
    return tuple(dict.fromkeys(listed))
