"""The door to transformers: configuration, tokenizer and end tokens, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import EOS_ID, VOCAB, Tiny
from transformers import tokenization_utils_base

from subspec_cli.errors import IntegrityError, UnsupportedModelError
from subspec_cli.modeling.pretrained import ModelTokenizer, end_token_ids, load_config


@pytest.fixture
def directory(tiny: Callable[..., Tiny], tmp_path: Path) -> Path:
    """A copy of a model's small files, free to be changed."""
    for path in tiny("qwen2").directory.glob("*.json"):
        shutil.copy(path, tmp_path)
    return tmp_path


def change(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


MESSAGES = [{"role": "user", "content": "héllo"}]


def test_text_survives_encoding(directory: Path) -> None:
    tokenizer = ModelTokenizer(directory, VOCAB)
    text = "  two spaces, ünïcode 🙂, a . stop , and\nlines"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_a_tokenizer_was_made_from_is_freed(directory: Path) -> None:
    """Python lists beside the tokenizer: half of its memory for a large vocabulary."""
    tokenizer = ModelTokenizer(directory, VOCAB)
    assert type(tokenizer._tokenizer).__name__ == "Qwen2Tokenizer"
    assert not {"_vocab", "_merges"} & vars(tokenizer._tokenizer).keys()
    assert tokenizer.encode("a b")


def test_a_chat_is_laid_out_up_to_the_assistants_turn(directory: Path) -> None:
    tokenizer = ModelTokenizer(directory, VOCAB)
    assert tokenizer.has_chat_template
    token_ids = tokenizer.encode_chat(MESSAGES)
    assert token_ids[0] == 257, "<|im_start|> is one token"
    assert EOS_ID in token_ids
    assert tokenizer.decode(token_ids) == "user\nhéllo\nassistant\n", "special tokens are left out"


def test_a_template_is_not_given_a_second_beginning(directory: Path) -> None:
    """Tokenizers such as Llama's put their own first token before bare text; a template writes it itself."""
    path = directory / "tokenizer.json"
    begin = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [256], "tokens": ["<|endoftext|>"]}}
    processor = {"type": "TemplateProcessing", "single": [begin, text], "special_tokens": tokens}
    change(path, post_processor=processor | {"pair": [begin, text, text]})
    tokenizer = ModelTokenizer(directory, VOCAB)
    assert tokenizer.encode("a") == [256, 97]
    assert tokenizer.encode_chat(MESSAGES)[0] == 257


def test_a_long_text_is_counted_without_the_librarys_warning(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It foretells indexing errors; a prompt that is too long is refused in our own words."""
    change(directory / "tokenizer_config.json", model_max_length=8)
    warned: list[str] = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", lambda text, *_: warned.append(text))
    tokenizer = ModelTokenizer(directory, VOCAB)
    assert len(tokenizer.encode_prompt("x" * 20, system=None, raw=True)) == 20
    assert len(tokenizer.encode_prompt("x" * 20, system=None, raw=False)) > 20
    assert warned == []


def test_a_model_without_a_template_says_so(directory: Path) -> None:
    change(directory / "tokenizer_config.json", chat_template=None)
    assert not ModelTokenizer(directory, VOCAB).has_chat_template


def test_a_template_that_refuses_is_an_error_with_a_way_out(directory: Path) -> None:
    change(directory / "tokenizer_config.json", chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        UnsupportedModelError, match="refuses this conversation: roles must alternate"
    ) as caught:
        ModelTokenizer(directory, VOCAB).encode_chat(MESSAGES)
    assert "--raw" in caught.value.hint


def test_more_tokens_than_rows_of_the_head_are_refused(directory: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="259 tokens, the model's head only 258 rows"):
        ModelTokenizer(directory, 258)


@pytest.mark.parametrize("content", ["not json", "{}", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_an_error_that_names_the_place(directory: Path, content: str) -> None:
    (directory / "tokenizer.json").write_text(content)
    with pytest.raises(IntegrityError, match=f"the tokenizer in {directory} cannot be loaded"):
        ModelTokenizer(directory, VOCAB)


@pytest.mark.parametrize(
    ("generation", "in_config", "expected"),
    [
        ({"eos_token_id": 7}, 9, {7, EOS_ID}),
        ({"eos_token_id": [7, 8]}, 9, {7, 8, EOS_ID}),
        ({}, 9, {9, EOS_ID}),
        (None, 9, {9, EOS_ID}),
        (None, [9, 10], {9, 10, EOS_ID}),
        (None, None, {EOS_ID}),
    ],
)
def test_end_tokens_are_those_of_the_generation_config_then_the_model(
    directory: Path, generation: dict[str, Any] | None, in_config: Any, expected: set[int]
) -> None:
    (directory / "generation_config.json").unlink()
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    change(directory / "config.json", eos_token_id=in_config)
    tokenizer = ModelTokenizer(directory, VOCAB)
    assert end_token_ids(directory, load_config(directory), tokenizer) == expected


def test_a_damaged_generation_config_is_an_error(directory: Path) -> None:
    (directory / "generation_config.json").write_text("{")
    tokenizer = ModelTokenizer(directory, VOCAB)
    with pytest.raises(IntegrityError, match="generation_config"):
        end_token_ids(directory, load_config(directory), tokenizer)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "no-such-model"},
        {"attention_dropout": "much"},
        {"num_hidden_layers": "three"},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        {"layer_types": ["full_attention"]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_config_that_the_library_refuses_is_one_error(directory: Path, fields: dict[str, Any]) -> None:
    change(directory / "config.json", **fields)
    with pytest.raises(UnsupportedModelError, match=r"config\.json is not understood"):
        load_config(directory)


def test_code_in_a_models_directory_is_never_run(directory: Path) -> None:
    (directory / "evil.py").write_text("raise SystemExit('remote code ran')\n")
    change(
        directory / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.EvilConfig", "AutoTokenizer": "evil.EvilTokenizer"},
    )
    with pytest.raises(UnsupportedModelError):
        load_config(directory)


def test_what_the_library_says_is_printed_safely(directory: Path) -> None:
    change(directory / "config.json", model_type="\x1b[2Jevil")
    with pytest.raises(UnsupportedModelError) as caught:
        load_config(directory)
    assert "\x1b" not in caught.value.message
