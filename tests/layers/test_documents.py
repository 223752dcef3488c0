"""Documents' numbers and positions, by hand."""

import numpy as np

from orogen.layers.documents import documents, numbered


def test_each_run_is_numbered_and_its_positions_count_from_its_start():
    segments_bt = np.array([[1, 1, 1, 2, 2, 0, 0], [0, 0, 7, 7, 3, 0, 3], [2, 2, 2, 2, 2, 2, 2]], np.int32)
    found = documents(segments_bt)
    np.testing.assert_array_equal(found.segments_bt, [[1, 1, 1, 2, 2, 0, 0], [0, 0, 1, 1, 2, 0, 3], [1] * 7])
    np.testing.assert_array_equal(numbered(segments_bt), found.segments_bt)
    assert found.segments_bt.dtype == numbered(segments_bt).dtype == np.int32
    np.testing.assert_array_equal(
        found.positions_bt, [[0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6]]
    )
    assert found.positions_bt.dtype == np.int32
