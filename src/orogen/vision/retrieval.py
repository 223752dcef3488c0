"""Captions of similar images, without those that would give an example's own answer away.

Letters: b queries, e embedding, k neighbours.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np

from orogen.vision.database import QUERIES, Database, Hit

FETCHED = 4  # neighbours fetched per neighbour wanted, at first, if some may be left out


def retrieve(
    database: Database, query_be: np.ndarray, k: int, *, guard: float | None = None,
    captions: Sequence[str | None] | None = None,
) -> list[list[Hit]]:  # fmt: skip
    """The k nearest entries of each query, best first.

    guard: the copy guard of training (Re-ViLM, arXiv:2302.04858): an entry whose score is at least this is a near-copy
    of the image and is left out, and so is one whose caption is the query's own, whatever its case and spaces.
    captions: the queries' own; None: not known. Fewer than k remain if the database has no more, or an index that is
    not exact does not reach them.
    """
    captions = [None] * len(query_be) if captions is None else captions
    if guard is None and not any(captions):
        return database.search(query_be, k)
    found: list[list[Hit]] = []
    for start in range(0, len(query_be), QUERIES):
        stop = start + QUERIES
        found += _retrieved(database, query_be[start:stop], k, guard, captions[start:stop])
    return found


def _retrieved(
    database: Database, query_be: np.ndarray, k: int, guard: float | None, captions: Sequence[str | None]
) -> list[list[Hit]]:
    """Fetches more and more neighbours of the queries that have too few."""
    found: list[list[Hit]] = [[] for _ in captions]
    wanted, waiting = min(FETCHED * k, len(database)), list(range(len(captions)))
    while waiting:
        for number, hits in zip(waiting, database.search(query_be[waiting], wanted), strict=True):
            found[number] = [hit for hit in hits if not copies(hit, guard, captions[number])][:k]
        if wanted >= len(database):
            break
        waiting = [number for number in waiting if len(found[number]) < k]
        wanted = min(2 * wanted, len(database))
    return found


def copies(hit: Hit, guard: float | None, caption: str | None) -> bool:
    """Whether an entry is a near-copy of a query with this caption."""
    alike = guard is not None and hit.score >= guard
    return alike or (caption is not None and plain(hit.caption) == plain(caption))


def plain(text: str) -> str:
    """The words of a caption, without case, punctuation at its ends, or the number of spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .,;:!?")
