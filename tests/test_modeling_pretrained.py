"""The door to transformers: the tokenizer and its chat template, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import EOS_ID, Tiny, open_tokenizer
from transformers import tokenization_utils_base

from subspec_cli.errors import IntegrityError, PromptRefusedError, UnsupportedModelError
from subspec_cli.modeling.chat_template import ChatTemplate
from subspec_cli.modeling.pretrained import ModelTokenizer


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
    tokenizer = open_tokenizer(directory)
    text = "  two spaces, ünïcode 🙂, a . stop , and\nlines"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_a_tokenizer_was_made_from_is_freed(directory: Path) -> None:
    """Python lists beside the tokenizer: half of its memory for a large vocabulary."""
    tokenizer = open_tokenizer(directory)
    assert type(tokenizer._tokenizer).__name__ == "Qwen2Tokenizer"
    assert not {"_vocab", "_merges"} & vars(tokenizer._tokenizer).keys()
    assert tokenizer.encode("a b")


def test_a_chat_is_laid_out_up_to_the_assistants_turn(directory: Path) -> None:
    tokenizer = open_tokenizer(directory)
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
    tokenizer = open_tokenizer(directory)
    assert tokenizer.encode("a") == [256, 97]
    assert tokenizer.encode_chat(MESSAGES)[0] == 257


def test_a_long_text_is_counted_without_the_librarys_warning(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It foretells indexing errors; a prompt that is too long is refused in our own words."""
    change(directory / "tokenizer_config.json", model_max_length=8)
    warned: list[str] = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", lambda text, *_: warned.append(text))
    tokenizer = open_tokenizer(directory)
    assert len(tokenizer.encode_prompt("x" * 20, system=None, raw=True)) == 20
    assert len(tokenizer.encode_prompt("x" * 20, system=None, raw=False)) > 20
    assert warned == []


def test_a_model_without_a_template_says_so(directory: Path) -> None:
    change(directory / "tokenizer_config.json", chat_template=None)
    assert not open_tokenizer(directory).has_chat_template


def test_a_template_that_refuses_is_an_error_with_a_way_out(directory: Path) -> None:
    change(directory / "tokenizer_config.json", chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        UnsupportedModelError, match="refuses this conversation: roles must alternate"
    ) as caught:
        open_tokenizer(directory).encode_chat(MESSAGES)
    assert "--raw" in caught.value.hint


def test_a_prompt_with_a_token_beyond_the_tables_is_refused(directory: Path) -> None:
    """The library adds special tokens of its own; they are no fault until a prompt holds one."""
    tokenizer = open_tokenizer(directory, 258)
    assert tokenizer.encode("a<|im_start|>") == [97, 257]
    with pytest.raises(
        PromptRefusedError, match=r"<\|im_end\|> with id 258, the model's tables only have 258"
    ):
        tokenizer.encode("a<|im_end|>")


def test_a_prompt_that_was_counted_is_not_rendered_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[Any] = []
    monkeypatch.setattr(ChatTemplate, "render", lambda self, messages: rendered.append(messages) or "ab")
    tokenizer = open_tokenizer(directory)
    assert tokenizer.encode_chat(MESSAGES) == tokenizer.encode_chat(list(MESSAGES)) == [97, 98]
    assert len(rendered) == 1
    tokenizer.encode_chat([{"role": "user", "content": "other"}])
    tokenizer.encode_chat(MESSAGES)
    assert len(rendered) == 3


def test_templates_by_name_have_a_default_or_are_refused(directory: Path) -> None:
    """Some models have a second template, for tools."""
    named = [
        {"name": "default", "template": "d{{ messages[0].content }}"},
        {"name": "tool_use", "template": "t"},
    ]
    change(directory / "tokenizer_config.json", chat_template=named)
    assert open_tokenizer(directory).encode_chat([{"role": "user", "content": "e"}]) == [100, 101]
    change(directory / "tokenizer_config.json", chat_template=named[1:])
    with pytest.raises(PromptRefusedError, match="is broken: This model has multiple chat templates"):
        open_tokenizer(directory).encode_chat(MESSAGES)


RUNAWAY = ("(a+)+$", "(a|aa)+$", "(x+x+)+y")


@pytest.mark.parametrize("pattern", RUNAWAY)
def test_a_prompt_on_which_the_tokenizer_panics_is_refused_in_one_line(
    directory: Path, pattern: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its regular expression backtracks without end; the library stops it by a panic, and writes on stderr."""
    content = json.loads((directory / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = fast_tokenizer(directory)
    with pytest.raises(PromptRefusedError, match="the tokenizer cannot split this prompt: ") as caught:
        tokenizer.encode("a" * 40 + "!" + "x" * 40)
    assert caught.value.hint
    assert capfd.readouterr().err == ""
    assert tokenizer.encode("ab") == [97, 98], "another prompt may do"


def fast_tokenizer(directory: Path) -> ModelTokenizer:
    """Ours over the library's class that takes tokenizer.json as it is."""
    change(directory / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    return open_tokenizer(directory, family="llama")


def test_a_decoder_that_panics_is_an_error_of_the_model(directory: Path) -> None:
    change(directory / "tokenizer.json", decoder={"type": "Strip", "content": "a", "start": 1, "stop": 1})
    with pytest.raises(UnsupportedModelError, match="cannot decode its own tokens: slice index") as caught:
        fast_tokenizer(directory).decode([97])
    assert caught.value.hint


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_is_no_failure_of_the_tokenizer_passes(
    directory: Path, monkeypatch: pytest.MonkeyPatch, signal: type[BaseException]
) -> None:
    def interrupted(*args: Any, **how: Any) -> None:
        raise signal

    tokenizer = open_tokenizer(directory)
    for name in ("encode", "decode"):
        monkeypatch.setattr(tokenizer._tokenizer, name, interrupted)
    with pytest.raises(signal):
        tokenizer.encode("a")
    with pytest.raises(signal):
        tokenizer.decode([97])


@pytest.mark.parametrize("content", ["not json", "{}", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_an_error_that_names_the_place(directory: Path, content: str) -> None:
    (directory / "tokenizer.json").write_text(content)
    with pytest.raises(IntegrityError, match=f"the tokenizer in {directory} cannot be loaded"):
        open_tokenizer(directory)


class PanicException(BaseException):
    """Stands for the library's own, which cannot be made in Python."""


def test_a_tokenizer_that_panics_while_it_is_read_is_damaged(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(*args: Any, **how: Any) -> None:
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr("subspec_cli.modeling.pretrained.AutoTokenizer.from_pretrained", panic)
    with pytest.raises(IntegrityError, match="cannot be loaded: called"):
        open_tokenizer(directory)


def test_code_in_a_models_directory_is_never_run(directory: Path) -> None:
    (directory / "evil.py").write_text("raise SystemExit('remote code ran')\n")
    change(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.EvilTokenizer", None]})
    assert open_tokenizer(directory).encode("a") == [97]


@pytest.mark.parametrize(
    "fields",
    [{"attn_implementation": "flash_attention_2"}, {"id2label": {"a": "b"}}, {"model_type": "no-such-model"}],
    ids=lambda fields: next(iter(fields)),
)
def test_a_tokenizer_opens_whatever_the_library_thinks_of_the_config(
    directory: Path, fields: dict[str, Any]
) -> None:
    """The library reads config.json to choose a class; a field that stops it there says nothing of the tokenizer."""
    change(directory / "config.json", **fields)
    assert open_tokenizer(directory).encode("a") == [97]
