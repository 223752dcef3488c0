"""The most similar pairs of a corpus, for few-shot examples.

Letters: n pairs, b queries, e embedding, m known pairs, p vectors of an image, v their width.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from orogen.config.checks import ConfigError
from orogen.vision.database import unit
from orogen.vision.examples import Pair
from orogen.vision.features import Document, Encoded
from orogen.vision.retrieval import plain

BLOCK = 1024  # pairs that are compared at a time


class Shot(NamedTuple):
    """An example: its caption and its image's features."""

    caption: str
    features_pv: np.ndarray


def similar_pairs(
    embedding_ne: np.ndarray, captions: Sequence[str], known: Sequence[int], count: int, *, guard: float | None,
    guarded: Collection[int] | None = None,
) -> list[list[int]]:  # fmt: skip
    """For each pair, the numbers of the `count` most similar of the `known` ones, the least similar first, so that the
    most similar stands next to the example (Re-ViLM, arXiv:2302.04858).

    Left out: the pair itself, images of at least the cosine `guard`, and equal captions. guarded: the numbers of the
    pairs for which images and captions are left out; None: all. Fewer than `count` if no more are left.
    """
    guards = set(range(len(captions)) if guarded is None else guarded)
    unit_ne, known_m = unit(np.asarray(embedding_ne)), np.asarray(known, np.int64)
    texts = [plain(caption) for caption in captions]

    def left_out(number: int, index: int, score: float) -> bool:
        other = int(known_m[index])
        copy = texts[other] == texts[number] or (guard is not None and score >= guard)
        return other == number or (copy and number in guards)

    found = nearest(unit_ne, unit_ne[known_m], count, left_out)
    return [[int(known_m[index]) for index in indices] for indices in found]


def nearest(
    query_be: np.ndarray, known_me: np.ndarray, count: int, left_out: Callable[[int, int, float], bool]
) -> list[list[int]]:
    """For each query, the indices of the `count` most similar known embeddings, the least similar first. Embeddings
    have length 1. left_out: (query, index, cosine) -> whether it is passed over."""
    found: list[list[int]] = []
    for start in range(0, len(query_be), BLOCK):
        score_bm = query_be[start : start + BLOCK] @ known_me.T
        for number, score_m in enumerate(score_bm, start):
            chosen: list[int] = []
            for index in np.argsort(-score_m, kind="stable"):
                if len(chosen) == count:
                    break
                if not left_out(number, int(index), float(score_m[index])):
                    chosen.append(int(index))
            found.append(chosen[::-1])
    return found


class Examples:
    """Pairs of a corpus that can stand before an image as few-shot examples."""

    def __init__(self, encoded: Encoded):
        pairs = [pair for document in encoded.documents if (pair := as_pair(document)) is not None]
        if not pairs:
            raise ConfigError("the corpus of examples has no image with one caption; expected one")
        self._pairs, self._features_npv = pairs, encoded.features_npv
        self._unit_me = unit(np.asarray(encoded.embedding_ne)[[pair.image for pair in pairs]])

    def similar(self, embedding_be: np.ndarray, count: int, *, guard: float | None) -> list[list[Shot]]:
        """For each image, the most similar pairs, the least similar first, without those of at least the cosine
        `guard`."""
        left_out = lambda _, index, score: guard is not None and score >= guard  # noqa: E731
        found = nearest(unit(embedding_be), self._unit_me, count, left_out)
        return [[self._shot(self._pairs[index]) for index in indices] for indices in found]

    def _shot(self, pair: Pair) -> Shot:
        return Shot(pair.caption, np.asarray(self._features_npv[pair.image]))


def as_pair(document: Document) -> Pair | None:
    """The document as a pair, if it is an image and a text after it."""
    parts = document.parts
    if len(parts) == 2 and isinstance(parts[0], int) and isinstance(parts[1], str):
        return Pair(parts[0], parts[1])
    return None
