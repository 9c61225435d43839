"""The streamed text is what the library decodes, for every kind of decoder; stop strings end it where a search of the
whole text would."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import open_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from subspec_cli.decoding.detokenizer import Detokenizer
from subspec_cli.decoding.text import AnswerText
from subspec_cli.decoding.text_offsets import TextOffsets
from subspec_cli.modeling.pretrained import ModelTokenizer
from subspec_cli.modeling.settling import settling_of

BYTES_OF_TEXT = (b"\xe4", b"\xbd", b"\xa0", b"\xf0\x9f", b"\x98", b"\x80", b"\xff", b"\xc3", b"\xed", b"\xf4")
BYTE_LEVEL = (
    *BYTES_OF_TEXT,
    b"A",
    b" hello",
    b"lo wor",
    b"ld",
    b"\xa0\xe4",
    b"\xbd\xa0\xe4",
    "\ufffd".encode(),
)
WORDS = ("▁Hello", "▁wor", "lo", "ld", "▁", "▁▁", "\ufffd", "!", "▁▁x▁")
RUNS = (*(f"<0x{byte:02X}>" for byte in b"\xe4\xbd\xa0\xff\x80\xc3\xa9A "), "<0x+a>", "<0xe4>")
PIECES = ("hel", "##lo", "wor", "##ld", ".", "!", "n't", "'", "s", "do", "not", "##", " ")
SPACES = decoders.Replace("▁", " ")
KINDS = {
    "byte level": ("bytes", decoders.ByteLevel(), "whole characters"),
    "sentencepiece": (
        (*WORDS, *RUNS),
        decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
        "byte runs",
    ),
    "sentencepiece, 3 spaces": (
        (*WORDS, *RUNS),
        decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 3, 0)]),
        "byte runs",
    ),
    "gemma": (
        (*WORDS, *RUNS),
        decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse()]),
        "byte runs",
    ),
    "byte runs, stripped": (
        (*WORDS, *RUNS),
        decoders.Sequence([decoders.ByteFallback(), decoders.Strip("A", 1, 0)]),
        "byte runs",
    ),
    "fused, then replaced": (WORDS, decoders.Sequence([decoders.Fuse(), SPACES]), "at once"),
    "metaspace, first": (WORDS, decoders.Metaspace("▁", "first"), "at once"),
    "metaspace, always": (WORDS, decoders.Metaspace("▁", "always"), "at once"),
    "metaspace, never": (WORDS, decoders.Metaspace("▁", "never"), "at once"),
    "wordpiece": (PIECES, decoders.WordPiece("##", cleanup=True), "at once"),
    "wordpiece, not cleaned": (PIECES, decoders.WordPiece("##", cleanup=False), "at once"),
    "none": (PIECES, None, "at once"),
    "suffix": (("hel", "lo</w>", "wo</w>rld", "</w>", "!"), decoders.BPEDecoder(), "at the end"),
    "doubles": (("h", "e", "l", "|", "<pad>", "o"), decoders.CTC(), "at the end"),
    "a pattern over all": (
        WORDS,
        decoders.Sequence([SPACES, decoders.Fuse(), decoders.Replace(Regex(" +$"), "")]),
        "at the end",
    ),
    "a long pattern over all": (
        WORDS,
        decoders.Sequence([SPACES, decoders.Fuse(), decoders.Replace("lo wor", "X")]),
        "at the end",
    ),
}
"""Tokens, decoder, and how it settles."""
SPECIAL = ("<|x|>", "<s>")


@dataclass(frozen=True)
class Kind:
    tokenizer: ModelTokenizer
    vocab: int
    """Ids below it have a token; the first of the special tokens is 2 less."""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return {name: make_kind(tmp_path_factory.mktemp("kind"), name) for name in KINDS}


def make_kind(directory: Path, name: str) -> Kind:
    """A small tokenizer saved by the library and read by ours."""
    tokens, decoder, settling = KINDS[name]
    if tokens == "bytes":
        alphabet = byte_alphabet()
        tokens = tuple("".join(alphabet[byte] for byte in item) for item in BYTE_LEVEL)
    backend = Tokenizer(models.WordLevel({token: at for at, token in enumerate(tokens)}, unk_token=tokens[0]))
    backend.add_tokens(["<tool>", "é b"])
    backend.add_special_tokens(list(SPECIAL))
    if decoder is not None:
        backend.decoder = decoder
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(directory)
    tokenizer = open_tokenizer(directory, 1000, "llama")
    assert tokenizer.settling == settling
    return Kind(tokenizer, len(tokens) + 4)


def byte_alphabet() -> list[str]:
    """The character that a byte-level tokenizer writes for each byte."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte if byte in shown else 256 + hidden.index(byte)) for byte in range(256)]


@st.composite
def some_ids(draw: st.DrawFn, vocab: int) -> list[int]:
    """A run of tokens, often of few kinds, so that long runs of one kind are common; two ids are unknown."""
    pool = draw(st.lists(st.integers(0, vocab + 1), min_size=1, max_size=8))
    return draw(st.lists(st.sampled_from(pool), min_size=1, max_size=draw(st.sampled_from((6, 40, 120)))))


def ending(
    tokenizer: ModelTokenizer, token_ids: list[int], stop: list[str], eos_ids: set[int], limit: int
) -> tuple[int, str, str] | None:
    """By decoding the whole text after every token: tokens, reason and text of the answer."""
    for count in range(1, len(token_ids) + 1):
        taken = token_ids[:count]
        ends = taken[-1] in eos_ids
        shown = tokenizer.decode(taken[:-1] if ends else taken)
        written = tokenizer.decode(taken, special=True)
        cuts = [shown[: shown.find(item)] for item in stop if item in shown and not ends]
        at = min((written.find(item) for item in stop if item in written), default=None)
        if at is not None:
            before = max(n for n in range(count) if len(tokenizer.decode(taken[:n], special=True)) <= at)
            rest = written[len(tokenizer.decode(taken[:before], special=True)) : at]
            hidden = taken[before] in eos_ids or tokenizer.drops(taken[before], special=False)
            cuts.append(tokenizer.decode(taken[:before]) + ("" if hidden else rest))
        if cuts:
            return count, "stop", min(cuts, key=len)
        if ends or count == limit:
            return count, "stop" if ends else "length", shown
    return None


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_pieces_joined_are_the_text_decoded_whole(
    kinds: dict[str, Kind], name: str, data: st.DataObject
) -> None:
    kind = kinds[name]
    token_ids = data.draw(some_ids(kind.vocab))
    for special in (False, True):
        detokenizer, shown = Detokenizer(kind.tokenizer, special=special), ""
        whole = kind.tokenizer.decode(token_ids, special=special)
        for count, token_id in enumerate(token_ids, start=1):
            shown += detokenizer.push(token_id)
            assert whole.startswith(shown)
            assert shown + detokenizer.pending() == kind.tokenizer.decode(token_ids[:count], special=special)


@pytest.mark.parametrize(
    "name", [name for name in KINDS if KINDS[name][2] != "at the end" and "cleaned" not in name]
)
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_token_stands_in_the_text_where_its_offset_says(
    kinds: dict[str, Kind], name: str, data: st.DataObject
) -> None:
    kind = kinds[name]
    tokenizer = kind.tokenizer
    stripped = set(b" A")  # a byte that the beginning of a text loses is not told from one that it keeps
    token_ids = [
        each for each in data.draw(some_ids(kind.vocab - 2)) if tokenizer.byte_of(each) not in stripped
    ]
    text, offsets = tokenizer.decode(token_ids), TextOffsets(tokenizer)
    places = [offsets.add(token_id) for token_id in token_ids]
    assert places == sorted(places)
    assert not token_ids or (places[0] == 0 and places[-1] <= len(text))
    visible = [
        (token_id, at)
        for token_id, at in zip(token_ids, places, strict=True)
        if not tokenizer.drops(token_id, special=False)
    ]
    for token_id, at in visible[1:]:
        own = tokenizer.token_bytes(token_id).decode(errors="ignore")
        if tokenizer.byte_of(token_id) is None and own and own.encode() == tokenizer.token_bytes(token_id):
            assert text.startswith(own, at) or own.startswith((" ", "A")), "what begins the text may be cut"
    if KINDS[name][2] == "whole characters":
        assert b"".join(tokenizer.token_bytes(each) for each, _ in visible).decode(errors="replace") == text


@pytest.mark.parametrize("name", ["sentencepiece", "metaspace, first"])
def test_tokens_keep_their_leading_space(kinds: dict[str, Kind], name: str) -> None:
    tokenizer = kinds[name].tokenizer
    first, second = WORDS.index("▁Hello"), WORDS.index("▁wor")
    assert tokenizer.decode([first]) == "Hello"
    assert tokenizer.token_bytes(first) == b" Hello"
    assert tokenizer.token_bytes(second) == b" wor"
    assert tokenizer.token_bytes(9999) == b""
    offsets = TextOffsets(tokenizer)
    assert [offsets.add(each) for each in (first, second, first)] == [0, 5, 9]


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_an_answer_ends_where_a_search_of_the_whole_text_ends_it(
    kinds: dict[str, Kind], name: str, data: st.DataObject
) -> None:
    kind = kinds[name]
    tokenizer, token_ids = kind.tokenizer, data.draw(some_ids(kind.vocab))
    texts = [tokenizer.decode(token_ids, special=special) for special in (False, True)]
    stop = [
        text[at : at + data.draw(st.integers(1, 9))]
        for text in data.draw(st.lists(st.sampled_from(texts), max_size=3))
        if text
        for at in [data.draw(st.integers(0, len(text) - 1))]
    ]
    eos_ids = set(data.draw(st.lists(st.sampled_from(token_ids), max_size=1)))
    limit = data.draw(st.sampled_from((1, 5, 1000)))
    answer = AnswerText(tokenizer, eos_ids=eos_ids, stop=stop, max_new_tokens=limit)
    found, pieces = None, []
    for count, token_id in enumerate(token_ids, start=1):
        reason = answer.feed(token_id)
        pieces.append(answer.take())
        if reason:
            found = (count, reason, "".join(pieces))
            break
    assert found == ending(tokenizer, token_ids, stop, eos_ids, limit)


# --- the kinds of the trials ------------------------------------------------------------------------------------


def answered(tokenizer: ModelTokenizer, token_ids: list[int], *stop: str) -> tuple[str, int, str | None]:
    """Text, tokens and reason of an answer."""
    answer, text = AnswerText(tokenizer, eos_ids=(), stop=stop, max_new_tokens=99), ""
    for count, token_id in enumerate(token_ids, start=1):
        reason = answer.feed(token_id)
        text += answer.take()
        if reason:
            return text, count, reason
    return text, len(token_ids), None


def ids_of(kind: Kind, *tokens: str) -> list[int]:
    return [kind.tokenizer._tokenizer.convert_tokens_to_ids(token) for token in tokens]


def test_a_skipped_special_token_takes_no_space_with_it(kinds: dict[str, Kind]) -> None:
    kind = kinds["sentencepiece"]
    token_ids = ids_of(kind, "▁Hello", "<|x|>", "▁wor", "ld")
    assert answered(kind.tokenizer, token_ids) == ("Hello world", 4, None)
    assert answered(kind.tokenizer, token_ids, "lo wor") == ("Hel", 3, "stop")


@pytest.mark.parametrize(
    ("stop", "text", "count"),
    [
        ("<|x|>", "Hello", 2),
        ("lo<|x|>", "Hel", 2),
        ("<|x|> w", "Hello", 3),
        ("lo<|x|> wor", "Hel", 3),
        ("<|x", "Hello", 2),
        ("or<s>", "Hello w", 4),
    ],
)
def test_a_stop_string_that_is_or_spans_a_special_token_ends_the_answer(
    kinds: dict[str, Kind], stop: str, text: str, count: int
) -> None:
    kind = kinds["sentencepiece"]
    token_ids = ids_of(kind, "▁Hello", "<|x|>", "▁wor", "<s>", "ld")
    assert answered(kind.tokenizer, token_ids, stop) == (text, count, "stop")


def test_a_run_of_byte_tokens_waits_until_it_is_whole_or_spoiled(kinds: dict[str, Kind]) -> None:
    kind = kinds["sentencepiece"]
    detokenizer = Detokenizer(kind.tokenizer)
    whole = ids_of(kind, "lo", "<0xE4>", "<0xBD>", "<0xA0>", "!")
    assert [detokenizer.push(token) for token in whole] == ["lo", "", "", "", "你!"]
    spoiled = ids_of(kind, "<0xE4>", "<0xBD>", "<0xA0>", "<0xFF>", "<0xFF>", "lo")
    assert [detokenizer.push(token) for token in spoiled] == ["", "", "", "\ufffd" * 4, "\ufffd", "lo"]


@pytest.mark.parametrize("name", ["byte level", "sentencepiece", "metaspace, first", "wordpiece"])
def test_the_work_per_token_does_not_grow(kinds: dict[str, Kind], name: str) -> None:
    """The window that is decoded stays short, in a run of spoiled bytes too."""
    kind = kinds[name]

    class Counting:
        settling = kind.tokenizer.settling
        drops, byte_of = kind.tokenizer.drops, kind.tokenizer.byte_of
        longest = 0

        def decode(self, token_ids: list[int], *, special: bool = False) -> str:
            self.longest = max(self.longest, len(token_ids))
            return kind.tokenizer.decode(token_ids, special=special)

    counting = Counting()
    detokenizer = Detokenizer(counting)
    spoiled = ids_of(kind, "<0xFF>", "<0x41>") * 300 if kind.tokenizer.settling == "byte runs" else []
    for token_id in [*list(range(kind.vocab)) * 20, *spoiled]:
        detokenizer.push(token_id)
    assert counting.longest <= 60


def test_a_long_answer_is_streamed_fast(kinds: dict[str, Kind]) -> None:
    """Some 20 microseconds a token on an idle machine."""
    kind = kinds["byte level"]
    answer = AnswerText(kind.tokenizer, eos_ids=(), stop=("\n\n\n",), max_new_tokens=10**6)
    started = time.process_time()
    for token_id in list(range(kind.vocab)) * 200:
        answer.feed(token_id)
    assert (time.process_time() - started) / (200 * kind.vocab) < 0.002


def test_a_decoder_that_could_make_or_break_byte_tokens_is_not_trusted() -> None:
    fallback = {"type": "ByteFallback"}
    for before in (
        {"type": "Replace", "pattern": {"String": "x"}, "content": ""},
        {"type": "Replace", "pattern": {"String": "▁"}, "content": "<"},
        {"type": "Replace", "pattern": {"Regex": "▁"}, "content": " "},
        {"type": "Strip", "content": "<", "start": 1, "stop": 0},
    ):
        assert settling_of({"type": "Sequence", "decoders": [before, fallback]}) == "at the end"
    assert (
        settling_of({"type": "Sequence", "decoders": [{"type": "Sequence", "decoders": [fallback]}]})
        == "byte runs"
    )
    assert settling_of({"type": "Strip", "content": " ", "start": 0, "stop": 1}) == "at the end"
