"""Pairs, components and choices against brute force over all pairs."""

import itertools

import numpy as np
import pytest

from orogen.config.curate import DedupConfig
from orogen.data.curate import duplicates
from orogen.data.curate.duplicates import band_pairs, exact_pairs, kept_documents
from orogen.data.curate.minhash import NONE


def all_pairs(rows: np.ndarray, config: DedupConfig) -> tuple[set[tuple[int, int]], int]:
    """The duplicates by comparing every pair, and the number of candidates."""
    found, candidates = set(), 0
    for i, j in itertools.combinations(range(len(rows)), 2):
        if NONE in (rows[i, 0], rows[j, 0]):
            continue
        agree = rows[i] == rows[j]
        if any(agree[b * config.rows : (b + 1) * config.rows].all() for b in range(config.bands)):
            candidates += 1
            if agree.mean() >= config.jaccard:
                found.add((i, j))
    return found, candidates


@pytest.mark.parametrize("jaccard", [0.0, 0.75, 1.0])
def test_bands_find_what_brute_force_finds_each_candidate_once(jaccard, monkeypatch):
    monkeypatch.setattr(duplicates, "COMPARED", 5)
    config = DedupConfig(bands=4, rows=2, jaccard=jaccard)
    rows = np.random.default_rng(0).integers(0, 3, (60, 8), dtype=np.uint32)
    rows[7] = rows[41] = rows[3]
    rows[11] = rows[12] = NONE
    bands = [band_pairs(rows, band, config) for band in range(4)]
    pairs = [tuple(sorted(pair)) for band in bands for pair in band.pairs_e2.tolist()]
    found, candidates = all_pairs(rows, config)
    assert len(pairs) == len(set(pairs)) and set(pairs) == found
    assert sum(band.histogram.sum() for band in bands) == candidates
    assert sum(band.large_buckets for band in bands) == 0


def test_a_large_bucket_is_joined_by_its_pivots(monkeypatch):
    monkeypatch.setattr(duplicates, "LARGE_BUCKET", 5)
    config = DedupConfig(bands=2, rows=2, jaccard=1.0)
    rows = np.array([[1, 1, kind, kind] for kind in (5, 6, 5, 6, 6, 7)], np.uint32)
    found = band_pairs(rows, 0, config)
    assert found.large_buckets == 1
    assert sorted(map(tuple, found.pairs_e2.tolist())) == [(0, 2), (1, 3), (1, 4)]
    assert band_pairs(rows[:5], 0, config).large_buckets == 0  # five documents are not more than five


def test_no_document_has_no_pairs():
    empty = np.empty((0, 4), np.uint32)
    assert band_pairs(empty, 0, DedupConfig(bands=2, rows=2)).pairs_e2.shape == (0, 2)
    assert exact_pairs(np.empty(0, "S16")).shape == (0, 2)
    assert kept_documents(np.empty((0, 2), np.int64), np.empty(0, np.int64)).shape == (0,)


def test_exact_copies_are_paired_with_the_first():
    texts = np.array([b"b", b"a", b"b", b"c", b"a", b"b"], "S16")
    assert sorted(map(tuple, exact_pairs(texts).tolist())) == [(0, 2), (0, 5), (1, 4)]


def test_of_a_component_the_first_source_stays_and_then_the_first_document():
    """0-3-5 are one component through 3, 1-4 another; sources 1, 1, 0, 1, 0, 1."""
    pairs = np.array([[0, 3], [5, 3], [4, 1]])
    kept = kept_documents(pairs, np.array([1, 1, 0, 1, 0, 1]))
    assert kept.tolist() == [0, 4, 2, 0, 4, 0]


def test_components_are_those_of_a_search_through_the_graph():
    draw = np.random.default_rng(2)
    pairs, priority = draw.integers(0, 50, (35, 2)), draw.integers(0, 3, 50)
    kept = kept_documents(pairs, priority)
    for start in range(50):
        reached, left = {start}, [start]
        while left:
            at = left.pop()
            new = {int(b) for a, b in [*pairs, *pairs[:, ::-1]] if a == at} - reached
            reached |= new
            left += new
        assert kept[start] == min(reached, key=lambda n: (priority[n], n))
