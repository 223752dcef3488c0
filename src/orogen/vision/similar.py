"""The most similar pairs of a corpus, for few-shot examples. Letters: n pairs, e embedding, m known pairs."""

from collections.abc import Collection, Sequence

import numpy as np

from orogen.vision.database import unit
from orogen.vision.retrieval import plain

BLOCK = 1024  # pairs that are compared at a time


def similar_pairs(
    embedding_ne: np.ndarray, captions: Sequence[str], known: Sequence[int], count: int, *, guard: float | None,
    guarded: Collection[int] | None = None,
) -> list[list[int]]:  # fmt: skip
    """For each pair, the numbers of the `count` most similar of the `known` ones, the least similar first, so that the
    most similar stands next to the example (Re-ViLM, arXiv:2302.04858).

    Left out: the pair itself, images of at least the cosine `guard`, and equal captions. guarded: the numbers of the
    pairs for which images and captions are left out; None: all. Fewer if no more are left.
    """
    guards = set(range(len(captions)) if guarded is None else guarded)
    unit_ne, known_m = unit(np.asarray(embedding_ne)), np.asarray(known, np.int64)
    texts = [plain(caption) for caption in captions]
    found: list[list[int]] = []
    for start in range(0, len(unit_ne), BLOCK):
        score_nm = unit_ne[start : start + BLOCK] @ unit_ne[known_m].T
        for number, score_m in enumerate(score_nm, start):
            chosen: list[int] = []
            for place in np.argsort(-score_m, kind="stable"):
                other = int(known_m[place])
                copy = texts[other] == texts[number] or (guard is not None and score_m[place] >= guard)
                if other != number and not (copy and number in guards):
                    chosen.append(other)
                if len(chosen) == count:
                    break
            found.append(chosen[::-1])
    return found
