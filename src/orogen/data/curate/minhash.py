"""MinHash signatures (Broder 1997) of many documents at once.

The k hash functions are a x + b modulo 2^32 with odd a, on shingles that are hashes themselves. Two signatures agree in
each place with a probability close to the Jaccard index of the sets of shingles.
Letters: n documents, g shingles of all of them, k hash functions, b bands, r rows of a band.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orogen.config.curate import DedupConfig
from orogen.data.curate.words import Hashes

Signatures = NDArray[np.uint32]

BLOCK = 2**14  # shingles at a time: their hashes stay in the second-level cache
NONE = np.uint32(2**32 - 1)  # in every place of the signature of a document without shingles


def hash_functions(config: DedupConfig) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """a and b of each hash function, uint32 (k,) both, by the seed."""
    draw = np.random.Generator(np.random.PCG64(config.seed))
    a_k, b_k = draw.integers(0, 2**32, (2, config.bands * config.rows), dtype=np.uint32)
    return a_k | np.uint32(1), b_k


def signatures(sets: Sequence[NDArray[np.uint32]], config: DedupConfig) -> Signatures:
    """The smallest value of each hash function over each set of shingles: uint32 (n, k)."""
    a_k, b_k = hash_functions(config)
    signatures_nk = np.full((len(sets), len(a_k)), NONE)
    filled = [i for i, shingles in enumerate(sets) if len(shingles)]
    while filled:
        end = int(np.searchsorted(np.cumsum([len(sets[i]) for i in filled[:BLOCK]]), BLOCK)) + 1
        block, filled = filled[:end], filled[end:]
        shingles_g = np.concatenate([sets[i] for i in block])
        starts_n = np.cumsum([0, *(len(sets[i]) for i in block[:-1])])
        hashes_g = np.empty_like(shingles_g)
        for k, (a, b) in enumerate(zip(a_k, b_k, strict=True)):
            np.multiply(shingles_g, a, out=hashes_g)
            np.add(hashes_g, b, out=hashes_g)
            signatures_nk[block, k] = np.minimum.reduceat(hashes_g, starts_n)
    return signatures_nk


def band_keys(signatures_nk: Signatures, band: int, config: DedupConfig) -> Hashes:
    """One hash of the band's rows per document: uint64 (n,). Equal rows have equal keys."""
    keys_n = np.zeros(len(signatures_nk), np.uint64)
    for start in range(0, len(keys_n), BLOCK):  # so that each page of a file in memory is read once
        rows_nr = np.array(signatures_nk[start : start + BLOCK, band * config.rows : (band + 1) * config.rows])
        key_n = keys_n[start : start + BLOCK]
        for r in range(config.rows):
            key_n ^= rows_nr[:, r]
            key_n *= np.uint64(0x9E3779B97F4A7C15)
            key_n ^= key_n >> np.uint64(32)
    return keys_n


def candidate_probability(jaccard: NDArray[np.float64] | float, config: DedupConfig) -> NDArray[np.float64]:
    """The probability that two documents with this Jaccard index agree in a whole band."""
    return 1 - (1 - np.asarray(jaccard, np.float64) ** config.rows) ** config.bands


def planted_rates(jaccards: Sequence[float], config: DedupConfig, *, pairs: int) -> list[float]:
    """The measured share of candidates among pairs of random sets whose Jaccard index is planted.

    Each pair has 420 shingles in its union, so that every index of a whole percent up to 0.95 is met within 0.002.
    """
    draw = np.random.Generator(np.random.PCG64(config.seed + 1))
    rates = []
    for jaccard in jaccards:
        common = round(420 * jaccard)
        own = (420 - common) // 2
        sets = []
        for _ in range(pairs):
            all_g = draw.integers(0, 2**32, common + 2 * own, dtype=np.uint32)
            sets += [all_g[: common + own], np.concatenate([all_g[:common], all_g[common + own :]])]
        signatures_nk = signatures(sets, config)
        agree_nk = signatures_nk[::2] == signatures_nk[1::2]
        rates.append(float(agree_nk.reshape(pairs, config.bands, config.rows).all(2).any(1).mean()))
    return rates
