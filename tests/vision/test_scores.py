"""Scores of captions against pycocoevalcap 1.2 (its scorers, on words that its tokenizer leaves alone) and by hand."""

import math

import pytest

from orogen.vision.scores import bleu, caption_scores, cider, rouge_l

CAPTIONS = ["a red cat sits on the mat", "two dogs play in the park near a tree", "a bowl of soup", "a man"]
REFERENCES = [
    ["the red cat is on the mat", "a cat sits on a mat"],
    ["two dogs play in a park", "dogs run near a tree"],
    ["a bowl of hot soup on a table", "soup in a bowl"],
    ["a man rides a horse", "a person on a horse"],
]


def test_scores_are_those_of_pycocoevalcap():
    assert cider(CAPTIONS, REFERENCES) == pytest.approx(2.745136576526264, abs=1e-9)
    assert rouge_l(CAPTIONS, REFERENCES) == pytest.approx(0.6577404725523857, abs=1e-9)
    expected = [0.9545454544586777, 0.830297500454886, 0.6660347546870486, 0.4048316863868162]
    assert [bleu(CAPTIONS, REFERENCES, n) for n in (1, 2, 3, 4)] == pytest.approx(expected, abs=1e-8)


def test_repeated_words_count_only_as_often_as_the_reference_has_them():
    captions = ["cat cat cat on the mat", "two dogs", "soup soup soup"]
    references = [*REFERENCES[:2], ["a bowl of hot soup", "soup in a bowl"]]
    assert cider(captions, references) == pytest.approx(1.2822871840906997, abs=1e-9)  # pycocoevalcap's


def test_case_and_punctuation_do_not_count():
    noisy = [f"{caption.title()}!" for caption in CAPTIONS]
    assert caption_scores(noisy, REFERENCES) == caption_scores(CAPTIONS, REFERENCES)


def test_bleu_by_hand():
    # 2 of 3 words, 1 of 2 pairs; one word shorter than its reference
    expected = math.sqrt(2 / 3 * 1 / 2) * math.exp(1 - 4 / 3)
    assert bleu(["a b x"], [["a b c d"]], 2) == pytest.approx(expected, rel=1e-12)
    assert bleu(["x"], [["a"]]) == 0.0


def test_rouge_by_hand():
    # "a c" of "a b c" in "a c d e": precision 2/3, recall 1/2
    precision, recall, weight = 2 / 3, 1 / 2, 1.44
    expected = (1 + weight) * precision * recall / (recall + weight * precision)
    assert rouge_l(["a b c"], [["a c d e"]]) == pytest.approx(expected, rel=1e-12)


def test_empty_captions_score_nothing():
    assert caption_scores(["", "..."], [["a b"], ["c d"]]) == {"cider": 0, "rouge_l": 0, "bleu_1": 0, "bleu_4": 0}
