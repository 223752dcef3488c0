"""Words of a text as 64-bit hashes, and n-grams of words hashed from them.

A word is a run of letters, digits and underscores, in lower case. Hashes are functions of the word alone, equal in
every process. Letters: w words, g n-grams.
"""

import re
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

WORD = re.compile(r"\w+")
MAX_CACHED = 2**20  # words: about 150 MB, with which texts of many languages would otherwise fill the memory
_STEP = np.uint64(0x100000001B3)  # odd, so that each word of an n-gram stays in all bits of the product
_MIX = np.uint64(0x9E3779B97F4A7C15)


class _Cache(dict[str, int]):
    """Hashes by word as it is written; words in different cases have one hash."""

    def __missing__(self, word: str) -> int:
        if len(self) >= MAX_CACHED:
            self.clear()
        digest = blake2b(word.lower().encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return self.setdefault(word, int.from_bytes(digest, "little"))


_CACHE = _Cache()


def word_hashes(text: str) -> Hashes:
    """One hash per word of the text, in order: uint64 (w,)."""
    words = WORD.findall(text)
    return np.fromiter(map(_CACHE.__getitem__, words), np.uint64, len(words))


def ngram_hashes(hashes_w: Hashes, n: int) -> Hashes:
    """One hash per n consecutive words, in order: uint64 (max(w - n + 1, 0),)."""
    count = len(hashes_w) - n + 1
    if count < 1:
        return np.empty(0, np.uint64)
    sum_g = hashes_w[:count].copy()
    for i in range(1, n):  # modulo 2^64: numpy's arrays wrap around
        sum_g *= _STEP
        sum_g += hashes_w[i : i + count]
    sum_g ^= sum_g >> np.uint64(31)
    sum_g *= _MIX
    sum_g ^= sum_g >> np.uint64(29)
    return sum_g


def shingles(text: str, n: int) -> NDArray[np.uint32]:
    """The text's n-grams of words as 32-bit hashes, in order, repeated ones included: uint32 (g,).

    A text with fewer words is one shingle; a text without words has none. Two different shingles of a document with
    10,000 of them agree by accident with a probability of 1 %.
    """
    hashes_w = word_hashes(text)
    return (ngram_hashes(hashes_w, min(n, max(len(hashes_w), 1))) >> np.uint64(32)).astype(np.uint32)
