"""Guesses for the draft: the latest continuation of the longest match, and a record of how often it is right."""

import pytest

from subspec_cli.drafting.ngram import NGramLookup


def tokens(guesses):
    return [guess.token_id for guess in guesses]


def learned(*token_ids):
    lookup = NGramLookup()
    lookup.learn(token_ids)
    return lookup


def test_what_followed_the_longest_match_is_guessed():
    lookup = learned(1, 2, 3, 4, 9, 3, 5)
    assert tokens(lookup.guesses([2, 3], 1)) == [4]
    assert tokens(lookup.guesses([9, 3], 1)) == [5]
    assert tokens(lookup.guesses([7, 3], 1)) == [5], "the latest of equals"
    assert [guess.order for guess in lookup.guesses([1, 2, 3], 1)] == [3]


def test_guesses_go_on_one_after_another():
    lookup = learned(1, 2, 3, 4, 5)
    assert tokens(lookup.guesses([0, 1], 3)) == [2, 3, 4]
    assert tokens(lookup.guesses([4], 9)) == [5]
    assert lookup.guesses([5], 4) == []
    assert lookup.guesses([], 4) == []
    assert lookup.guesses([1], 0) == []


def test_text_is_taken_in_as_it_grows():
    grown, whole = NGramLookup(), learned(1, 2, 1, 3, 1, 2)
    for end in (1, 2, 4, 6):
        grown.learn([1, 2, 1, 3, 1, 2][:end])
    for context in ([1], [2, 1], [3, 1], [1, 2, 1]):
        assert grown.guesses(context, 4) == whole.guesses(context, 4)


def test_another_answer_begins_without_the_last_ones_text():
    lookup = learned(1, 2, 3)
    lookup.forget()
    assert lookup.guesses([1], 1) == []
    lookup.learn([1, 5])
    assert tokens(lookup.guesses([1], 1)) == [5]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_record_of_guesses_is_kept_by_the_length_of_the_match(share):
    lookup = learned(1, 2, 3, 4, 5)
    (long,) = lookup.guesses([1, 2, 3], 1)
    (short,) = lookup.guesses([9, 3], 1)
    for n in range(200):
        lookup.observe(long, right=n % 2 < 2 * share)
    assert lookup.guesses([1, 2, 3], 1)[0].chance == pytest.approx(share, abs=0.05)
    assert lookup.guesses([9, 3], 1)[0].chance == short.chance
