"""The embedded corpus, content hashes, and splits by document."""

import collections
import dataclasses
import re

import pytest

from orogen.config.data import DataConfig
from orogen.data.corpora import content_hash, corpus_documents, split_documents, split_of, stdlib_documents
from orogen.data.readers import Document

CONFIG = DataConfig(corpus="stdlib", tokenizer="byte", heldout_fraction=0.2, tuning_fraction=0.1, seed=5)
DOCUMENTS = [Document(f"file{i}.txt", f"text {i}") for i in range(300)]


@pytest.fixture(scope="module")
def stdlib():
    return list(stdlib_documents())


def test_the_embedded_corpus_is_the_library_without_tests(stdlib):
    keys = {document.key for document in stdlib}
    assert {"os.py", "json/decoder.py", "unittest/mock.py", "xml/dom/minidom.py"} <= keys
    assert all(key.endswith(".py") for key in keys)
    assert 5e6 < sum(len(document.text) for document in stdlib) < 20e6


def test_the_embedded_corpus_leaves_out_tests_and_build_files(stdlib):
    left_out = re.compile(
        r"(^|/)(test|tests|idle_test|site-packages|dist-packages|encodings|pydoc_data|__pycache__)/|_sysconfigdata|config-"
    )
    assert [document.key for document in stdlib if left_out.search(document.key)] == []


def test_the_embedded_corpus_is_sorted_and_names_no_machine(stdlib):
    keys = [document.key for document in stdlib]
    assert keys == sorted(keys)
    assert not any(key.startswith("/") for key in keys)


def test_the_hash_sees_keys_texts_and_boundaries():
    base = [Document("a", "bc"), Document("d", "e")]
    variants = [
        base,
        base[::-1],
        base[:1],
        [Document("ab", "c"), Document("d", "e")],
        [Document("a", "bc"), Document("d", "f")],
        [Document("a", "bcde")],
    ]
    assert len({content_hash(variant) for variant in variants}) == len(variants)
    assert content_hash(base) == content_hash([Document("a", "bc"), Document("d", "e")])


def test_splits_are_disjoint_complete_and_near_their_fractions():
    splits = split_documents(DOCUMENTS, config=CONFIG)
    assert sorted(d.key for s in splits.values() for d in s) == sorted(d.key for d in DOCUMENTS)
    sizes = {name: len(documents) for name, documents in splits.items()}
    assert 40 <= sizes["heldout"] <= 80 and 15 <= sizes["tuning"] <= 45


def test_an_added_document_moves_no_other():
    before = {d.key: name for name, split in split_documents(DOCUMENTS, config=CONFIG).items() for d in split}
    more = [Document("a new one.txt", "x"), *DOCUMENTS]
    after = {d.key: name for name, split in split_documents(more, config=CONFIG).items() for d in split}
    assert {key: after[key] for key in before} == before


def test_the_seed_moves_documents_and_one_fraction_leaves_the_other_split_alone():
    def split(**changes):
        return {d.key: split_of(d.key, config=dataclasses.replace(CONFIG, **changes)) for d in DOCUMENTS}

    assert split() == split()
    assert split(seed=6) != split()
    wider = split(tuning_fraction=0.4)
    assert {k for k, v in wider.items() if v == "heldout"} == {k for k, v in split().items() if v == "heldout"}


def test_a_fraction_of_zero_makes_no_split():
    splits = split_documents(DOCUMENTS, config=dataclasses.replace(CONFIG, tuning_fraction=0.0))
    assert splits["tuning"] == []
    assert collections.Counter(map(len, splits.values()))[0] == 1


def test_an_empty_split_is_refused():
    trained = [d for d in DOCUMENTS if split_of(d.key, config=CONFIG) == "train"][:4]
    with pytest.raises(ValueError, match=r"the heldout split of corpus 'stdlib' has no text \(4 documents.*or 0$"):
        split_documents(trained, config=CONFIG)
    everything = dataclasses.replace(CONFIG, heldout_fraction=0.99, tuning_fraction=0.0)
    with pytest.raises(ValueError, match="the train split .* expected more documents$"):
        split_documents(DOCUMENTS[:3], config=everything)


def test_a_split_of_empty_documents_is_refused():
    empty = [Document(d.key, "" if split_of(d.key, config=CONFIG) == "tuning" else d.text) for d in DOCUMENTS]
    with pytest.raises(ValueError, match="the tuning split"):
        split_documents(empty, config=CONFIG)


@pytest.mark.parametrize("texts", [[""], ["", ""]])
def test_a_corpus_without_text_is_refused(tmp_path, texts):
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    config = dataclasses.replace(CONFIG, corpus=str(tmp_path))
    with pytest.raises(ValueError, match=f"has {len(texts)} documents and no text"):
        corpus_documents(config)


def test_a_text_field_for_plain_text_is_refused(tmp_path):
    for name, text in (("a.txt", "abc\n"), ("b.txt", "de\n")):
        (tmp_path / name).write_text(text)
    corpus = dataclasses.replace(CONFIG, corpus=str(tmp_path))
    named = dataclasses.replace(corpus, text_field="body")
    assert len(corpus_documents(corpus)) == 2
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(ValueError) as caught:
            corpus_documents(dataclasses.replace(named, corpus=str(path)))
        expected = f"'text', since nothing reads it: {str(path)!r} is plain text without fields"
        assert str(caught.value) == f"DataConfig.text_field is 'body'; expected {expected}"
    (tmp_path / "c.jsonl").write_text('{"body": "fg"}\n')
    assert [document.text for document in corpus_documents(named)][-1] == "fg"
