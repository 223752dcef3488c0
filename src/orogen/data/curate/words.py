"""Words of a text as 64-bit hashes, and n-grams of words hashed from them.

A word is a run of letters, digits and underscores, in lower case. Its hash is a polynomial in the bytes of its UTF-8,
mixed: the same in every process, and for ASCII computed from sums over the whole text, without an object per word.
Letters: c bytes, w words, g n-grams.
"""

import functools
import re

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

WORD = re.compile(r"\w+")
MAX_CACHED = 2**20  # words: about 150 MB, with which texts of many languages would otherwise fill the memory
MAX_SUMMED = 2**20  # bytes of a text whose sums are taken at once: bounds the tables of powers
_BASE = 0x100000001B3  # odd, so that it has an inverse modulo 2^64
_MIX = np.uint64(0x9E3779B97F4A7C15)
# By byte of ASCII: a letter in lower case, a digit or an underscore as it is, anything else 0.
_LOWER = np.array([ord(chr(c).lower()) if WORD.match(chr(c)) and c < 128 else 0 for c in range(256)], np.uint64)


class _Cache(dict[str, int]):
    """Hashes by word as it is written; words in different cases have one hash."""

    def __missing__(self, word: str) -> int:
        if len(self) >= MAX_CACHED:
            self.clear()
        total, power = 0, 1
        for byte in word.lower().encode("utf-8", "surrogatepass"):
            total, power = (total + byte * power) % 2**64, power * _BASE % 2**64
        return self.setdefault(word, int(_mixed(np.array([total], np.uint64))[0]))


_CACHE = _Cache()


def word_hashes(text: str) -> Hashes:
    """One hash per word of the text, in order: uint64 (w,)."""
    if text.isascii() and len(text) <= MAX_SUMMED:
        return _ascii_hashes(np.frombuffer(text.encode("ascii"), np.uint8))
    words = WORD.findall(text)
    return np.fromiter(map(_CACHE.__getitem__, words), np.uint64, len(words))


def _ascii_hashes(bytes_c: NDArray[np.uint8]) -> Hashes:
    """The sum of a word's terms is a difference of two sums over the text, divided by the power of its first byte."""
    powers_c, inverses_c = _powers(1 << max(len(bytes_c) - 1, 1).bit_length())
    lower_c = _LOWER[bytes_c]
    inside_c = np.zeros(len(bytes_c) + 2, np.int8)
    inside_c[1:-1] = lower_c != 0
    edges = np.flatnonzero(np.diff(inside_c))
    starts_w, ends_w = edges[::2], edges[1::2]
    sums_c = np.zeros(len(bytes_c) + 1, np.uint64)
    np.cumsum(lower_c * powers_c[: len(bytes_c)], out=sums_c[1:])
    return _mixed((sums_c[ends_w] - sums_c[starts_w]) * inverses_c[starts_w])


@functools.cache
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """The first powers of the base and of its inverse, modulo 2^64."""
    both = []
    for base in (_BASE, pow(_BASE, -1, 2**64)):
        powers = np.full(count, base, np.uint64)
        powers[0] = 1
        both.append(np.cumprod(powers))
    return both[0], both[1]


def _mixed(hashes: Hashes) -> Hashes:
    hashes = hashes ^ (hashes >> np.uint64(31))
    hashes *= _MIX
    hashes ^= hashes >> np.uint64(29)
    return hashes


def ngram_hashes(hashes_w: Hashes, n: int) -> Hashes:
    """One hash per n consecutive words, in order: uint64 (max(w - n + 1, 0),)."""
    count = len(hashes_w) - n + 1
    if count < 1:
        return np.empty(0, np.uint64)
    sum_g = hashes_w[:count].copy()
    for i in range(1, n):  # modulo 2^64: numpy's arrays wrap around
        sum_g *= np.uint64(_BASE)
        sum_g += hashes_w[i : i + count]
    return _mixed(sum_g)


def shingles(text: str, n: int) -> NDArray[np.uint32]:
    """The text's n-grams of words as 32-bit hashes, in order, repeated ones included: uint32 (g,).

    A text with fewer words is one shingle; a text without words has none. Two different shingles of a document with
    10,000 of them agree by accident with a probability of 1 %.
    """
    hashes_w = word_hashes(text)
    return (ngram_hashes(hashes_w, min(n, max(len(hashes_w), 1))) >> np.uint64(32)).astype(np.uint32)
