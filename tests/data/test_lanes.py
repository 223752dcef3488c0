"""Lanes: rows that continue one another through whole documents, and their saved position."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orogen.config.checks import ConfigError
from orogen.data.loader import make_loader
from orogen.data.packing import NEXT, NEXT_WEIGHT, NOTHING, Stream, trained_text


def streams(lengths: list[int]) -> list[Stream]:
    """Documents of these lengths, whose tokens are all different."""
    edges = np.cumsum([0, *lengths])
    return [
        Stream(np.arange(start, end, dtype=np.int32), np.ones(end - start, np.float32))
        for start, end in itertools.pairwise(edges.tolist())
    ]


def loader(documents: list[Stream], *, lanes: int = 3, sequence_length: int = 5, seed: int | None = None, **settings):
    shape = {"batch_size": lanes, "sequence_length": sequence_length}
    return make_loader(documents, **shape, pad_id=0, shuffle_seed=seed, lanes=True, **settings)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 17), min_size=4, max_size=9), lanes=st.integers(1, 4))
def test_each_lane_reads_whole_documents_one_after_another(lengths, lanes):
    documents = streams(lengths)
    batches = list(itertools.islice(loader(documents, lanes=lanes), 12))
    taken = []
    for lane in range(lanes):
        row = batches[0].map(lambda *x_bt, lane=lane: np.concatenate([x[lane] for x in x_bt]), *batches[1:])
        starts = np.flatnonzero(row.positions_bt == 0)
        assert starts[0] == 0
        for start, end in itertools.pairwise((*starts, len(row.tokens_bt))):
            (document,) = [d for d in documents if d.tokens_t[0] == row.tokens_bt[start]]
            read = end - start
            complete = end < len(row.tokens_bt)
            assert read == len(document.tokens_t) if complete else read <= len(document.tokens_t)
            np.testing.assert_array_equal(row.tokens_bt[start:end], document.tokens_t[:read])
            np.testing.assert_array_equal(row.positions_bt[start:end], np.arange(read))
            following = [*document.tokens_t[1:], NOTHING][:read]
            np.testing.assert_array_equal(row.extras[NEXT][start:end], following)
            np.testing.assert_array_equal(row.extras[NEXT_WEIGHT][start:end], np.not_equal(following, NOTHING))
            taken.append(int(np.flatnonzero([d is document for d in documents])[0]))
    # Lanes take the documents in their endless order: each as often as any other, up to the last round.
    counts = np.bincount(taken, minlength=len(documents))
    assert counts.max() - counts.min() <= 1


def test_rows_have_no_padding_and_number_their_documents_from_one():
    for batch in itertools.islice(loader(streams([3, 11, 1, 6])), 8):
        assert (batch.segments_bt[:, 0] == 1).all() and np.isin(np.diff(batch.segments_bt), (0, 1)).all()
        changes = np.diff(batch.segments_bt) == 1
        np.testing.assert_array_equal(changes, batch.positions_bt[:, 1:] == 0)
        np.testing.assert_array_equal(batch.weights_bt, batch.positions_bt > 0)


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_a_saved_position_continues_with_the_same_rows(taken):
    documents = streams([3, 11, 1, 6, 25])
    first = loader(documents, seed=4)
    for _ in range(taken):
        next(first)
    state, expected = first.state(), list(itertools.islice(first, 9))
    again = loader(documents, seed=4)
    again.restore(state)
    for batch, wanted in zip(itertools.islice(again, 9), expected, strict=True):
        wanted.map(np.testing.assert_array_equal, batch)


def test_epochs_differ_and_every_process_keeps_its_own_lanes():
    documents = streams([4] * 12)
    whole = list(itertools.islice(loader(documents, lanes=4, sequence_length=4, seed=1), 6))
    first, second = (np.concatenate([b.tokens_bt[:, 0] for b in whole[i : i + 3]]) for i in (0, 3))
    assert sorted(first) == sorted(second) and list(first) != list(second)
    for process in range(2):
        own = loader(documents, lanes=4, sequence_length=4, seed=1, process_index=process, process_count=2)
        for batch, wanted in zip(itertools.islice(own, 6), whole, strict=True):
            wanted.map(
                lambda x_bt, y_bt, p=process: np.testing.assert_array_equal(x_bt[2 * p : 2 * p + 2], y_bt), batch
            )


def test_weights_of_tokens_follow_them():
    documents = [d._replace(weights_t=(d.tokens_t % 3).astype(np.float32)) for d in streams([7, 4, 9])]
    for batch in itertools.islice(loader(documents), 6):
        expected_bt = np.where(batch.positions_bt > 0, batch.tokens_bt % 3, 0)
        np.testing.assert_array_equal(batch.weights_bt, expected_bt)
        ahead_bt = np.where(batch.extras[NEXT] == NOTHING, 0, batch.extras[NEXT] % 3)
        np.testing.assert_array_equal(batch.extras[NEXT_WEIGHT], ahead_bt)


class Letters:
    """A decoder whose token i is the letter i, with 0 before a text and 1 after it."""

    bos_id = 0

    def decode_bytes(self, ids):
        return bytes(int(i) for i in ids if i > 1)

    text_bytes = decode_bytes


def test_the_text_that_a_lane_predicts_is_that_of_its_documents():
    texts = [b"first", b"", b"a longer second one", b"x"]
    documents = [Stream(np.array([0, *text, 1], np.int32), np.ones(len(text) + 2, np.float32)) for text in texts]
    batches = list(itertools.islice(loader(documents, lanes=1), 50))
    assert trained_text(batches, Letters()).startswith(b"".join(texts) * 3)


def test_fewer_documents_than_rows_are_refused():
    with pytest.raises(ConfigError, match="batch_size = 4: expected at most 3, the number of documents"):
        loader(streams([5, 5, 5]), lanes=4)


def test_positions_of_packed_rows_and_of_lanes_are_told_apart():
    documents = streams([3, 11, 1, 6])
    lanes, packed = (
        loader(documents),
        make_loader(documents, batch_size=3, sequence_length=5, pad_id=0, shuffle_seed=None),
    )
    with pytest.raises(ConfigError, match="saved data position has lanes = None: expected True"):
        lanes.restore(packed.state())
    with pytest.raises(ConfigError, match="the saved data position is"):
        packed.restore(lanes.state())
    state = lanes.state()
    state["position"]["read"]["1"] = 12
    with pytest.raises(ConfigError, match="the saved data position has read = 12; expected at most 11"):
        lanes.restore(state)
        next(lanes)
