"""The tokenizer of SmolLM2: byte-level byte-pair encoding that takes every digit as one token."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from smollm2.config import token_ids
from smollm2.errors import SmolLM2Error
from smollm2.gguf_model import GgufModel

CONTROL, USER_DEFINED = 3, 4  # llama.cpp's types of tokens that text is split at


def read_tokenizer(model: GgufModel) -> Tokenizer:
    """Tokenizer with the file's tokens and merges. Raises SmolLM2Error if they do not fit together."""
    tokens, merges, types = (
        model.field(f"tokenizer.ggml.{key}", list) for key in ("tokens", "merges", "token_type")
    )
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(types) != len(tokens):
        raise SmolLM2Error(f"{len(tokens)} tokens: {len(vocab)} distinct, {len(types)} types")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    except Exception as error:  # the library raises no narrower class
        raise SmolLM2Error(f"the merges do not fit the tokens: {error}") from error
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for kind, is_special in ((CONTROL, True), (USER_DEFINED, False)):
        named = [token for token, number in vocab.items() if types[number] == kind]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=is_special) for token in named])
    return tokenizer


def tokenizer_config(model: GgufModel) -> dict[str, Any]:
    """Content of `tokenizer_config.json`: the chat template, and the tokens with a role."""
    tokens = model.field("tokenizer.ggml.tokens", list)
    unknown = model.field("tokenizer.ggml.unknown_token_id", int)
    roles = {**token_ids(model), "unk_token_id": unknown}
    if not all(0 <= number < len(tokens) for number in roles.values()):
        raise SmolLM2Error(f"a special token lies outside of the {len(tokens)} tokens: {roles}")
    return {
        # The class that takes tokenizer.json as it is; GPT2Tokenizer would replace how text is split.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role.removesuffix("_id"): tokens[number] for role, number in roles.items()},
        "model_max_length": model.field("llama.context_length", int),
        "clean_up_tokenization_spaces": False,
        "chat_template": model.field("tokenizer.chat_template", str),
    }
