"""Biases of logits by token id, from what the user wrote: ids, or texts that are one token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from subspec_cli.errors import UsageError
from subspec_cli.units import counted

if TYPE_CHECKING:
    from subspec_cli.modeling.pretrained import ModelTokenizer


def token_biases(
    written: Iterable[tuple[str, float]], tokenizer: ModelTokenizer, vocab: int
) -> tuple[tuple[int, float], ...]:
    """Return the biases by token id.

    Raises UsageError for a text that is not exactly one token, an id that the model does not have, or a token that
    is named twice.
    """
    biases: dict[int, float] = {}
    for name, bias in written:
        token_id = _token_id(name, tokenizer)
        if token_id >= vocab:
            raise UsageError(
                f"logit_bias names the token {token_id}, the model has {vocab}", "correct the id"
            )
        if token_id in biases:
            raise UsageError(
                f"logit_bias names the token {token_id} twice, once as {name!r}", "leave one of them out"
            )
        biases[token_id] = bias
    return tuple(biases.items())


def _token_id(name: str, tokenizer: ModelTokenizer) -> int:
    if name.isascii() and name.isdecimal():
        return int(name)
    token_ids = tokenizer.encode(name, add_special_tokens=False)
    if len(token_ids) != 1:
        ids = ", ".join(map(str, token_ids[:8])) + (" …" if len(token_ids) > 8 else "")
        raise UsageError(
            f"logit_bias: {name[:40]!r} is {counted(len(token_ids), 'token')}, not one",
            f"name tokens by their ids, here {ids}" if token_ids else "name the token by its id",
        )
    return token_ids[0]
