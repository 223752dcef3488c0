"""A run's baselines: the n-gram is fitted on exactly the text that the model was trained on, once."""

import math
from types import SimpleNamespace

import pytest
from tests.evaluate.test_ngram import brute_force
from tests.helpers import hybrid, run_config

from orogen.config.data import DataConfig
from orogen.data.loader import open_corpus
from orogen.evaluate.summary import baselines


def test_the_ngram_is_fitted_on_the_text_of_the_batches_taken(tmp_path):
    """Documents come in the order of their keys; each fills a row, so three batches of two rows hold the first six."""
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_text("".join("abcde"[number * k % 5] for k in range(1, 15)))
    data = DataConfig(corpus=str(tmp_path), tokenizer="byte", heldout_fraction=0.3, tuning_fraction=0.0, shuffle=False)
    config = run_config(hybrid(vocab_size=259), data=data, batch_size=2, sequence_length=16, ngram_order=3)
    corpus = open_corpus(data)
    seen = b"".join(document.text.encode() for document in list(corpus.splits["train"].documents)[:6])
    found = baselines(SimpleNamespace(state=SimpleNamespace(step=3), corpus=corpus), config, {})
    heldout = [document.text.encode() for document in corpus.splits["heldout"].documents]
    bits = [-math.log2(brute_force(seen, 3, text, place)) for text in heldout for place in range(len(text))]
    assert len(heldout) > 3 and len(seen) == 6 * 14
    assert found["Witten-Bell 3-gram"] == pytest.approx(sum(bits) / len(bits), rel=1e-12)
