"""Words and their hashes: one definition, by sums over ASCII and word by word, and sets of shingles as brute force."""

import random
import re

import numpy as np
import pytest

from orogen.data.curate import words
from orogen.data.curate.words import ngram_hashes, shingles, word_hashes

BASE, MIX, ALL = 0x100000001B3, 0x9E3779B97F4A7C15, 2**64 - 1


def by_hand(word: str) -> int:
    """The hash of one word with Python's integers."""
    h = sum(byte * BASE**i for i, byte in enumerate(word.lower().encode())) & ALL
    h ^= h >> 31
    h = h * MIX & ALL
    return h ^ (h >> 29)


@pytest.mark.parametrize("length", [0, 1, 2, 15, 16, 17, 200])
def test_ascii_words_are_those_of_the_regular_expression(length):
    draw = random.Random(length)
    for _ in range(20):
        text = "".join(draw.choices([chr(c) for c in range(128)] + list("aZ_9") * 30, k=length))
        assert word_hashes(text).tolist() == [by_hand(word) for word in re.findall(r"\w+", text)]


def test_words_beyond_ascii_have_the_hashes_of_their_own_bytes():
    text = "Naïve IDEAS, déjà-vu: 東京 ideas"
    expected = ["naïve", "ideas", "déjà", "vu", "東京", "ideas"]
    assert word_hashes(text).tolist() == [by_hand(word) for word in expected]


def test_a_text_too_long_for_sums_has_the_same_hashes(monkeypatch):
    text = "One two, THREE " * 20
    expected = word_hashes(text).tolist()
    monkeypatch.setattr(words, "MAX_SUMMED", 10)
    assert word_hashes(text).tolist() == expected


def test_a_full_dictionary_of_words_starts_again(monkeypatch):
    monkeypatch.setattr(words, "MAX_CACHED", 3)
    many = [f"wört{i}" for i in range(10)]
    assert word_hashes(" ".join(many)).tolist() == [by_hand(word) for word in many]


def test_ngrams_depend_on_the_order_and_the_place_of_every_word():
    a, b, c = word_hashes("a b c")
    grams = ngram_hashes(np.array([a, b, c, b, a], np.uint64), 3).tolist()
    assert len(grams) == len(set(grams)) == 3
    assert ngram_hashes(np.array([a, b, c], np.uint64), 3).tolist() == grams[:1]
    assert ngram_hashes(np.array([a, b], np.uint64), 3).shape == (0,)


def test_sets_of_shingles_have_the_jaccard_index_of_the_sets_of_words():
    draw = random.Random(0)
    left = draw.choices([f"w{i}" for i in range(40)], k=300)
    right = left[:100] + draw.choices([f"w{i}" for i in range(40)], k=50) + left[150:]

    def jaccard(a, b):
        return len(set(a) & set(b)) / len(set(a) | set(b))

    grams = [[tuple(text[i : i + 3]) for i in range(len(text) - 2)] for text in (left, right)]
    hashed = [shingles(" ".join(text), 3).tolist() for text in (left, right)]
    assert jaccard(*hashed) == jaccard(*grams)


def test_a_text_of_few_words_is_one_shingle_and_one_without_words_has_none():
    assert (
        len(shingles("a b c", 5)) == 1 and len(shingles("a b c d e", 5)) == 1 and len(shingles("a b c d e f", 5)) == 2
    )
    assert len(shingles("... !", 5)) == len(shingles("", 5)) == 0
