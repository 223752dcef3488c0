"""Signatures against Python's integers, and candidates against the curve."""

import numpy as np

from orogen.config.curate import DedupConfig
from orogen.data.curate import minhash
from orogen.data.curate.minhash import NONE, band_keys, candidate_probability, hash_functions, planted_rates, signatures


def test_a_signature_holds_the_smallest_value_of_each_function(monkeypatch):
    monkeypatch.setattr(minhash, "BLOCK", 7)  # sets of several blocks
    config = DedupConfig(bands=3, rows=2, seed=5)
    draw = np.random.default_rng(0)
    sets = [draw.integers(0, 2**32, size, dtype=np.uint32) for size in (3, 0, 9, 7, 1, 2, 0)]
    a_k, b_k = (values.tolist() for values in hash_functions(config))
    expected = [
        [min(((x * a + b) % 2**32 for x in one.tolist()), default=2**32 - 1) for a, b in zip(a_k, b_k, strict=True)]
        for one in sets
    ]
    assert signatures(sets, config).tolist() == expected
    assert all(a % 2 for a in a_k) and len(set(a_k)) == 6


def test_the_curve_at_indices_worked_out_by_hand():
    """1 - (1 - J^13)^20: the published table of the 20 x 13 scheme."""
    config = DedupConfig()
    table = {0.5: 0.0024, 0.6: 0.026, 0.7: 0.177, 0.75: 0.382, 0.8: 0.677, 0.85: 0.924, 0.9: 0.997}
    for jaccard, expected in table.items():
        assert abs(float(candidate_probability(jaccard, config)) - expected) < 0.001
    assert float(candidate_probability(1.0, config)) == 1 and float(candidate_probability(0.0, config)) == 0


def test_candidates_among_planted_pairs_lie_on_the_curve():
    """Within 3 points at every index, by as many pairs as make three standard deviations 3 points at 0.5."""
    config = DedupConfig()
    rates = planted_rates((0.5, 0.7, 0.8, 0.9), config, pairs=2500)
    for rate, expected in zip(rates, (0.0024, 0.177, 0.677, 0.997), strict=True):
        assert abs(rate - expected) < 0.03


def test_keys_are_equal_where_the_rows_of_a_band_are():
    config = DedupConfig(bands=2, rows=3)
    draw = np.random.default_rng(1)
    rows = draw.integers(0, 2, (500, 6), dtype=np.uint32)
    for band in (0, 1):
        keys = band_keys(rows, band, config).tolist()
        own = [tuple(row) for row in rows[:, 3 * band : 3 * band + 3].tolist()]
        assert len(set(keys)) == len(set(own)) == len(set(zip(keys, own, strict=True))) == 8


def test_no_shingles_is_a_signature_of_its_own():
    assert (signatures([np.empty(0, np.uint32)], DedupConfig(bands=1, rows=2)) == NONE).all()
