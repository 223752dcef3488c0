"""Byte baselines: Witten-Bell by hand and against a version with dictionaries, and the compressors' sizes."""

import collections
import lzma
import math
import zlib

import numpy as np
import pytest

from orogen.evaluate import ngram


def brute_force(text: bytes, order: int, document: bytes, position: int) -> float:
    """P(document[position]) from the recursion and dictionaries of counts, one byte at a time."""
    probability = 1 / 256
    for length in range(1, min(order, position + 1) + 1):
        history, byte = document[position - length + 1 : position], document[position]
        followers = collections.Counter(
            text[i + length - 1] for i in range(len(text) - length + 1) if text[i : i + length - 1] == history
        )
        if followers:
            total, distinct = sum(followers.values()), len(followers)
            probability = (followers[byte] + distinct * probability) / (total + distinct)
    return probability


def random_text(*, length: int, letters: int, seed: int) -> bytes:
    return np.random.default_rng(seed).integers(0, letters, length, np.uint8).tobytes()


def test_abab_by_hand():
    """Text "abab": c(a) = c(b) = 2, T = 2; after a comes b twice, T(a) = 1; after b comes a once, T(b) = 1."""
    model = ngram.fit(b"abab", order=2)
    first = (2 + 2 / 256) / (4 + 2)  # P_1(a) = P_1(b)
    after_a = (2 + 1 * first) / (2 + 1)  # P_2(b | a)
    other = (0 + 2 / 256) / (4 + 2)  # P_1(x)
    after_b = (0 + 1 * other) / (1 + 1)  # P_2(x | b)
    np.testing.assert_allclose(ngram.byte_probabilities(model, [b"abx"]), [first, after_a, after_b], rtol=1e-14)
    expected = -(math.log2(first) + math.log2(after_a) + math.log2(after_b)) / 3
    assert ngram.bits_per_byte(model, [b"abx"]) == pytest.approx(expected, rel=1e-14)


def test_unseen_history_backs_off_entirely():
    model = ngram.fit(b"abab", order=2)
    after_unseen, alone = ngram.byte_probabilities(model, [b"xa", b"a"])[1:]
    assert after_unseen == alone


def test_order_one_ignores_history():
    model = ngram.fit(b"aab", order=1)
    a, b = (2 + 2 / 256) / (3 + 2), (1 + 2 / 256) / (3 + 2)
    np.testing.assert_allclose(ngram.byte_probabilities(model, [b"aba"]), [a, b, a], rtol=1e-14)


@pytest.mark.parametrize("order", [1, 2, 5, 7])
def test_every_distribution_sums_to_one(order: int):
    model = ngram.fit(random_text(length=3000, letters=5, seed=0) + bytes(range(256)), order)
    for seed in range(5):
        history = random_text(length=seed * 2, letters=7, seed=seed)
        ends = np.cumsum([len(history) + 1] * 256) - 1
        p = ngram.byte_probabilities(model, [history + bytes([byte]) for byte in range(256)])[ends]
        assert p.min() > 0
        assert p.sum() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("order", "letters"), [(1, 3), (3, 4), (5, 3), (7, 2), (5, 256)])
def test_equals_the_dictionary_version(order: int, letters: int):
    text = random_text(length=400, letters=letters, seed=1)
    # The second document has a letter, and so histories, that the text lacks; one is empty, two are short.
    documents = [random_text(length=n, letters=min(256, letters + 1), seed=n) for n in (2, 60, 0, 1)]
    expected = [brute_force(text, order, document, i) for document in documents for i in range(len(document))]
    np.testing.assert_allclose(ngram.byte_probabilities(ngram.fit(text, order), documents), expected, rtol=1e-12)


def test_bytes_above_127_keep_keys_positive():
    """Seven bytes of 255 fill 56 bits; if they reached the sign bit, shifts and sorted search would go wrong."""
    text = b"\xff" * 50
    document = b"\xff" * 9
    expected = [brute_force(text, 7, document, i) for i in range(9)]
    np.testing.assert_allclose(ngram.byte_probabilities(ngram.fit(text, 7), [document]), expected, rtol=1e-12)


def test_a_document_does_not_see_the_one_before():
    model = ngram.fit(random_text(length=500, letters=3, seed=2), order=4)
    one, two = random_text(length=20, letters=3, seed=3), random_text(length=30, letters=3, seed=4)
    apart = np.concatenate([ngram.byte_probabilities(model, [document]) for document in (one, two)])
    np.testing.assert_array_equal(ngram.byte_probabilities(model, [one, two]), apart)


def test_all_documents_shorter_than_the_order():
    model = ngram.fit(b"abcabcabc", order=7)
    assert len(ngram.byte_probabilities(model, [b"a", b"bc"])) == 3


@pytest.mark.parametrize("order", [0, 8])
def test_an_order_that_does_not_fit_the_key_is_refused(order: int):
    with pytest.raises(ValueError, match=f"order is {order}, expected 1 to 7"):
        ngram.fit(b"a" * 20, order)


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="text has 4 bytes, expected at least order = 5"):
        ngram.fit(b"abcd")
    with pytest.raises(ValueError, match="hold no bytes"):
        ngram.bits_per_byte(ngram.fit(b"abcde"), [b""])
    with pytest.raises(ValueError, match="hold no bytes"):
        ngram.compressed_bits_per_byte([])


def test_compressors_see_the_documents_as_one_text():
    documents = [b"strata folded into strata " * 30, b"strata folded again " * 40]
    joined = b"".join(documents)
    sizes = ngram.compressed_bits_per_byte(documents)
    packed = zlib.compress(joined, level=9), lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)
    assert list(sizes) == ["zlib of the held-out text alone", "xz of the held-out text alone"]
    assert list(sizes.values()) == [len(p) * 8 / len(joined) for p in packed]
