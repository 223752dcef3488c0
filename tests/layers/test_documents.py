"""Positions inside documents, by hand."""

import numpy as np

from orogen.layers.documents import documents


def test_positions_count_from_the_start_of_each_run():
    segments_bt = np.array([[1, 1, 1, 2, 2, 0, 0], [0, 0, 7, 7, 3, 0, 3], [2, 2, 2, 2, 2, 2, 2]], np.int32)
    found = documents(segments_bt)
    np.testing.assert_array_equal(found.segments_bt, segments_bt)
    np.testing.assert_array_equal(
        found.positions_bt, [[0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6]]
    )
    assert found.positions_bt.dtype == np.int32
