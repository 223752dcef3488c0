"""Logistic regression on hashed n-grams of words.

A document is the set of its n-grams of 1 to `ngrams` words, each hashed into one of `features` buckets, scaled to unit
norm. Training minimises the mean log loss plus `penalty` times the squared norm, both kinds of text weighing the same,
with L-BFGS: one optimum, so the order of the documents does not matter beyond rounding.
Letters: n documents, f features.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from orogen.config.curate import ClassifyConfig
from orogen.data.curate.words import ngram_hashes, word_hashes

Weights = NDArray[np.float64]


class Quality(NamedTuple):
    """On held-out documents: the share that is on the right side of the threshold, and the area under the ROC curve."""

    accuracy: float
    area: float


def features(text: str, config: ClassifyConfig) -> NDArray[np.int64]:
    """The different buckets of the text's n-grams, sorted."""
    hashes_w = word_hashes(text)
    hashes = [ngram_hashes(hashes_w, n) for n in range(1, config.ngrams + 1)]
    return np.unique(np.concatenate(hashes) % np.uint64(config.features)).astype(np.int64)


def train(texts: Sequence[str], good_n: NDArray[np.bool_], config: ClassifyConfig) -> Weights:
    """The weights (f + 1,); the last one is the constant term. Both kinds need at least one text."""
    from scipy.optimize import minimize

    matrix_nf = _matrix([features(text, config) for text in texts], config)
    sign_n = np.where(good_n, 1.0, -1.0)
    weight_n = np.where(good_n, 0.5 / good_n.sum(), 0.5 / (~good_n).sum())

    def objective(weights: Weights) -> tuple[float, Weights]:
        margin_n = sign_n * (matrix_nf @ weights[:-1] + weights[-1])
        loss = weight_n @ np.logaddexp(0, -margin_n) + config.penalty * weights[:-1] @ weights[:-1]
        slope_n = -weight_n * sign_n / (1 + np.exp(np.minimum(margin_n, 700)))
        return loss, np.r_[matrix_nf.T @ slope_n + 2 * config.penalty * weights[:-1], slope_n.sum()]

    return minimize(objective, np.zeros(config.features + 1), jac=True, method="L-BFGS-B").x


def probability(text: str, weights: Weights, config: ClassifyConfig) -> float:
    """The probability that the text is good."""
    buckets = features(text, config)
    score = weights[buckets].sum() / max(len(buckets), 1) ** 0.5 + weights[-1]
    return float(1 / (1 + np.exp(-np.clip(score, -700, 700))))


def quality(probability_n: NDArray[np.float64], good_n: NDArray[np.bool_], threshold: float) -> Quality:
    """How well probabilities tell good texts from bad ones; NaN for the area if one kind is missing."""
    from scipy.stats import rankdata

    accuracy = float(((probability_n >= threshold) == good_n).mean())
    good, bad = int(good_n.sum()), int((~good_n).sum())
    if not good or not bad:
        return Quality(accuracy, float("nan"))
    ranks = rankdata(probability_n)[good_n].sum() - good * (good + 1) / 2
    return Quality(accuracy, float(ranks / (good * bad)))


def _matrix(rows: Sequence[NDArray[np.int64]], config: ClassifyConfig) -> Any:
    from scipy.sparse import csr_array

    values = np.concatenate([np.full(len(row), max(len(row), 1) ** -0.5) for row in rows])
    starts = np.cumsum([0, *map(len, rows)])
    return csr_array((values, np.concatenate(rows), starts), shape=(len(rows), config.features))
