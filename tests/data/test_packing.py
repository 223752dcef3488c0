"""Splitting, packing, and text from batches: nothing lost, nothing twice, nothing across a boundary."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orogen.data.corpora import stdlib_documents
from orogen.data.packing import (
    Batch,
    Stream,
    best_fit,
    document_stream,
    empty_batch,
    in_pieces,
    pack,
    piece_texts,
    target_byte_count,
    trained_text,
)
from orogen.data.vocabulary import byte_tokenizer

TOKENIZER = byte_tokenizer()
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12)
SEQUENCE = st.integers(2, 17)


def _streams(lengths):
    """Documents of these lengths whose tokens are all different, from 10 upwards."""
    starts = 10 + np.cumsum([0, *lengths])
    return [
        document_stream(np.arange(start, start + length), bos_id=1, eos_id=2)
        for start, length in zip(starts, lengths, strict=False)
    ]


def _pack(streams, sequence_length):
    pieces = [piece for stream in streams for piece in in_pieces(stream, sequence_length=sequence_length)]
    return pieces, pack(pieces, sequence_length=sequence_length, pad_id=0)


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, sequence_length=SEQUENCE)
def test_every_token_but_bos_is_predicted_exactly_once_from_its_predecessor(lengths, sequence_length):
    streams = _streams(lengths)
    _, batch = _pack(streams, sequence_length)
    expected = sorted(
        pair for s in streams for pair in zip(s.tokens_t[:-1].tolist(), s.tokens_t[1:].tolist(), strict=True)
    )
    counted = (batch.segments_bt[:, 1:] == batch.segments_bt[:, :-1]) & (batch.segments_bt[:, 1:] != 0)
    counted &= batch.weights_bt[:, 1:] > 0
    pairs = sorted(zip(batch.tokens_bt[:, :-1][counted], batch.tokens_bt[:, 1:][counted], strict=True))
    assert pairs == expected
    # No weight lies where the loss would not read it.
    assert batch.weights_bt.sum() == len(expected)


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, sequence_length=SEQUENCE)
def test_rows_hold_whole_pieces_in_order_then_padding(lengths, sequence_length):
    pieces, batch = _pack(_streams(lengths), sequence_length)
    assert batch.tokens_bt.shape[1] == sequence_length
    found = []
    for tokens_t, segments_t, positions_t, weights_t in zip(*batch[:4], strict=True):
        used = int((segments_t > 0).sum())
        assert used and (segments_t[used:] == 0).all()
        assert np.isin(np.diff(segments_t[:used]), (0, 1)).all() and segments_t[0] == 1
        assert not tokens_t[used:].any() and not positions_t[used:].any() and not weights_t[used:].any()
        for segment in range(1, segments_t.max() + 1):
            inside = segments_t == segment
            np.testing.assert_array_equal(positions_t[inside], np.arange(inside.sum()))
            np.testing.assert_array_equal(weights_t[inside], [0, *[1] * (inside.sum() - 1)])
            found.append(tokens_t[inside].tolist())
    assert sorted(found) == sorted(piece.tokens_t.tolist() for piece in pieces)


def test_types():
    _, batch = _pack(_streams([3, 0]), 8)
    assert [x_bt.dtype for x_bt in batch[:4]] == [np.int32, np.int32, np.int32, np.float32]


@pytest.mark.parametrize(
    ("length", "pieces"),
    # T = 8: bos and eos make the document of T - 2 tokens fill its row exactly.
    [(0, [2]), (1, [3]), (5, [7]), (6, [8]), (7, [8, 2]), (8, [8, 3]), (13, [8, 8]), (14, [8, 8, 2])],
)
def test_pieces_at_the_boundary(length, pieces):
    (stream,) = _streams([length])
    found = in_pieces(stream, sequence_length=8)
    assert [len(piece.tokens_t) for piece in found] == pieces
    for before, after in zip(found, found[1:], strict=False):
        assert before.tokens_t[-1] == after.tokens_t[0]
        assert before.weights_t[-1] == 1 and after.weights_t[0] == 0


def test_target_weights_are_kept_except_on_first_tokens():
    stream = Stream(np.arange(10, 16, dtype=np.int32), np.array([9, 0, 0.5, 1, 1, 0], np.float32))
    (first, second) = in_pieces(stream, sequence_length=4)
    assert first.weights_t.tolist() == [0, 0, 0.5, 1] and second.weights_t.tolist() == [0, 1, 0]
    assert stream.weights_t[0] == 9  # the caller's array is left alone
    whole = pack([stream], sequence_length=6, pad_id=0)
    assert whole.weights_bt.tolist() == [[0, 0, 0.5, 1, 1, 0]]


def test_best_fit_takes_the_fullest_row_with_room():
    # Longest first: 7 opens a row (3 left), 6 another (4 left), the 3 completes the 7, not the 6; 2 then fits the 6.
    assert best_fit([3, 6, 7, 2], capacity=10).tolist() == [0, 1, 0, 1]


def test_rows_are_numbered_by_their_first_piece():
    assert best_fit([1, 10, 10, 9], capacity=10).tolist() == [0, 1, 2, 0]
    assert best_fit([], capacity=10).tolist() == []


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_best_fit_overfills_no_row_and_stays_near_the_least(lengths):
    fill = np.bincount(best_fit(lengths, capacity=20), weights=lengths)
    assert fill.max() <= 20 and fill.min() > 0
    # Best-fit decreasing needs at most 11/9 of the optimum plus 6/9 (Dósa 2007, for first-fit decreasing as well).
    assert len(fill) <= 11 / 9 * max(-(-sum(lengths) // 20), sum(x > 10 for x in lengths)) + len(lengths) / 3 + 1
    # No two rows could be merged: the later one would have gone into the earlier.
    assert len(fill) < 2 or np.sort(fill)[:2].sum() > 20


@pytest.mark.parametrize("length", [0, 9])
def test_pieces_that_fit_no_row_are_refused(length):
    piece = Stream(np.zeros(length, np.int32), np.zeros(length, np.float32))
    with pytest.raises(ValueError, match=f"pieces of {length} to {length} tokens: expected 1 to sequence_length = 8"):
        pack([piece], sequence_length=8, pad_id=0)


def test_a_segment_that_repeats_an_id_is_a_separate_text():
    tokens_bt = np.array([[9, *TOKENIZER.encode("ab"), 9, *TOKENIZER.encode("c"), 9, *TOKENIZER.encode("de"), 9]])
    segments_bt = np.array([[1, 1, 1, 2, 2, 1, 1, 1, 0]])
    batch = Batch(tokens_bt, segments_bt, segments_bt, segments_bt)
    assert list(piece_texts([batch], TOKENIZER)) == [b"ab", b"c", b"de"]


def test_packing_the_embedded_corpus_wastes_little():
    texts = [document.text for document in stdlib_documents()][::10]
    streams = [document_stream(TOKENIZER.encode(text), bos_id=1, eos_id=2) for text in texts]
    _, batch = _pack(streams, 256)
    assert len(batch.tokens_bt) > 1000
    assert (batch.segments_bt == 0).mean() < 0.005


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=30), min_size=1, max_size=6))
def test_trained_text_is_the_documents(texts):
    streams = [document_stream(TOKENIZER.encode(text), bos_id=1, eos_id=2) for text in texts]
    _, whole = _pack(streams, 200)
    assert sorted(piece_texts([whole], TOKENIZER)) == sorted(text.encode() for text in texts)
    # Split finely, pieces lie apart, but their bytes are the documents' bytes.
    _, fine = _pack(streams, 3)
    assert sorted(trained_text([fine], TOKENIZER)) == sorted("".join(texts).encode())
    assert target_byte_count(fine, TOKENIZER.byte_length_v) == len("".join(texts).encode())


def test_trained_text_of_one_split_document_is_that_document():
    text = "A document, split into pieces that overlap by a token: é🙂.\r\n"
    _, batch = _pack([document_stream(TOKENIZER.encode(text), bos_id=1, eos_id=2)], 7)
    # All pieces but the last fill a row, so rows are in document order.
    assert trained_text([batch], TOKENIZER) == text.encode()


def test_empty_rows_are_padding_and_hold_no_text():
    batch = empty_batch(2, sequence_length=5, pad_id=7)
    assert (batch.tokens_bt == 7).all() and not any(x_bt.any() for x_bt in batch[1:4])
    assert trained_text([batch], TOKENIZER) == b""
