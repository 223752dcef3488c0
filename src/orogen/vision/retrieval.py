"""Captions of similar images, without those that would give an example's own answer away.

Letters: b queries, e embedding, k neighbours.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np

from orogen.vision.database import Database, Hit

FETCHED = 4  # neighbours fetched per neighbour wanted, at first, if some may be left out


def retrieve(
    database: Database, query_be: np.ndarray, k: int, *, guard: float | None = None,
    captions: Sequence[str | None] | None = None,
) -> list[list[Hit]]:  # fmt: skip
    """The k nearest entries of each query, best first.

    guard: the copy guard of training (Re-ViLM, arXiv:2302.04858): an entry whose score is at least this is a near-copy
    of the image and is left out, and so is one whose caption is the query's own, whatever its case and spaces.
    captions: the queries' own; None: not known. Fewer than k remain only if the database has no more.
    """
    captions = [None] * len(query_be) if captions is None else captions
    if guard is None and not any(captions):
        return database.search(query_be, k)
    wanted = min(FETCHED * k, len(database))
    while True:
        found = [
            [hit for hit in hits if not copies(hit, guard, caption)][:k]
            for hits, caption in zip(database.search(query_be, wanted), captions, strict=True)
        ]
        if wanted >= len(database) or all(len(hits) == k for hits in found):
            return found
        wanted = min(2 * wanted, len(database))


def copies(hit: Hit, guard: float | None, caption: str | None) -> bool:
    """Whether an entry is a near-copy of a query with this caption."""
    alike = guard is not None and hit.score >= guard
    return alike or (caption is not None and plain(hit.caption) == plain(caption))


def plain(text: str) -> str:
    """The words of a caption, without case, punctuation at its ends, or the number of spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .,;:!?")
