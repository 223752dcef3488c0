"""The classifier against its own definition, by brute force."""

import numpy as np

from orogen.config.curate import ClassifyConfig
from orogen.data.curate.classifier import features, probability, quality, train
from orogen.data.curate.words import ngram_hashes, word_hashes

CONFIG = ClassifyConfig(good=("a",), bad=("b",), features=64, ngrams=2, penalty=1e-3)


def test_features_are_the_different_buckets_of_words_and_pairs():
    hashes = word_hashes("b a b a")
    expected = {int(h) % 64 for n in (1, 2) for h in ngram_hashes(hashes, n)}
    assert features("b a b a", CONFIG).tolist() == sorted(expected)
    assert features("", CONFIG).tolist() == []


def test_training_ends_where_the_gradient_of_the_balanced_loss_vanishes():
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(["a", "b", "c", "d", "e"], 6, p=p)) for p in ([0.3, 0.3, 0.2, 0.1, 0.1],) * 12]
    texts += [" ".join(draw.choice(["a", "b", "c", "d", "e"], 6, p=p)) for p in ([0.1, 0.1, 0.2, 0.3, 0.3],) * 5]
    good = np.arange(17) < 12
    weights = train(texts, good, CONFIG)

    def loss(w):
        total = CONFIG.penalty * float(w[:-1] @ w[:-1])
        for text, is_good in zip(texts, good, strict=True):
            buckets = features(text, CONFIG)
            score = sum(w[p] for p in buckets) / len(buckets) ** 0.5 + w[-1]
            total += np.log1p(np.exp(-score if is_good else score)) * (0.5 / 12 if is_good else 0.5 / 5)
        return total

    best = loss(weights)
    for place in [*features(texts[0], CONFIG)[:4], 64]:
        for step in (-1e-2, 1e-2):
            moved = weights.copy()
            moved[place] += step
            assert loss(moved) > best
    score = weights[features("a b", CONFIG)].sum() / len(features("a b", CONFIG)) ** 0.5 + weights[-1]
    assert np.isclose(probability("a b", weights, CONFIG), 1 / (1 + np.exp(-score)))
    assert probability("a b a b", weights, CONFIG) > 0.5 > probability("d e d e", weights, CONFIG)


def test_quality_is_the_share_of_right_answers_and_of_ordered_pairs():
    probabilities, good = np.array([0.9, 0.5, 0.5, 0.2]), np.array([True, True, False, False])
    found = quality(probabilities, good, 0.5)
    assert found.accuracy == 0.75  # 0.5 of a bad text is at the threshold, so it counts as good
    assert found.area == (1 + 1 + 0.5 + 1) / 4
    assert np.isnan(quality(probabilities[:2], good[:2], 0.5).area)
