"""The most similar pairs of a corpus, for few-shot examples. Letters: n pairs, e embedding, m known pairs."""

from collections.abc import Sequence

import numpy as np

from orogen.vision.database import unit
from orogen.vision.retrieval import plain

BLOCK = 1024  # pairs that are compared at a time


def similar_pairs(
    embedding_ne: np.ndarray, captions: Sequence[str], known: Sequence[int], count: int, *, guard: float | None
) -> list[list[int]]:
    """For each pair, the numbers of the `count` most similar of the `known` ones, the least similar first, so that the
    most similar stands next to the example (Re-ViLM, arXiv:2302.04858).

    Left out: the pair itself, images of at least the cosine `guard`, and equal captions. Fewer if no more are left.
    """
    unit_ne, known_m = unit(np.asarray(embedding_ne)), np.asarray(known, np.int64)
    texts = [plain(caption) for caption in captions]
    found: list[list[int]] = []
    for start in range(0, len(unit_ne), BLOCK):
        score_nm = unit_ne[start : start + BLOCK] @ unit_ne[known_m].T
        for number, score_m in enumerate(score_nm, start):
            chosen: list[int] = []
            for place in np.argsort(-score_m, kind="stable"):
                other = int(known_m[place])
                copy = (
                    other == number or texts[other] == texts[number] or (guard is not None and score_m[place] >= guard)
                )
                if not copy:
                    chosen.append(other)
                if len(chosen) == count:
                    break
            found.append(chosen[::-1])
    return found
