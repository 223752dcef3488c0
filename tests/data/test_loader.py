"""Batches of a small corpus: determinism, exact restore, shards, epochs, held-out passes."""

import collections
import dataclasses
import itertools
import json
import random
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orogen.config.data import DataConfig
from orogen.data.loader import make_loader, open_corpus
from orogen.data.packing import document_stream, piece_texts, target_byte_count, trained_text
from orogen.data.vocabulary import byte_tokenizer, train_bpe

SHAPE = {"batch_size": 6, "sequence_length": 32}
WORDS = "the of layer state 'x' é 🙂 <bos> \r\n return".split(" ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 documents of 0 to 500 words."""
    root = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for i in range(60):
        words = (rng.choice(WORDS) for _ in range(int(500 * rng.random() ** 3)))
        (root / f"{i:02}.txt").write_bytes(" ".join([*words, str(i)] if i else []).encode())
    return root


@pytest.fixture(scope="module")
def config(folder):
    return DataConfig(corpus=str(folder), tokenizer="byte", heldout_fraction=0.15, tuning_fraction=0.1, seed=3)


@pytest.fixture(scope="module")
def corpus(config):
    return open_corpus(config)


def _same(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(x_bt, y_bt) for x_bt, y_bt in pairs)


def _take(loader, count):
    return list(itertools.islice(loader, count))


def _streams(count):
    """Documents of one token each, so that a window's rows say which documents it held."""
    return [document_stream(np.array([10 + i]), bos_id=1, eos_id=2) for i in range(count)]


def _document_order(loader, documents, epochs):
    """Tokens of the documents in the order of the batches, split into epochs."""
    order = []
    while len(order) < documents * epochs:
        tokens_bt = next(loader).tokens_bt
        order += tokens_bt[tokens_bt >= 10].tolist()
    return [order[i * documents : (i + 1) * documents] for i in range(epochs)]


def test_batches_have_the_requested_shape(corpus):
    batch = next(corpus.train_loader(**SHAPE))
    assert [x_bt.shape for x_bt in batch[:4]] == [(6, 32)] * 4
    assert [x_bt.dtype for x_bt in batch[:4]] == [np.int32, np.int32, np.int32, np.float32]


def test_two_opens_give_the_same_stream(config, corpus):
    again = open_corpus(config)
    assert again.content_hash == corpus.content_hash
    for one, other in zip(_take(corpus.train_loader(**SHAPE), 60), _take(again.train_loader(**SHAPE), 60), strict=True):
        assert _same(one, other)


def test_seeds_give_different_orders_of_the_same_documents(corpus):
    one, two = (_take(corpus.train_loader(**SHAPE, shuffle_seed=seed), 3) for seed in (0, 1))
    assert not _same(one[0], two[0])
    default, explicit = next(corpus.train_loader(**SHAPE)), next(corpus.train_loader(**SHAPE, shuffle_seed=3))
    assert _same(default, explicit)


def test_without_shuffle_documents_come_in_key_order(config):
    corpus = open_corpus(dataclasses.replace(config, shuffle=False))
    first = next(iter(piece_texts(corpus.train_loader(batch_size=1, sequence_length=4096), corpus.tokenizer)))
    assert first == corpus.splits["train"].documents[0].text.encode()


def _short_windows(corpus):
    """A loader whose windows of 64 rows end inside batches and cross epochs."""
    return make_loader(corpus.splits["train"], **SHAPE, pad_id=0, shuffle_seed=9, window_tokens=1)


@pytest.fixture(scope="module")
def stream_and_states(corpus):
    """400 batches, several epochs, and the state before each."""
    loader = _short_windows(corpus)
    batches, states = [], []
    for _ in range(400):
        states.append(loader.state())
        batches.append(next(loader))
    return batches, states


def test_the_stream_crosses_epochs(corpus, stream_and_states):
    """The condition that gives the next tests their meaning: windows end inside batches, and epochs inside windows."""
    _, states = stream_and_states
    starts = sorted({state["position"]["parent"]["next_index"] for state in states})
    epoch = len(corpus.splits["train"])
    assert starts[-1] > epoch
    assert any(start // epoch != (end - 1) // epoch for start, end in itertools.pairwise(starts))
    first_rows = [row for row in (state["position"]["row"] for state in states) if row < SHAPE["batch_size"]]
    assert any(first_rows)


@settings(max_examples=12, deadline=None)
@given(step=st.integers(0, 395))
def test_restore_at_any_step_is_bit_equal(corpus, stream_and_states, step):
    batches, states = stream_and_states
    loader = _short_windows(corpus)
    loader.restore(json.loads(json.dumps(states[step])))
    assert loader.state() == states[step]
    for one, other in zip(batches[step:], _take(loader, 400 - step), strict=True):
        assert _same(one, other)


def test_restore_at_every_window_boundary_is_bit_equal(corpus, stream_and_states):
    batches, states = stream_and_states
    boundaries = [i for i in range(1, 399) if states[i]["position"]["window"] != states[i - 1]["position"]["window"]]
    assert boundaries
    for step in itertools.chain.from_iterable((i - 1, i, i + 1) for i in boundaries):
        loader = _short_windows(corpus)
        loader.restore(states[step])
        assert _same(batches[step], next(loader))


def test_restore_goes_back_in_a_loader_that_has_run_on(corpus, stream_and_states):
    batches, states = stream_and_states
    loader = _short_windows(corpus)
    _take(loader, 40)
    loader.restore(states[7])
    assert _same(batches[7], next(loader))
    assert loader.state() == states[8]


@pytest.mark.parametrize("state", [{}, {"position": {}}, {"identity": {}}, {"position": 1, "identity": {}}], ids=str)
def test_malformed_positions_are_refused(corpus, state):
    with pytest.raises(ValueError, match="the saved data position has no object"):
        _short_windows(corpus).restore(state)


def test_restore_in_a_new_process_is_bit_equal(config, corpus):
    loader = corpus.train_loader(**SHAPE)
    _take(loader, 50)
    state = loader.state()
    program = (
        "import json, sys\n"
        "from orogen.config.data import DataConfig\n"
        "from orogen.data.loader import open_corpus\n"
        "given = json.load(sys.stdin)\n"
        "loader = open_corpus(DataConfig(**given['config'])).train_loader(**given['shape'])\n"
        "loader.restore(given['state'])\n"
        "print(json.dumps(next(loader).tokens_bt.tolist()))\n"
    )
    given_ = json.dumps({"config": dataclasses.asdict(config), "shape": SHAPE, "state": state})
    done = subprocess.run([sys.executable, "-c", program], input=given_, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == next(loader).tokens_bt.tolist()
    assert done.stderr == ""  # the prefetching thread ends quietly


@pytest.mark.parametrize(
    ("change", "name"),
    [({"batch_size": 12}, "batch_size"), ({"sequence_length": 16}, "sequence_length"), ({}, "shuffle_seed")],
)
def test_a_position_in_other_data_is_refused(corpus, change, name):
    state = corpus.train_loader(**SHAPE, shuffle_seed=9).state()
    loader = corpus.train_loader(**{**SHAPE, **change}, shuffle_seed=9 if change else 8)
    with pytest.raises(ValueError, match=f"the saved data position has {name} = .*: expected"):
        loader.restore(state)


def test_a_position_in_another_corpus_or_tokenizer_is_refused(config, corpus):
    state = corpus.train_loader(**SHAPE, shuffle_seed=9).state()
    for change, name in (({"seed": 4}, "seed"), ({"tokenizer": "bpe", "vocab_size": 270}, "tokenizer")):
        loader = open_corpus(dataclasses.replace(config, **change)).train_loader(**SHAPE, shuffle_seed=9)
        with pytest.raises(ValueError, match=f"the saved data position has {name} = "):
            loader.restore(state)


@pytest.mark.parametrize("process_count", [2, 3])
def test_processes_divide_the_rows_of_the_same_batch(corpus, process_count):
    whole = _take(corpus.train_loader(**SHAPE), 20)
    parts = [
        _take(corpus.train_loader(**SHAPE, process_index=i, process_count=process_count), 20)
        for i in range(process_count)
    ]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert _same(batch, shares[0].map(lambda *x_bt: np.concatenate(x_bt), *shares[1:]))


def test_a_position_is_the_same_on_every_process_and_for_every_number_of_them(corpus):
    whole = corpus.train_loader(**SHAPE)
    second = corpus.train_loader(**SHAPE, process_index=1, process_count=2)
    _take(whole, 11), _take(second, 11)
    assert whole.state() == second.state()
    second.restore(whole.state())
    assert _same(next(whole).map(lambda x_bt: x_bt[3:]), next(second))


def test_an_epoch_holds_every_document_once_and_the_next_is_in_another_order():
    loader = make_loader(_streams(20), batch_size=2, sequence_length=3, pad_id=0, shuffle_seed=1, window_tokens=1)
    first, second, third = _document_order(loader, documents=20, epochs=3)
    assert sorted(first) == sorted(second) == sorted(third) == list(range(10, 30))
    assert first != second != third != first


def test_a_seeds_second_epoch_is_not_the_next_seeds_first():
    """Compared by the documents in the first half of each epoch, which no order of rows within a window changes."""
    halves = {}
    for seed in (0, 1):
        # 128 documents of a row each in windows of 64 rows: two windows per epoch.
        loader = make_loader(
            _streams(128), batch_size=4, sequence_length=3, pad_id=0, shuffle_seed=seed, window_tokens=1
        )
        halves[seed] = [set(epoch[:64]) for epoch in _document_order(loader, documents=128, epochs=2)]
    assert halves[0][1] != halves[1][0]


def test_a_window_is_wide_enough_to_fill_rows():
    loader = make_loader(_streams(200), batch_size=4, sequence_length=30, pad_id=0, shuffle_seed=0, window_tokens=1)
    assert next(loader).segments_bt.min() == 1  # ten documents of three tokens fill a row


def test_windows_with_the_same_rows_order_them_differently():
    one = document_stream(np.arange(10, 649), bos_id=1, eos_id=2)
    loader = make_loader([one], batch_size=64, sequence_length=11, pad_id=0, shuffle_seed=0, window_tokens=1)
    first, second = next(loader).tokens_bt, next(loader).tokens_bt
    assert sorted(first.tolist()) == sorted(second.tolist())
    assert first.tolist() != second.tolist()


def test_rows_of_a_window_are_mixed():
    """A long document's rows do not fill batch after batch."""
    long = [document_stream(np.full(32 * 40, 10 + i), bos_id=1, eos_id=2) for i in range(4)]
    loader = make_loader(long, batch_size=8, sequence_length=32, pad_id=0, shuffle_seed=0)
    assert len(set(next(loader).tokens_bt[:, 5].tolist())) > 1


def test_whole_epochs_are_the_documents_text(corpus):
    """Compared by counts of bytes, which no order of the pieces changes; batches of one row end with each window."""
    loader = corpus.train_loader(batch_size=1, sequence_length=32)
    batches, documents = [], corpus.splits["train"].documents
    while loader.state()["position"]["parent"]["next_index"] < len(documents) or not batches:
        batches.append(next(loader))
        if loader.state()["position"]["row"] == 0:
            break
    windowed = loader.state()["position"]["parent"]["next_index"]
    assert windowed == len(documents)
    expected = b"".join(document.text.encode() for document in documents)
    assert collections.Counter(trained_text(batches, corpus.tokenizer)) == collections.Counter(expected)


def test_trained_text_is_the_documents_when_rows_hold_them_whole(corpus):
    loader = corpus.train_loader(batch_size=1, sequence_length=8192)
    batches = [next(loader)]
    while loader.state()["position"]["row"]:
        batches.append(next(loader))
    found = sorted(piece_texts(batches, corpus.tokenizer))
    assert found == sorted(document.text.encode() for document in corpus.splits["train"].documents)


@pytest.mark.parametrize("split", ["heldout", "tuning"])
def test_a_heldout_pass_predicts_every_byte_and_eos_once(corpus, split):
    documents = corpus.splits[split].documents
    heldout = corpus.heldout_batches(split, batch_size=7, sequence_length=32)
    batches = list(heldout)
    assert {batch.tokens_bt.shape for batch in batches} == {(7, 32)}
    assert heldout.byte_count == sum(len(document.text.encode()) for document in documents)
    # Byte tokens: one target per byte, and eos.
    assert sum(batch.weights_bt.sum() for batch in batches) == heldout.byte_count + len(documents)
    assert sum(target_byte_count(batch, corpus.tokenizer.byte_length_v) for batch in batches) == heldout.byte_count


def test_a_heldout_pass_is_finite_repeatable_and_padded_with_empty_rows(corpus):
    heldout = corpus.heldout_batches("heldout", batch_size=7, sequence_length=32)
    first, second = list(heldout), list(heldout)
    assert all(_same(one, other) for one, other in zip(first, second, strict=True))
    filled = [bool(row_t.any()) for batch in first for row_t in batch.segments_bt]
    assert sum(filled) % 7 and filled == sorted(filled, reverse=True)
    shares = [
        list(corpus.heldout_batches("heldout", batch_size=8, sequence_length=32, process_index=i, process_count=2))
        for i in (0, 1)
    ]
    assert len(shares[0]) == len(shares[1])
    assert {batch.tokens_bt.shape for share in shares for batch in share} == {(4, 32)}


def test_a_given_tokenizer_is_used_instead_of_training_one(config):
    tokenizer = train_bpe(["some other text " * 9], vocab_size=262)
    corpus = open_corpus(dataclasses.replace(config, tokenizer="bpe", vocab_size=262), tokenizer=tokenizer)
    assert corpus.tokenizer is tokenizer


def test_a_given_tokenizer_of_another_size_is_refused(config):
    with pytest.raises(ValueError, match=r"DataConfig.vocab_size = 300: expected 259"):
        open_corpus(dataclasses.replace(config, tokenizer="bpe", vocab_size=300), tokenizer=byte_tokenizer())


def test_bpe_is_trained_on_the_train_split_only(config):
    config = dataclasses.replace(config, tokenizer="bpe", vocab_size=280)
    corpus = open_corpus(config)
    expected = train_bpe([d.text for d in corpus.splits["train"].documents], vocab_size=280)
    everything = train_bpe([d.text for s in corpus.splits.values() for d in s.documents], vocab_size=280)
    assert corpus.tokenizer.fingerprint == expected.fingerprint != everything.fingerprint


def test_a_corpus_describes_itself(corpus, folder):
    (folder / "notes.md").write_text("not read")
    described = corpus.describe()
    (folder / "notes.md").unlink()
    assert described["unread_files"] == 1
    assert described["vocab_size"] == 259 and len(described["content_hash"]) == 64
    assert sum(described["documents"].values()) == 60
    assert sum(described["bytes"].values()) == sum(f.stat().st_size for f in folder.iterdir())
    assert json.loads(json.dumps(described)) == described


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0: expected at least 1"),
        ({"sequence_length": 1}, "sequence_length = 1: expected at least 2"),
        ({"process_index": 2, "process_count": 2}, "process_index = 2: expected 0 to process_count - 1 = 1"),
        ({"process_count": 4}, "batch_size = 6: expected a multiple of process_count = 4"),
    ],
)
def test_impossible_shapes_are_refused(corpus, arguments, message):
    with pytest.raises(ValueError, match=message):
        corpus.train_loader(**{**SHAPE, **arguments})
    with pytest.raises(ValueError, match=message):
        corpus.heldout_batches("heldout", **{**SHAPE, **arguments})


def test_a_split_without_documents_is_refused(config):
    corpus = open_corpus(dataclasses.replace(config, tuning_fraction=0.0))
    for split in ("tuning", "validation"):
        with pytest.raises(
            ValueError, match=rf"split '{split}' has no document: expected one of \['train', 'heldout'\]"
        ):
            corpus.heldout_batches(split, **SHAPE)
    with pytest.raises(ValueError, match="streams is empty"):
        make_loader([], **SHAPE, pad_id=0, shuffle_seed=None)
