"""A model's tokenizer and chat template through transformers; remote code is never run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from subspec_cli.checkpoint.tokenizer_files import TokenizerFacts
from subspec_cli.errors import IntegrityError, PromptRefusedError, UnsupportedModelError
from subspec_cli.files.silenced_stderr import silenced_stderr
from subspec_cli.modeling.chat_template import RAW_HINT, ChatTemplate
from subspec_cli.modeling.delta_kernel import compile_rule
from subspec_cli.modeling.int4_product import dot_product
from subspec_cli.modeling.settling import Settling, byte_of_token, bytes_of_piece, settling_of
from subspec_cli.streaming.memory_meter import return_freed_memory_now
from subspec_cli.units import printable

_NO_LIMIT: Final = 1 << 40
"""Tokens of the longest text that the library does not warn about; the plan judges the length of a text."""
_USED_LATER: Final = ("encodings.unicode_escape", "transformers.tokenization_python")
"""Modules that transformers imports when it first encodes a text."""


_MISTRAL: Final = {"mistral_format": False, "fix_mistral_regex": False}
_PINNED: Final = dict.fromkeys(("mistral", "mistral3", "ministral", "ministral3"), _MISTRAL)
"""Choices for types whose token ids would otherwise depend on another package, or change with a warning."""


def import_libraries(model_type: str, *, has_recurrent_layers: bool, drafts_on_cpu: bool) -> None:
    """Import what opening a model of this type would import, so that none of it counts as the model's memory.

    For some types transformers' configuration class alone imports 860 modules, which take 75 MiB.
    """
    for name in _USED_LATER:
        import_module(name)
    CONFIG_MAPPING[model_type]
    if has_recurrent_layers:
        compile_rule()
    if drafts_on_cpu:
        dot_product()


def _tokenizer_config(directory: Path, facts: TokenizerFacts) -> PreTrainedConfig:
    """The configuration by which the library chooses the class of a tokenizer.

    It is made from what was decided and not from config.json, which may hold fields that stop the library.
    """
    config: PreTrainedConfig = CONFIG_MAPPING[facts.model_type]()
    config.name_or_path = str(directory)
    if facts.class_name:
        config.tokenizer_class = facts.class_name
    return config


class ModelTokenizer:
    """The tokenizer and chat template of a model.

    The plan judges the length of a text, so the library's warnings of long texts are off.
    """

    def __init__(self, directory: Path, facts: TokenizerFacts) -> None:
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                directory,
                config=_tokenizer_config(directory, facts),
                model_max_length=_NO_LIMIT,
                trust_remote_code=False,
                local_files_only=True,
                **_PINNED.get(facts.model_type, {}),
            )
        except BaseException as error:  # parsers of the library raise any exception, and panic
            if (reason := _failure_of(error)) is None:
                raise
            raise IntegrityError(
                f"the tokenizer in {printable(str(directory))} cannot be loaded: {reason}"
            ) from error
        self._rows = facts.rows
        self._drop_what_it_was_made_from()
        self.settling: Settling = _settling(self._tokenizer)
        """When the text of a token is settled."""
        self._has_text: dict[int, bool] = {}
        self._bytes: dict[int, bytes] = {}
        self._last_chat: tuple[list[dict[str, str]], list[int]] | None = None

    def _drop_what_it_was_made_from(self) -> None:
        """Free what loading has left behind: for 150,000 tokens 80 of 120 MiB.

        Some classes keep vocabulary and merges as Python objects beside the tokenizer that was made from them, and
        parsing leaves freed memory in small pieces.
        """
        for name in ("_vocab", "_merges"):
            vars(self._tokenizer).pop(name, None)
        return_freed_memory_now()

    @property
    def has_chat_template(self) -> bool:
        """Whether the model has a template that formats messages as in its training."""
        return bool(self._tokenizer.chat_template)

    @property
    def backend_json(self) -> str | None:
        """The tokenizer as the tokenizers library writes it; None if it is not one of that library."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return None if backend is None else str(backend.to_str())

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of raw text, with the special tokens that the tokenizer adds by itself unless told not to.

        Raises PromptRefusedError if the tokenizer fails, or gives a token that has no row in the model's tables.
        """
        try:
            with silenced_stderr():
                token_ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        except BaseException as error:
            if (reason := _failure_of(error)) is None:
                raise
            raise PromptRefusedError(
                f"the tokenizer cannot split this prompt: {reason}", "another wording may do"
            ) from error
        return self._with_rows(token_ids)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to the beginning of the assistant's answer.

        The last conversation is kept, as a prompt is counted first and answered later. Raises PromptRefusedError.
        """
        if self._last_chat is None or self._last_chat[0] != list(messages):
            text = self._chat_template.render(messages)
            kept = [dict(message) for message in messages]
            self._last_chat = (kept, self.encode(text, add_special_tokens=False))
        return list(self._last_chat[1])

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        """The template of a plain conversation; some models have others for tools beside it."""
        try:
            template = self._tokenizer.get_chat_template()
        except ValueError as error:
            reason = printable(str(error))[:300]
            raise PromptRefusedError(f"the chat template is broken: {reason}", RAW_HINT) from error
        return ChatTemplate(template, self._tokenizer.special_tokens_map)

    def _with_rows(self, token_ids: Sequence[int]) -> list[int]:
        """Refuse tokens beyond the model's tables: the library adds special tokens that have no row."""
        if (largest := max(token_ids, default=0)) >= self._rows:
            token = printable(str(self._tokenizer.convert_ids_to_tokens(largest)))
            raise PromptRefusedError(
                f"the prompt holds the token {token} with id {largest}, the model's tables only "
                f"have {self._rows} rows",
                "leave it out of the prompt",
            )
        return list(token_ids)

    def encode_prompt(self, text: str, *, system: str | None, raw: bool) -> list[int]:
        """Token ids of one prompt: through the chat template if there is one, unless `raw`."""
        if raw or not self.has_chat_template:
            return self.encode(text)
        return self.encode_messages([{"role": "user", "content": text}], system=system)

    def encode_messages(self, messages: Sequence[dict[str, str]], *, system: str | None = None) -> list[int]:
        """Token ids of a conversation, up to where the assistant begins to speak.

        `messages` have a `role` and a `content` each. Without a chat template the contents are taken line by line.
        """
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        if self.has_chat_template:
            return self.encode_chat(messages)
        return self.encode("".join(f"{message['content']}\n" for message in messages))

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Text of tokens; special tokens have one only if `special`. Spaces are not cleaned up."""
        if not token_ids:
            return ""
        try:
            text = self._tokenizer.decode(
                list(token_ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
            )
        except BaseException as error:
            if (reason := _failure_of(error)) is None:
                raise
            raise UnsupportedModelError(
                f"the tokenizer cannot decode its own tokens: {reason}",
                "its tokenizer.json has a decoder that fails; another revision of the model may have a sound one",
            ) from error
        return str(text)

    def drops(self, token_id: int, *, special: bool) -> bool:
        """Whether decoding is the same without this token: it is unknown, or special and not written out."""
        if self._tokenizer.convert_ids_to_tokens(token_id) is None:
            return True
        if special:
            return False
        if token_id not in self._has_text:
            self._has_text[token_id] = self.decode([token_id]) == self.decode([token_id], special=True)
        return not self._has_text[token_id]

    def byte_of(self, token_id: int) -> int | None:
        """The byte that a token of a byte run stands for; None for other tokens."""
        if self.settling != "byte runs":
            return None
        return byte_of_token(self._tokenizer.convert_ids_to_tokens(token_id))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token among others; of a special token those of its name; none of an unknown one."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._bytes_of(token_id)
        return self._bytes[token_id]

    def _bytes_of(self, token_id: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return b""
        if self.drops(token_id, special=False):
            return str(piece).encode()
        if self.settling == "whole characters":
            return bytes_of_piece(piece)
        if (byte := self.byte_of(token_id)) is not None:
            return bytes([byte])
        # A decoder may change the first token, such as by dropping its leading space; the second one is as any other.
        alone = self.decode([token_id])
        return self.decode([token_id, token_id]).removeprefix(alone).encode()


def _failure_of(error: BaseException) -> str | None:
    """Return what a tokenizer says when it fails; None for what must not be taken for its failure.

    A panic of the library's Rust code is no `Exception`.
    """
    is_panic = type(error).__name__ == "PanicException"
    if not is_panic and (not isinstance(error, Exception) or isinstance(error, MemoryError)):
        return None
    return printable(str(error))[:300]


def _settling(tokenizer: PreTrainedTokenizerBase) -> Settling:
    """Return how a tokenizer's text settles; nothing is known of one that does not leave decoding to the library."""
    if type(tokenizer).decode is not PreTrainedTokenizerFast.decode:
        return "at the end"
    if type(tokenizer)._decode is not PreTrainedTokenizerFast._decode:
        return "at the end"
    decoder = tokenizer.backend_tokenizer.decoder
    return settling_of(None if decoder is None else json.loads(decoder.__getstate__()))
