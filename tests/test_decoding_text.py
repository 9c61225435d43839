"""Whole characters only, stop strings wherever they fall, and the same text however the tokens arrive."""

import random

import pytest
from fakes import ByteTokenizer
from tiny_models import SPECIAL_TOKENS, open_tokenizer, write_tiny_tokenizer

from subspec_cli.decoding.detokenizer import Detokenizer
from subspec_cli.decoding.text import AnswerText

BYTES = ByteTokenizer([bytes([value]) for value in range(256)])
EOS = 256
WORDS = [
    "plain",
    "naïve",
    "日本語",
    "👩‍👩‍👧‍👦",
    "🇫🇷",
    "e\u0301",
    "\n\t",
    " ",
    "Ω≈ç√",
    "\U0001d518",
    "",
    "\x00",
    "ﷺ",
]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A real byte-level tokenizer: one token a byte."""
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(directory)
    return open_tokenizer(directory, family="llama")


def streamed(tokenizer, token_ids):
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in token_ids), detokenizer.pending()]


def random_text(generator):
    return "".join(generator.choices(WORDS, k=generator.randint(0, 12)))


def cut(data, generator):
    """Cut bytes into runs of 1 to 5: a tokenizer of just these pieces, and the token ids."""
    pieces = []
    while data:
        size = generator.randint(1, 5)
        pieces.append(data[:size])
        data = data[size:]
    return ByteTokenizer(pieces), list(range(len(pieces)))


@pytest.mark.parametrize("seed", range(40))
def test_characters_split_over_tokens_come_whole(seed):
    generator = random.Random(seed)
    text = random_text(generator)
    for tokenizer, token_ids in (cut(text.encode(), generator), (BYTES, list(text.encode()))):
        pieces = streamed(tokenizer, token_ids)
        assert "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces)


def test_the_real_byte_level_tokenizer_gives_whole_characters(byte_level):
    text = "".join(WORDS) * 3
    pieces = streamed(byte_level, byte_level.encode(text))
    assert "".join(pieces) == text
    assert len([piece for piece in pieces if piece]) > 20, "text comes as it is made, not at the end"


@pytest.mark.parametrize("seed", range(60))
def test_invalid_bytes_come_as_in_the_whole_text(seed, byte_level):
    generator = random.Random(seed)
    parts = [random_text(generator).encode(), generator.randbytes(generator.randint(1, 30))] * 2
    data = b"".join(generator.sample(parts, 4))
    for tokenizer in (BYTES, byte_level):
        assert "".join(streamed(tokenizer, list(data))) == tokenizer.decode(list(data))


def test_a_long_run_of_invalid_bytes_is_not_held_back_for_ever():
    detokenizer = Detokenizer(BYTES)
    shown = "".join(detokenizer.push(0xFF) for _ in range(100))
    assert len(shown) >= 80


def test_a_character_after_a_long_run_of_invalid_bytes_comes_whole():
    for count in range(5, 30):
        data = b"\xff" * count + "😀 é".encode()
        assert "".join(streamed(BYTES, list(data))) == "\ufffd" * count + "😀 é"


def test_text_comes_with_the_token_that_completes_it():
    detokenizer = Detokenizer(BYTES)
    assert [detokenizer.push(byte) for byte in "aé€b".encode()] == ["a", "", "é", "", "", "€", "b"]
    assert detokenizer.pending() == ""


def test_the_work_per_token_does_not_grow_with_the_answer():
    class Counting(ByteTokenizer):
        longest = 0

        def decode(self, token_ids, *, special=False):
            self.longest = max(self.longest, len(token_ids))
            return super().decode(token_ids)

    tokenizer = Counting(BYTES.pieces)
    streamed(tokenizer, list(("→ ascii \udcff" * 60).encode(errors="surrogateescape")))
    assert tokenizer.longest <= 40


# --- answers ----------------------------------------------------------------------------------------------------

CASES = {
    "runs to the limit": ("abcdef", (), 4, "abcd", "length", 4),
    "end token": ("ab\x00cd", (), 9, "ab", "stop", 3),
    "end token first": ("\x00abc", (), 9, "", "stop", 1),
    "end token as the last allowed": ("abc\x00d", (), 4, "abc", "stop", 4),
    "end token just beyond the limit": ("abc\x00d", (), 3, "abc", "length", 3),
    "stop string in one token": ("ab.cd", (".",), 9, "ab", "stop", 3),
    "stop string over tokens": ("abENDcd", ("END",), 9, "ab", "stop", 5),
    "stop string first": ("ENDcd", ("END",), 9, "", "stop", 3),
    "stop string as the last allowed": ("abEND", ("END",), 5, "ab", "stop", 5),
    "stop string cut by the limit": ("abENDcd", ("END",), 4, "abEN", "length", 4),
    "stop string cut by an end token": ("abEN\x00", ("END",), 9, "abEN", "stop", 5),
    "start of a stop string that goes on otherwise": ("abENdENDx", ("END",), 9, "abENd", "stop", 8),
    "overlapping start": ("EENDx", ("END",), 9, "E", "stop", 4),
    "start inside the start": ("aabaabaac", ("aabaac",), 99, "aab", "stop", 9),
    "earliest of two": ("abcXYdef", ("def", "XY"), 99, "abc", "stop", 5),
    "both end at one token, the longer counts": ("abcd", ("bcd", "cd"), 99, "a", "stop", 4),
    "one stop inside another": ("xaby", ("abc", "b"), 99, "xa", "stop", 3),
    "stop string of many bytes": ("ab→c", ("→",), 99, "ab", "stop", 5),
    "stop of half-held characters": ("ab→→c", ("→→",), 99, "ab", "stop", 8),
    "limit inside a character": ("a→b", (), 2, "a\ufffd", "length", 2),
    "end token inside a character": ("a\udce2\x00", (), 9, "a\ufffd", "stop", 3),
    "one token allowed": ("abc", (), 1, "a", "length", 1),
    "line end": ("one\ntwo", ("\n",), 99, "one", "stop", 4),
}


def ids(text):
    """Bytes as tokens; NUL stands for the end token, lone surrogates for raw bytes."""
    return [EOS if byte == 0 else byte for byte in text.encode(errors="surrogateescape")]


def answered(text, stop, limit, block, tokenizer=BYTES):
    """(text deltas, finish reason, tokens taken) when tokens arrive in blocks of `block`."""
    answer = AnswerText(tokenizer, eos_ids={EOS}, stop=stop, max_new_tokens=limit)
    deltas = []
    for number, token in enumerate(ids(text), start=1):
        finish = answer.feed(token)
        if finish or number % block == 0:
            deltas.append(answer.take())
        if finish:
            return deltas, finish, number
    return deltas, None, number


@pytest.mark.parametrize("block", [1, 2, 3, 4, 99])
@pytest.mark.parametrize("name", CASES)
def test_answers_end_where_they_should_however_tokens_arrive(name, block):
    text, stop, limit, expected, finish, count = CASES[name]
    deltas, found, taken = answered(text, stop, limit, block)
    assert ("".join(deltas), found, taken) == (expected, finish, count)


@pytest.mark.parametrize("name", CASES)
def test_nothing_shown_is_ever_taken_back(name):
    text, stop, limit, expected, _, _ = CASES[name]
    shown = ""
    for delta in answered(text, stop, limit, 1)[0]:
        shown += delta
        assert expected.startswith(shown)


def test_text_that_may_begin_a_stop_string_waits():
    answer = AnswerText(BYTES, eos_ids=(), stop=("END", "E!"), max_new_tokens=99)
    shown = []
    for token in b"aENE!":
        answer.feed(token)
        shown.append(answer.take())
    assert shown == ["a", "", "", "EN", ""]


def test_what_was_taken_is_not_given_again():
    answer = AnswerText(BYTES, eos_ids=(), stop=(), max_new_tokens=9)
    answer.feed(97)
    assert (answer.take(), answer.take()) == ("a", "")


def test_without_stop_strings_nothing_is_held_back():
    deltas, _, _ = answered("abcd", (), 9, 1)
    assert deltas == list("abcd")


def test_end_tokens_have_no_text(byte_level):
    """Special tokens are not shown, whichever of several it is."""
    ends = range(256, 256 + len(SPECIAL_TOKENS))
    for end in ends:
        answer = AnswerText(byte_level, eos_ids=ends, stop=(), max_new_tokens=9)
        assert [answer.feed(token) for token in (*b"hi", end)] == [None, None, "stop"]
        assert answer.take() == "hi"


@pytest.mark.parametrize("seed", range(30))
def test_stop_strings_are_found_as_in_the_whole_text(seed):
    """Against the definition: the text before the earliest end of a stop string, over a small alphabet."""
    generator = random.Random(seed)
    text = "".join(generator.choices("ab→", k=40))
    stop = tuple("".join(generator.choices("ab→", k=generator.randint(2, 5))) for _ in range(3))
    ends = [(text.find(item) + len(item), text.find(item)) for item in stop if item in text]
    end = min((end for end, _ in ends), default=None)
    cut_at = min((at for stop_end, at in ends if stop_end == end), default=len(text))
    for block in (1, 3, 200):
        deltas, finish, _ = answered(text, stop, 10_000, block)
        shown = "".join(deltas)
        assert finish == ("stop" if ends else None)
        assert shown == text[:cut_at] if ends else text.startswith(shown)
