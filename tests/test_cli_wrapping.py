"""Rows of a terminal: words are whole, cells are counted, and what belongs together stays together."""

import random

import pytest

from subspec_cli.cli.answer_rows import AnswerRows
from subspec_cli.cli.wrapping import cells, terminal_width, wrapped, wrapped_text

FAMILY, FLAG, THUMB = "👨\u200d👩\u200d👧", "🇩🇪", "👍🏽"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("word", 4),
        ("日本", 4),
        ("e\u0301", 1),
        ("한글", 4),
        ("\u1112\u1161\u11ab", 2),
        ("❤\ufe0f", 2),
        ("a\u200bb", 2),
        (FLAG, 2),
        ("👍", 2),
    ],
)
def test_cells_of_a_text(text, count):
    assert cells(text) == count


@pytest.mark.parametrize("text", [FAMILY, THUMB])
def test_a_joined_sequence_counts_as_a_terminal_that_does_not_join_shows_it(text):
    assert cells(text) == 2 * sum(cells(char) == 2 for char in text)


def test_words_stay_whole_and_longer_ones_are_cut_only_where_asked():
    assert wrapped("one two three", 8) == ["one two", "three"]
    assert wrapped("an extraordinarily long", 8) == ["an", "extraord", "inarily", "long"]
    assert wrapped("see /a/very/long/path now", 8, folds=False) == ["see", "/a/very/long/path", "now"]
    assert wrapped("    deep text", 9) == ["    deep", "text"]
    assert wrapped("one two three", 8, indent=4) == ["one two", "thre", "e"]
    assert wrapped_text("one two\n\nthree", 5) == "one\ntwo\n\nthree"


def test_east_asian_text_breaks_between_characters_but_not_before_its_marks():
    assert wrapped("日本語の文章は、空白なし。", 10) == ["日本語の文", "章は、空白", "なし。"]
    assert wrapped("あいうえ。", 8) == ["あいう", "え。"]
    assert wrapped("あいう「え」", 8) == ["あいう", "「え」"]
    assert wrapped("Pythonで書く", 8) == ["Pythonで", "書く"]
    assert wrapped("안녕하세요 여러분", 12) == ["안녕하세요", "여러분"]


def test_sequences_are_never_divided():
    for sequence in (FAMILY, FLAG, THUMB, "e\u0301", "❤\ufe0f"):
        rows = wrapped(sequence * 9, 12)
        assert all(len(row) % len(sequence) == 0 for row in rows)
        assert max(map(cells, rows)) <= 12


def test_rows_do_not_change_as_a_line_grows():
    chosen = random.Random(1)
    for _ in range(200):
        line = "".join(chosen.choice(f"ab  cd日本。「」、é{FAMILY}{FLAG}-") for _ in range(40))
        width, indent = chosen.randint(11, 18), chosen.randint(0, 2)
        rows = wrapped(line, width, indent=indent)
        assert "".join(rows).replace(" ", "") == line.replace(" ", "")
        assert all(cells(row.rstrip()) <= width for row in rows)
        for end in range(len(line)):
            begun = wrapped(line[:end], width, indent=indent)
            assert begun[:-1] == rows[: len(begun) - 1]


def test_the_width_of_a_terminal(monkeypatch, tmp_path):
    with (tmp_path / "file").open("w") as stream:
        monkeypatch.setenv("COLUMNS", "33")
        assert terminal_width(stream) == 33
        monkeypatch.setenv("COLUMNS", "0")
        assert terminal_width(stream) == 80


MARKDOWN = """\
# A heading that is longer than the row

Some **strong words that go on** and `code with *stars*` here.

- a point that needs more than one row
  10. another one with ```inline``` code in it
> quoted words of somebody else, too long

2 ** 3 ** 4 and *args

```python
def function(argument):  # longer than the row is
    return "**not strong**"
```
after"""


def rows_of(text, width=24, size=1):
    answer, rows = AnswerRows(), []
    for at in range(0, len(text), size):
        rows += answer.feed(text[at : at + size], width)
    return [*rows, answer.unfinished()]


def shown(rows):
    return ["".join(span.text for span in row) for row in rows]


WRAPPED = """\
# A heading that is
longer than the row

Some **strong words that
go on** and `code with
*stars*` here.

- a point that needs
  more than one row
  10. another one with
      ```inline``` code
      in it
> quoted words of
  somebody else, too
  long

2 ** 3 ** 4 and *args

```python
def function(argument):  # longer than the row is
    return "**not strong**"
```
after"""


def test_an_answer_is_wrapped_and_its_code_is_not():
    assert "\n".join(shown(rows_of(MARKDOWN))) == WRAPPED


@pytest.mark.parametrize("size", [2, 3, 7, 1000])
def test_pieces_of_any_size_give_the_same_rows(size):
    assert [list(row) for row in rows_of(MARKDOWN, size=size)] == [list(row) for row in rows_of(MARKDOWN)]


def styles_of(text, width=60):
    found = {}
    for row in rows_of(text, width):
        for span in row:
            found.setdefault(span.style, []).append(span.text)
    return found


def test_parts_of_markdown_are_told_apart():
    found = styles_of(MARKDOWN)
    assert found["heading"] == ["# A heading that is longer than the row"]
    assert found["strong"] == ["strong words that go on"]
    assert found["code"][:2] == ["code with *stars*", "inline"]
    assert found["code"][2:] == [
        "def function(argument):  # longer than the row is",
        '    return "**not strong**"',
    ]
    assert found["mark"] == ["**", "**", "`", "`", "```", "```", "```python", "```"]
    assert "2 ** 3 ** 4 and *args" in found["text"]
    assert "after" in found["text"]


def test_marks_stay_open_over_rows_but_not_over_lines():
    rows = rows_of("all **of this is strong** not `this\nplain", 12)
    strong = [span.text for row in rows for span in row if span.style == "strong"]
    assert strong == ["of", "this is", "strong"]
    assert rows[-1] == (("plain", "text"),)


@pytest.mark.parametrize(
    ("opened", "within", "closed"),
    [("```", "~~~", "```"), ("```", "``", "````"), ("~~~~", "~~~", "~~~~"), ("   ```x", "``` y", "  ``` ")],
)
def test_a_block_of_code_ends_with_a_fence_like_its_own(opened, within, closed):
    rows = rows_of(f"{opened}\n{within}\na b c d e f\n{closed}\na b c d e f", 6)
    assert [span.style for row in rows for span in row if "a b" in span.text] == ["code", "text"]
    assert shown(rows)[2] == "a b c d e f"


def test_spaces_at_the_end_of_a_line_make_no_row():
    assert shown(rows_of("twelve cells  \n\nnext", 12)) == ["twelve cells", "", "next"]
    assert shown(rows_of("one two     three", 7, size=2)) == ["one two", "three"]


def test_a_tab_has_four_cells_in_words_and_stays_in_code():
    assert shown(rows_of("a\tb\n```\n\tc\n```", 12)) == ["a    b", "```", "\tc", "```"]
