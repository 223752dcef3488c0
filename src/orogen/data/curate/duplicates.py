"""Duplicates among all documents: pairs found band by band, joined into components, of which one document stays.

Letters: n documents, k hash functions, e pairs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from orogen.config.curate import DedupConfig
from orogen.data.curate.minhash import NONE, Signatures, band_keys

Ids = NDArray[np.int64]

# A bucket with more documents is not compared pair by pair: boilerplate would make millions of pairs.
LARGE_BUCKET = 200
COMPARED = 2**13  # pairs at a time
BINS = 50  # of the histogram of estimated Jaccard indices


class Pairs(NamedTuple):
    """The duplicates of one band.

    pairs_e2: int64 (e, 2). histogram: candidates by estimated Jaccard index, BINS counts from 0 to 1; a pair counts in
    the first band that finds it. large_buckets: how many were compared with pivots alone.
    """

    pairs_e2: Ids
    histogram: Ids
    large_buckets: int


def exact_pairs(digests_n: NDArray[np.bytes_]) -> Ids:
    """Each document with the first of the same digest: int64 (e, 2), the first one first."""
    order_n = np.argsort(digests_n, kind="stable")
    sorted_n = digests_n[order_n]
    new_n = np.r_[True, sorted_n[1:] != sorted_n[:-1]] if len(order_n) else np.empty(0, bool)
    first_n = order_n[np.maximum.accumulate(np.where(new_n, np.arange(len(order_n)), 0))]
    return np.stack([first_n[~new_n], order_n[~new_n]], 1).astype(np.int64)


def band_pairs(signatures_nk: Signatures, band: int, config: DedupConfig) -> Pairs:
    """The duplicates among documents that agree in this band.

    A bucket of at most LARGE_BUCKET documents is compared pair by pair. In a larger one, the first document is compared
    with all, those that are its duplicates are set aside, and so on with the rest: two documents that are duplicates of
    each other, but of which only one is a duplicate of an earlier pivot, may stay apart there.
    """
    keys_n = band_keys(signatures_nk, band, config)
    ids_n = np.flatnonzero(signatures_nk[:, band * config.rows] != NONE)
    ids_n = ids_n[np.argsort(keys_n[ids_n], kind="stable")]
    starts = np.flatnonzero(np.r_[True, keys_n[ids_n][1:] != keys_n[ids_n][:-1]]) if len(ids_n) else ids_n
    sizes = np.diff(np.r_[starts, len(ids_n)])
    large = sizes > LARGE_BUCKET
    found, histogram = [np.empty((0, 2), np.int64)], np.zeros(BINS, np.int64)
    for pairs_e2 in _all_pairs(ids_n, np.where(large, 0, sizes), starts):
        estimate_e, first_e = _compare(signatures_nk, pairs_e2, band, config)
        histogram += np.histogram(estimate_e[first_e], BINS, (0, 1))[0]
        found.append(pairs_e2[first_e & (estimate_e >= config.jaccard)])
    for start, size in zip(starts[large], sizes[large], strict=True):
        rest_n = ids_n[start : start + size]
        while len(rest_n) > 1:
            pairs_e2 = np.stack([np.full(len(rest_n) - 1, rest_n[0]), rest_n[1:]], 1)
            estimate_e, first_e = _compare(signatures_nk, pairs_e2, band, config)
            histogram += np.histogram(estimate_e[first_e], BINS, (0, 1))[0]
            found.append(pairs_e2[estimate_e >= config.jaccard])
            rest_n = rest_n[1:][estimate_e < config.jaccard]
    return Pairs(np.concatenate(found), histogram, int(large.sum()))


def _all_pairs(ids_n: Ids, sizes: Ids, starts: Ids) -> Iterator[Ids]:
    """The pairs within each bucket, at most COMPARED at a time: int64 (e, 2)."""
    for distance in range(1, int(sizes.max(initial=0))):
        wide = sizes > distance
        counts = sizes[wide] - distance
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        left = np.repeat(starts[wide], counts) + offsets
        for chunk in np.array_split(left, -(-len(left) // COMPARED)):
            yield np.stack([ids_n[chunk], ids_n[chunk + distance]], 1)


def _compare(
    signatures_nk: Signatures, pairs_e2: Ids, band: int, config: DedupConfig
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Each pair's estimated Jaccard index, and whether no earlier band agrees."""
    agree_ek = signatures_nk[pairs_e2[:, 0]] == signatures_nk[pairs_e2[:, 1]]
    earlier_e = agree_ek[:, : band * config.rows].reshape(len(pairs_e2), band, config.rows).all(2).any(1)
    return agree_ek.mean(1), ~earlier_e


def kept_documents(pairs_e2: Ids, priority_n: NDArray[np.int64]) -> Ids:
    """By document, the one that stays of its connected component: the lowest priority number, then the lowest id."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(priority_n)
    graph = coo_array((np.ones(len(pairs_e2), bool), (pairs_e2[:, 0], pairs_e2[:, 1])), shape=(n, n))
    count, component_n = connected_components(graph, directed=False)
    order_n = np.lexsort((np.arange(n), priority_n))[::-1]
    best = np.empty(count, np.int64)
    best[component_n[order_n]] = order_n  # the last assignment of a component stays, which is its best document
    return best[component_n]
