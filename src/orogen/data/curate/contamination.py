"""Evaluation text in documents: matches of n-grams of words, around which a document is split.

Source: MT-NLG (arXiv:2201.11990, section 3.1); the numbers are those of Megatron-LM's filter_ngrams tool.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from orogen.config.curate import DecontaminateConfig
from orogen.data.curate.words import WORD, ngram_hashes, word_hashes

SENTENCE_ENDS = ".!?"


class Hit(NamedTuple):
    """A match in characters of the document, from `start` to before `end`."""

    start: int
    end: int
    ngram: str


class Split(NamedTuple):
    """What is left of a document: its pieces, as (start, end) in characters, and how often it was split."""

    pieces: list[tuple[int, int]]
    splits: int


def ngrams_of(texts: Iterable[str], config: DecontaminateConfig) -> list[str]:
    """The different n-grams of evaluation texts, as words in lower case with single spaces, sorted."""
    found: set[str] = set()
    for text in texts:
        words = [word.lower() for word in WORD.findall(text)]
        if len(words) >= config.shortest:
            n = min(config.words, len(words))
            found.update(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
    return sorted(found)


class Index:
    """N-grams to look for. Candidates are found by hash and confirmed by their words."""

    def __init__(self, ngrams: Iterable[str]):
        by_length: dict[int, list[str]] = defaultdict(list)
        for ngram in ngrams:
            by_length[ngram.count(" ") + 1].append(ngram)
        self._ngrams = {n: frozenset(found) for n, found in sorted(by_length.items())}
        self._hashes = {
            n: np.unique([ngram_hashes(word_hashes(ngram), n)[0] for ngram in found])
            for n, found in self._ngrams.items()
        }

    def hits(self, text: str) -> list[Hit]:
        """The matches in the text, by their starts; of those with one start, the shortest comes first."""
        hashes_w = word_hashes(text)
        found: list[Hit] = []
        spans: list[tuple[int, int]] = []
        for n, known in self._hashes.items():
            indices = np.flatnonzero(np.isin(ngram_hashes(hashes_w, n), known))
            if len(indices) and not spans:
                spans = [match.span() for match in WORD.finditer(text)]
            for index in indices.tolist():
                ngram = " ".join(text[start:end].lower() for start, end in spans[index : index + n])
                if ngram in self._ngrams[n]:
                    found.append(Hit(spans[index][0], spans[index + n - 1][1], ngram))
        return sorted(found)


def split(text: str, hits: Iterable[Hit], config: DecontaminateConfig) -> Split:
    """Cuts each hit out, with `margin` characters on each side and on to the end of the sentence there.

    A hit that begins in what an earlier one removed is gone with it, and not a split. Pieces shorter than
    `min_characters` are left out.
    """
    pieces, splits, start = [], 0, 0
    for hit in hits:
        if hit.start < start:
            continue
        splits += 1
        pieces.append((start, _sentence_before(text, start, hit.start - config.margin)))
        start = _sentence_after(text, hit.end + config.margin)
    pieces.append((start, len(text)))
    return Split([(a, b) for a, b in pieces if b > a and b - a >= config.min_characters], splits)


def _sentence_before(text: str, start: int, end: int) -> int:
    """Behind the last end of a sentence in text[start:end + 1]; `start` if there is none."""
    return start + max((text[start : max(end + 1, start)].rfind(mark) + 1 for mark in SENTENCE_ENDS), default=0)


def _sentence_after(text: str, start: int) -> int:
    """Behind the first end of a sentence from `start` on; the end of the text if there is none."""
    found = [place + 1 for mark in SENTENCE_ENDS if (place := text.find(mark, start)) >= 0]
    return min(found, default=len(text))
