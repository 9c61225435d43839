"""A random model with a vocabulary as large as those of common models, for measurements of memory.

Its answers mean nothing. Its tokenizer is a byte-level BPE of random merges, as large on disk and in memory as a
trained one.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, Qwen2Config

VOCAB: Final = 151_936
_TOKENS: Final = 151_643
_SPECIAL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LONGEST_TOKEN: Final = 14
_CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_AUTO: Any = AutoModelForCausalLM  # its methods are not annotated


def make_random_model(directory: Path) -> Path:
    """Write the model into `directory` unless it is there, and return the directory."""
    if (directory / "tokenizer_config.json").is_file():
        return directory
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=_TOKENS,
        eos_token_id=_TOKENS + 2,
    )
    torch.manual_seed(0)
    _AUTO.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    _write_tokenizer(directory)
    return directory


def _write_tokenizer(directory: Path) -> None:
    """Write the tokenizer; its settings come last, so that they mark the model as complete."""
    tokens, merges = _random_merges()
    spaces = {"add_prefix_space": False, "trim_offsets": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": text} | flags for number, text in enumerate(_SPECIAL, start=_TOKENS)
        ],
        "pre_tokenizer": {"type": "ByteLevel", "use_regex": True} | spaces,
        "decoder": {"type": "ByteLevel", "use_regex": True} | spaces,
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL[0],
        "eos_token": _SPECIAL[2],
        "chat_template": _CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _random_merges() -> tuple[list[str], list[list[str]]]:
    """Return tokens and merges: each token beyond the bytes is two earlier ones."""
    draw = random.Random(0)
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    known, merges = set(tokens), []
    while len(tokens) < _TOKENS:
        left, right = draw.choice(tokens), draw.choice(tokens)
        merged = left + right
        if merged not in known and len(merged) <= _LONGEST_TOKEN:
            known.add(merged)
            tokens.append(merged)
            merges.append([left, right])
    return tokens, merges
