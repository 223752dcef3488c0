"""Pairs and longer documents as tokens: what is learned, what comes before it, and how images fit into rows."""

import shutil
import types

import numpy as np
import pytest

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.config.vision import VisionConfig
from orogen.data.loader import ONLY
from orogen.data.packing import Batch, in_pieces, pack
from orogen.data.vocabulary import byte_tokenizer
from orogen.vision import corpus
from orogen.vision.corpus import Sight
from orogen.vision.database import Database, Entry, create
from orogen.vision.examples import FIRST, Pair, example, image_token, interleaved, padded
from orogen.vision.features import Document, Encoded
from orogen.vision.similar import similar_pairs

TOKENIZER = byte_tokenizer()
BOS, EOS, PAD = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id


def ids(text):
    return TOKENIZER.encode_inside(text).tolist()


def config(**fields):
    return VisionConfig(**{"encoder": "e", "features": "f", "images_per_row": 3, **fields})


def test_only_a_pairs_own_caption_is_learned():
    stream = example(Pair(7, "cat"), ["dog", "cow"], [Pair(2, "sun"), Pair(9, "sea")], TOKENIZER)
    before = [BOS, FIRST + 2, *ids("sun\n"), FIRST + 9, *ids("sea\n"), FIRST + 7, *ids("dog\n"), *ids("cow\n")]
    assert stream.tokens_t.tolist() == [*before, *ids("cat"), EOS]
    assert stream.weights_t.tolist() == [0] * len(before) + [1] * 4


def test_all_text_of_a_longer_document_is_learned():
    stream = interleaved(["see", 4, "x"], TOKENIZER)
    assert stream.tokens_t.tolist() == [BOS, *ids("see"), FIRST + 4, *ids("x"), EOS]
    assert stream.weights_t.tolist() == [0, 1, 1, 1, 0, 1, 1]


def test_rows_never_hold_more_images_than_they_have_room_for():
    rng, streams = np.random.default_rng(0), []
    for _ in range(60):
        parts = [int(rng.integers(5)) if rng.random() < 0.5 else "a" * int(rng.integers(1, 9)) for _ in range(4)]
        one = padded(interleaved(parts, TOKENIZER), config(), length=31, pad_id=PAD)
        if one is not None:
            assert not one.weights_t[one.tokens_t == PAD].any()
            streams += in_pieces(one, sequence_length=31)
    batch = pack(streams, sequence_length=31, pad_id=PAD)
    assert 0 < (batch.tokens_bt >= FIRST).sum(1).max() <= 3
    sight = Sight(np.arange(5 * 2 * 3, dtype=np.float32).reshape(5, 2, 3), token=1, room=3)
    seen = sight.see(batch)
    assert seen.tokens_bt.max() < FIRST and seen.extras["image_features"].shape == (len(batch.tokens_bt), 31, 1)
    row = int(np.argmax((batch.tokens_bt >= FIRST).any(1)))
    number = batch.tokens_bt[row][batch.tokens_bt[row] >= FIRST][0] - FIRST
    np.testing.assert_array_equal(
        seen.extras["image_features"][row].reshape(-1)[:6].reshape(2, 3), sight.features_npv[number]
    )


def test_what_does_not_fit_is_left_out():
    assert padded(interleaved([0, 1, 2, 3], TOKENIZER), config(), length=31, pad_id=PAD) is None
    assert padded(interleaved(["a" * 30], TOKENIZER), config(), length=31, pad_id=PAD) is None


def test_shots_are_the_most_similar_pairs_that_give_nothing_away():
    embedding_ne = np.array([[1, 0], [0.9, 0.1], [0.5, 0.5], [0, 1], [0.8, 0.3]], float)
    captions = ["a", "b", "c", "d", " A. "]
    assert similar_pairs(embedding_ne, captions, range(5), 2, guard=None)[0] == [2, 1]
    assert similar_pairs(embedding_ne, captions, range(5), 2, guard=0.99)[0] == [3, 2]
    assert similar_pairs(embedding_ne, captions, [3], 2, guard=None)[0] == [3]


@pytest.mark.parametrize(
    "guard, retrieved, shots",
    [
        # Pairs 0 and 1 are near-copies, 0 and 2 have one caption; all are in the database; 3 is held out, as 2's copy.
        (0.98, {0: "far", 1: "cat", 2: "one", 3: "cat"}, {0: [], 1: [2], 2: [1], 3: [2]}),
        (None, {0: "cat", 1: "one", 2: "cat", 3: "cat"}, {0: [1], 1: [0], 2: [1], 3: [2]}),
    ],
)
def test_the_copy_guard_is_for_examples_that_are_learned(tmp_path, guard, retrieved, shots):
    captions = ["cat", "one", " Cat.", "cat"]
    embedding_ne = np.array([[1, 0], [0.99, 0.05], [0.6, 0.6], [0.6, 0.61]], np.float32)
    encoder = types.SimpleNamespace(name="tiny", source="tiny", fingerprint="abc", dimension=2)
    known = ["cat", "one", "cat", "far"]
    create(tmp_path / "db", encoder, np.array([[1, 0], [0.99, 0.05], [0.6, 0.6], [0, 1]]),
           [Entry(one, "") for one in known], index="flat")  # fmt: skip
    documents = [Document(str(n), (n, caption)) for n, caption in enumerate(captions)]
    found = corpus._streams(
        Encoded(documents, np.zeros((4, 1, 1)), embedding_ne, {}, ""),
        {"0": "train", "1": "train", "2": "train", "3": "valid"}, tokenizer=TOKENIZER,
        vision=config(database="db", retrieved=1, shots=1, guard=guard), database=Database(tmp_path / "db"),
    )  # fmt: skip
    for number, text in enumerate(captions):
        before = [Pair(other, captions[other]) for other in shots[number]]
        expected = example(Pair(number, text), [retrieved[number]], before, TOKENIZER)
        assert found[str(number)].tokens_t.tolist() == expected.tokens_t.tolist(), number


def test_pairs_for_which_nothing_is_retrieved_are_counted(tmp_path, capsys):
    encoder = types.SimpleNamespace(name="tiny", source="tiny", fingerprint="abc", dimension=2)
    embedding_ne = np.array([[1, 0], [0, 1]], np.float32)
    create(tmp_path / "db", encoder, embedding_ne, [Entry("one", ""), Entry("two", "")], index="flat")
    encoded = Encoded([Document("a", (0, "one")), Document("b", (1, "two"))], np.zeros((2, 1, 1)), embedding_ne, {}, "")
    given = {"tokenizer": TOKENIZER, "database": Database(tmp_path / "db")}
    for guard, told in [(0.9, ""), (-1.0, "nothing is retrieved for 1 of 2 images\n")]:  # b is held out: no guard
        vision = config(database="db", retrieved=1, guard=guard)
        corpus._streams(encoded, {"a": "train", "b": "valid"}, vision=vision, **given)
        assert capsys.readouterr().err == told


def test_encoded_captions_stand_beside_their_image_and_not_in_the_text(tmp_path):
    encoder = types.SimpleNamespace(name="tiny", source="tiny", fingerprint="abc", dimension=2)
    embedding_ne = np.array([[1, 0], [0, 1], [0.7, 0.7]], np.float32)
    create(tmp_path / "db", encoder, embedding_ne[:2], [Entry("one", ""), Entry("longer", "")], index="flat")
    documents = [Document("a", (0, "one")), Document("b", ("alone", 2)), Document("c", (1, "two"))]
    encoded = Encoded(documents, np.ones((3, 1, 2), np.float32), embedding_ne, {}, "content")
    vision = config(database=str(tmp_path / "db"), retrieved=2, retrieval="encoded")
    data = DataConfig(corpus="c", tokenizer="byte", heldout_fraction=0.0, tuning_fraction=0.0)
    opened = corpus.open_images(data, vision, encoded, encoder, TOKENIZER, length=24, caption_tokens=5)
    none = [PAD] * 5
    expected = [[ids("longe"), none], [[*ids("one"), EOS, PAD], none], [none, none]]  # the guard leaves their own out
    assert opened.sight.caption_nkc.tolist() == expected
    streams = corpus._streams(encoded, {"a": "train", "b": "train", "c": "train"}, vision=vision,
                              database=Database(tmp_path / "db"), tokenizer=TOKENIZER)  # fmt: skip
    assert streams["a"].tokens_t.tolist() == example(Pair(0, "one"), [], [], TOKENIZER).tokens_t.tolist()
    tokens_bt = np.array([[BOS, FIRST + 1, 65, BOS, FIRST, 66]])
    batch = Batch(tokens_bt, np.array([[1, 1, 1, 2, 2, 2]]), np.zeros((1, 6)), np.ones((1, 6)))
    seen = opened.sight.see(batch).extras
    assert seen["captions"].shape == (1, 6, 5) and seen["captions"].reshape(-1)[:20].tolist() == sum(
        sum((expected[n] for n in (1, 0)), []), []
    )


def test_a_corpus_is_another_one_with_another_database(tmp_path):
    """Though both are in their first version, in one folder."""
    encoder = types.SimpleNamespace(name="tiny", source="tiny", fingerprint="abc", dimension=2)
    embedding_ne = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)
    documents = [Document(str(n), (n, "a cat")) for n in range(30)]
    encoded = Encoded(documents, np.zeros((30, 1, 1), np.float32), embedding_ne, {}, "content")
    data = DataConfig(corpus="c", tokenizer="byte", heldout_fraction=0.3, tuning_fraction=0.0)
    hashes = []
    for text in ("dog", "cow", "dog"):
        shutil.rmtree(tmp_path / "db", ignore_errors=True)
        create(tmp_path / "db", encoder, np.array([[1, 0]]), [Entry(text, "")], index="flat")
        vision = config(database=str(tmp_path / "db"), retrieved=1)
        opened = corpus.open_images(data, vision, encoded, encoder, TOKENIZER, length=40)
        hashes.append(opened.sources[ONLY].content_hash)
    assert hashes[0] == hashes[2] != hashes[1]


def test_the_token_of_an_image():
    assert image_token(TOKENIZER, "pad") == PAD
    with pytest.raises(ConfigError, match="expected one special token"):
        image_token(TOKENIZER, "<image>")


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"retrieved": 2}, "retrieved is 2; expected a number above 0 beside a database, else 0"),
        ({"retrieval": "asked"}, "retrieval is 'asked'; expected one of prepended, encoded"),
        ({"retrieval": "encoded"}, "retrieved is 0; expected a number above 0, since retrieval is encoded"),
        ({"shots": 3}, "shots is 3; expected below images_per_row = 3"),
        ({"guard": 1.5}, "guard is 1.5; expected a cosine"),
        ({"encoder": ""}, "encoder is ''"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, expected):
    with pytest.raises(ConfigError, match=expected):
        config(**fields)
