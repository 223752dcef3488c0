"""Long texts in pieces: they have the ids of the whole, and no run of characters makes the library fail."""

import json
import random

import pytest
import tokenizers
from tests.data import vocabularies

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.data import long_text
from orogen.data.loader import open_corpus
from orogen.data.tokenizer import Tokenizer
from orogen.data.vocabulary import byte_tokenizer, train_bpe

WORDS = ["the ", "a b  ", " ", "漢", "x\n", "ab", "    print", "12345", "🙂", "\r\n\r\n", "<tool>"]
TEXTS = ["the quick brown fox\n    print(12)\n" * 20, "def main():\n        pass  # ab ab\n" * 20]


def tokenizer(name: str) -> Tokenizer:
    if name == "bpe":
        return train_bpe(TEXTS, vocab_size=280)
    if name == "added":
        backend = train_bpe(TEXTS, vocab_size=280)._backend
        backend.add_tokens([vocabularies.added("<tool>")])
        return Tokenizer(backend, pad="<pad>", bos="<bos>", eos="<eos>")
    return Tokenizer(vocabularies.pipelines()[name], pad="</s>", bos="<s>", eos="</s>")


NAMES = ["bpe", "added", *vocabularies.pipelines()]


@pytest.fixture
def small(monkeypatch):
    """Pieces of about 300 characters."""
    monkeypatch.setattr(long_text, "USUAL", 300)
    monkeypatch.setattr(long_text, "MOST", 1200)
    monkeypatch.setattr(long_text, "MARGIN", 24)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_give_the_ids_of_the_whole(small, name):
    made = tokenizer(name)
    for seed in range(3):
        text = "".join(random.Random(seed).choices(WORDS, k=1500))
        pieces = list(made._cutter.pieces(text))
        assert len(pieces) > 10 and "".join(pieces) == text
        whole = made._backend.encode(text, add_special_tokens=False).ids
        assert made.encode(text).tolist() == whole


@pytest.mark.parametrize("name", ["bpe", "added", "dummy prefix", "metaspace first", "unigram"])
def test_long_runs_survive(small, name):
    made = tokenizer(name)
    for unit in (" ", "a", "\n", "7", "漢", " \t", "\u200d", "e\u0301", "▁"):
        text = unit * 2500 + "x"
        assert made.text_bytes(made.encode_document(text)) == text.encode()
        assert max(map(len, made._cutter.pieces(text))) <= 1200


def test_a_run_without_a_safe_split_point_is_split_at_the_maximum(small):
    """In a BPE without words, no split point between two letters that some token joins is safe."""
    made = tokenizer("dummy prefix")
    assert [len(piece) for piece in made._cutter.pieces("b" * 500 + " " * 3000)][2:4] == [1200, 1200]


def test_training_a_vocabulary_accepts_long_runs(small):
    texts = ["ab " * 400 + " " * 4000, "the ab the ab " * 200]
    assert train_bpe(texts, vocab_size=265).vocab_size == 265


def test_a_vocabulary_of_long_texts_is_that_of_the_whole(monkeypatch):
    texts = ["".join(random.Random(seed).choices(WORDS, k=2000)) for seed in range(2)]
    whole = train_bpe(texts, vocab_size=290).fingerprint
    monkeypatch.setattr(long_text, "USUAL", 300)
    monkeypatch.setattr(long_text, "MARGIN", 24)
    assert train_bpe(texts, vocab_size=290).fingerprint == whole


def test_a_text_that_makes_the_library_panic_is_one_error_with_the_documents_name(tmp_path):
    """The pattern backtracks over the whole run for every character: Oniguruma gives up, and the library panics."""
    backend = byte_tokenizer()._backend
    content = json.loads(backend.to_str())
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False},
            content["pre_tokenizer"],
        ],
    }
    folder = vocabularies.save(
        tmp_path / "slow", tokenizers.Tokenizer.from_str(json.dumps(content)), {"eos_token": "<eos>"}
    )
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text('{"text": "fine"}\n' + json.dumps({"text": "a" * 200}) + "\n")
    fractions = {"heldout_fraction": 0.0, "tuning_fraction": 0.0}
    corpus = open_corpus(DataConfig(corpus=str(tmp_path / "text"), tokenizer=str(folder), **fractions))
    with pytest.raises(ConfigError, match=r"document a\.jsonl:2: the tokenizers library fails: .*; expected text"):
        list(corpus.heldout_batches("train", batch_size=1, sequence_length=32))
